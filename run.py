#!/usr/bin/env python3
"""TreeRPO from a terminal: the demo, the tests, the benchmarks and any workflow.

    python3 run.py demo [--model flux|sd3] [--comfyui PATH] [--iterations N] [--out DIR] [--seed S]
    python3 run.py test [pytest arguments]
    python3 run.py bench NAME [--json FILE] [benchmark arguments]
    python3 run.py workflow FILE.json [--server URL | --comfyui PATH] [--set NODE.INPUT=VALUE] [--out DIR]

Needs Python 3.10 or newer and nothing else. Whatever a command needs goes into an environment of its own in your
cache folder (about 6 GB, made once per set of requirements); your ComfyUI's environment, models and settings are
not touched. ComfyUI runs headless on a free local port, in a private base directory that links this pack.

Tests and benchmarks import the same parts: `find_comfyui`, `ensure_env`, `Server`, `Client`.
"""

from __future__ import annotations

import argparse
import base64
import collections
import configparser
import contextlib
import functools
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import xml.etree.ElementTree
from pathlib import Path

REPO = Path(__file__).resolve().parent
WINDOWS = os.name == "nt"
TESTED_COMFYUI = "0.33.0"  # what is installed where there is none
NO_COMFYUI = (
    "ComfyUI was not found and could not be installed: the same core runs through diffusers on the same embedded model."
)


class Problem(Exception):
    """Something the user can act on; shown as one sentence, without a traceback."""


class Unreachable(Problem):
    """The server does not answer."""


class PromptRejected(Problem):
    """ComfyUI refused the graph; `node_errors` is its own report."""

    def __init__(self, message, node_errors):
        super().__init__(message)
        self.node_errors = node_errors


class ExecutionError(Problem):
    """A node failed; `title` names it, `node_id` and `exception_message` are ComfyUI's."""

    def __init__(self, title, node_id, exception_message):
        super().__init__(f"node '{title}' ({node_id}) failed: {exception_message.strip()}")
        self.title, self.node_id, self.exception_message = title, node_id, exception_message


def say(text):
    """Print a line, over a progress line if there is one."""
    show("")
    print(text, flush=True)


def show(text):
    """Draw a progress line in place; only on a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width) + "\r", end="", flush=True)


# ---------------------------------------------------------------- where ComfyUI is


def is_comfyui(folder):
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_comfyui(explicit=None):
    """The ComfyUI folder, or None. Order: argument, COMFYUI_PATH, around this pack, comfy-cli's, our own."""
    for path, source in ((explicit, "--comfyui"), (os.environ.get("COMFYUI_PATH"), "COMFYUI_PATH")):
        if path:
            folder = Path(path).expanduser().absolute()
            if is_comfyui(folder):
                return folder
            raise Problem(f"{source} names {folder}, which is not ComfyUI (it has no main.py beside a comfy folder).")
    here, home = Path(__file__).absolute(), Path.home()
    packs = [file.parent for file in (here, here.resolve())]
    places = [pack.parent.parent for pack in packs if pack.parent.name == "custom_nodes"]
    places += comfy_cli_workspaces(home)
    if sys.platform in ("darwin", "win32"):
        places.append(home / "Documents" / "comfy" / "ComfyUI")
    places += [home / "comfy" / "ComfyUI", cache_dir() / "ComfyUI"]
    return next((place for place in places if is_comfyui(place)), None)


def comfy_cli_config(home):
    folders = {"darwin": "Library/Application Support", "win32": "AppData/Local"}
    return home / folders.get(sys.platform, ".config") / "comfy-cli" / "config.ini"


def comfy_cli_workspaces(home):
    """The workspaces that comfy-cli remembers, the chosen one first."""
    config = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        config.read(comfy_cli_config(home), encoding="utf-8")
    names = (config.defaults().get(key) for key in ("default_workspace", "recent_workspace"))
    return [Path(name).expanduser() for name in names if name]


def older_comfyuis(main):
    """Other checkouts beside this one (ComfyUI-*), for tests over several versions."""
    return [path for path in sorted(main.parent.glob("ComfyUI-*")) if path != main and is_comfyui(path)] if main else []


def install_comfyui(seconds=600):
    """Install ComfyUI into our cache folder with comfy-cli; None if that fails, for instance without a network."""
    say("No ComfyUI on this machine: trying to install one with comfy-cli ...")
    cache = cache_dir()
    target, part, home = cache / "ComfyUI", cache / "ComfyUI.part", cache / "comfy-cli-home"
    try:
        python = build_env(cache / f"comfy-cli-{platform.python_version()}", ["comfy-cli"], "comfy-cli")
        comfy_cli_config(home).parent.mkdir(parents=True, exist_ok=True)
        # comfy-cli writes settings into the home folder: give it one of its own, keep the user's git settings.
        env = environment(HOME=home, USERPROFILE=home, VIRTUAL_ENV=python.parent.parent, DO_NOT_TRACK=1, GIT_TERMINAL_PROMPT=0)
        git = Path.home() / ".gitconfig"
        if git.is_file():
            env.setdefault("GIT_CONFIG_GLOBAL", str(git))
        options = "--cpu --skip-manager --skip-torch-or-directml --skip-requirement --version".split()
        command = [python, "-m", "comfy_cli", "--skip-prompt", "--workspace", part, "install", *options, TESTED_COMFYUI]
        with locked(cache / "ComfyUI.lock"), open(cache / "ComfyUI.log", "wb") as log:
            if not is_comfyui(target):
                remove(part)
                with spawned(command, env=env, stdout=log) as process:
                    if process.wait(seconds) == 0 and is_comfyui(part):
                        part.replace(target)
    except (Problem, OSError, subprocess.SubprocessError):
        pass
    return target if is_comfyui(target) else None


# ---------------------------------------------------------------- the environment


def cache_dir():
    home = Path.home()
    if sys.platform == "darwin":
        root = home / "Library" / "Caches"
    elif WINDOWS:
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "treerpo"


def ensure_env(comfyui):
    """The python of an environment that runs this ComfyUI (or none), our tests and the demo; made on first use."""
    files = [REPO / "tests" / "requirements.txt"]
    if comfyui and (comfyui / "requirements.txt").is_file():
        files.append(comfyui / "requirements.txt")
    identity = [platform.python_version(), sys.platform, platform.machine(), *(file.read_text("utf-8") for file in files)]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:12]
    requirements = [part for file in files for part in ("-r", str(file))]  # one call: our torch pins hold for both files
    return build_env(cache_dir() / f"env-{digest}", requirements, "torch and the packages that go with it")


def env_python(folder):
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def build_env(folder, requirements, what):
    """Make a virtual environment once; a half-made one is made anew, two runs do not make the same one at once."""
    python, marker = env_python(folder), folder / "complete"
    if marker.is_file() and python.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if marker.is_file() and python.exists():
            return python
        say(f"Installing {what} into {folder}; the first run takes a few minutes ...")
        started = time.monotonic()
        remove(folder)
        make_venv(folder)
        pip_install(python, requirements)
        marker.write_text(" ".join(requirements), "utf-8")
        say(f"Installed in {time.monotonic() - started:.0f} s.")
    return python


def make_venv(folder):
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, env=environment())
    if made.returncode:
        reason = " ".join((made.stdout + made.stderr).split())[-300:]
        raise Problem(f"Python could not make a virtual environment in {folder} (Debian and Ubuntu need python3-venv): {reason}")


def pip_install(python, arguments):
    """pip in the given environment, its output shown as one moving line; a failure becomes one sentence."""
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    lines = collections.deque(maxlen=200)
    with spawned(command, env=environment(PIP_USER=0), stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout:
            if line.strip():
                lines.append(line.strip())
                show(f"  {line.strip()}")
        code = process.wait()
    show("")
    if code:
        errors = [line for line in lines if line.startswith("ERROR")] or list(lines)
        raise Problem(f"pip could not install what is needed (code {code}); its last words: {' | '.join(errors[-3:])}")


def overlay(comfyui, python):
    """A folder with the exact versions (name==version) this ComfyUI pins and `python` lacks, or None if it has all."""
    requirements = comfyui / "requirements.txt"
    pins = re.findall(r"^([\w.-]+==[\w.]+)", requirements.read_text("utf-8"), re.MULTILINE) if requirements.is_file() else []
    code = "import importlib.metadata as m; print(*(d.metadata['Name'] + '==' + d.version for d in m.distributions()), sep='\\n')"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment()).stdout
    have = {line.strip().lower().replace("_", "-") for line in found.splitlines()}
    missing = sorted(pin for pin in pins if pin.lower().replace("_", "-") not in have)
    if not missing:
        return None
    folder = cache_dir() / f"overlay-{hashlib.sha256(' '.join([platform.python_version(), *missing]).encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if not (folder / "complete").is_file():
            say(f"Installing {', '.join(missing)} beside the environment, for {comfyui.name} ...")
            remove(folder)
            pip_install(python, ["--no-deps", "--target", str(folder), *missing])
            (folder / "complete").touch()
    return folder


@contextlib.contextmanager
def locked(path):
    """Hold a lock of the operating system on a file; it ends with this process, however that ends."""
    with open(path, "a+b") as file:
        if not try_lock(file):
            say("Waiting for another run that is making the same environment ...")
            while not try_lock(file):
                time.sleep(0.5)
        yield


def try_lock(file):
    try:
        if WINDOWS:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def environment(**extra):
    """This process's environment without what would leak foreign packages into ours."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"PYTHONUTF8": "1"} | {key: str(value) for key, value in extra.items()}


@contextlib.contextmanager
def spawned(command, **options):
    """A process in a group of its own, ended with everything it started when the block ends."""
    group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {"start_new_session": True}
    command = [str(word) for word in command]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, **group, **options)
    try:
        yield process
    finally:
        end(process)
        if process.stdout:
            process.stdout.close()


def end(process, patience=10):
    if process.poll() is None and WINDOWS:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def remove(folder):
    if folder.exists():
        shutil.rmtree(folder)


# ---------------------------------------------------------------- the server


@functools.lru_cache(maxsize=None)
def has_accelerator(python):
    """Whether this python's torch can use a GPU."""
    code = "import torch as t; print(t.cuda.is_available() or t.backends.mps.is_available() or hasattr(t, 'xpu') and t.xpu.is_available())"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment())
    return answer.stdout.strip().endswith("True")


class Server:
    """A headless ComfyUI: `with Server(comfyui, python) as server: Client(server.url)...`

    base    its base directory (models, custom_nodes, output, user); None = a fresh one, removed at the end
    pack    the custom node pack to link into it, or None
    args    further arguments for main.py
    """

    def __init__(self, comfyui, python, base=None, pack=REPO, args=(), seconds=300):
        self.comfyui, self.python, self.pack, self.args, self.seconds = Path(comfyui), python, pack, args, seconds
        self._own_base = base is None
        self.base = Path(tempfile.mkdtemp(prefix="treerpo-") if base is None else base).absolute()
        self.log = self.base / "server.log"
        self.url = None

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        if self._own_base:
            self._stack.callback(shutil.rmtree, self.base, ignore_errors=True)
        try:
            self._prepare()
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind, error, trace):
        died, reason = False, ""
        if kind is not None and issubclass(kind, Unreachable):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
            died, reason = self.process.poll() is not None, self.tail()
        self._stack.close()
        if died:
            raise Problem(f"ComfyUI ended in mid-work (code {self.process.returncode}); its last lines:\n{reason}") from None

    def log_text(self):
        """What ComfyUI printed so far, without terminal colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text("utf-8", errors="replace"))

    def tail(self, count=15):
        return "\n".join(self.log_text().splitlines()[-count:])

    def _prepare(self):
        for name in ("custom_nodes", "models/loras", "input", "output", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack is not None:
            link_folder(Path(self.pack), self.base / "custom_nodes" / "TreeRPO")

    def _command(self, port):
        known = (self.comfyui / "comfy" / "cli_args.py").read_text("utf-8")
        if '"--base-directory"' not in known:
            raise Problem(f"The ComfyUI in {self.comfyui} is too old: it does not know --base-directory; update it.")
        wanted = [("--disable-auto-launch",), ("--disable-api-nodes",), ("--database-url", "sqlite:///:memory:")]
        options = [word for option in wanted if f'"{option[0]}"' in known for word in option]
        if not has_accelerator(self.python):
            options.append("--cpu")
        where = ["--port", port, "--listen", "127.0.0.1", "--base-directory", self.base]
        return [self.python, self.comfyui / "main.py", *where, *options, *self.args]

    def _start(self):
        extra = overlay(self.comfyui, self.python)
        env = environment(PYTHONPATH=extra) if extra else environment()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self._stack.enter_context(open(self.log, "wb"))
        self.process = self._stack.enter_context(spawned(self._command(port), cwd=self.comfyui, env=env, stdout=log))
        self.url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + self.seconds
        while True:
            with contextlib.suppress(Unreachable):
                Client(self.url).get("/system_stats")
                break
            if self.process.poll() is not None:
                raise Problem(f"ComfyUI could not start (code {self.process.returncode}); its last lines:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Problem(f"ComfyUI did not answer within {self.seconds} s; its last lines:\n{self.tail()}")
            time.sleep(0.2)
        if self.pack is not None and (failed := re.search(r".*Cannot import .*TreeRPO.*", self.log_text())):
            trace = self.log_text()[: failed.start()].rpartition("Traceback (most recent call last)")[2]
            raise Problem(f"ComfyUI could not load the pack in {self.pack}{trace}".rstrip())


def link_folder(source, link):
    """Symbolic link; where Windows does not permit one, a junction; else a copy."""
    if link.is_symlink():
        link.unlink()
    remove(link)
    try:
        link.symlink_to(source, target_is_directory=True)
    except OSError:
        if not WINDOWS or subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(source)], capture_output=True).returncode:
            shutil.copytree(source, link, ignore=shutil.ignore_patterns(".git", "__pycache__"))


# ---------------------------------------------------------------- the client


def parse_frame(data):
    """The first WebSocket frame in `data`: (final, opcode, payload, bytes used), or None while it is incomplete."""
    if len(data) < 2:
        return None
    size, masked, at = data[1] & 0x7F, bool(data[1] & 0x80), 2
    if size >= 126:
        length = 2 if size == 126 else 8
        if len(data) < at + length:
            return None
        size, at = int.from_bytes(data[at : at + length], "big"), at + length
    mask = bytes(data[at : at + 4]) if masked else None
    at += 4 if masked else 0
    if len(data) < at + size:
        return None
    payload = bytes(data[at : at + size])
    return bool(data[0] & 0x80), data[0] & 0x0F, apply_mask(payload, mask) if masked else payload, at + size


def apply_mask(payload, mask):
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


class WebSocket:
    """As much of RFC 6455 as listening to ComfyUI takes: text, fragments, pings; binary messages are previews, skipped."""

    def __init__(self, url, timeout=10):
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme in ("wss", "https")
        self.socket = socket.create_connection((parts.hostname, parts.port or (443 if secure else 80)), timeout)
        if secure:
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=parts.hostname)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {parts.path}?{parts.query} HTTP/1.1", f"Host: {parts.netloc}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        self.buffer, self.pieces, self.text = bytearray(), bytearray(), False
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        if b" 101 " not in head.split(b"\r\n")[0] or accept not in head:
            self.close()
            raise ConnectionError("the server did not accept the websocket")
        self.buffer = bytearray(rest)

    def _more(self):
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the websocket was closed")
        self.buffer += data

    def receive(self, seconds):
        """The next text message, from JSON; None when none came in time. Raises OSError when the connection is gone."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            frame = parse_frame(self.buffer)
            if frame is None:
                self.socket.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    self._more()
                continue
            final, opcode, payload, used = frame
            del self.buffer[:used]
            if opcode == 8:
                raise ConnectionError("the websocket was closed")
            if opcode == 9:
                self.send(10, payload)
            elif opcode <= 2:  # text, binary, or more of what came before
                self.pieces, self.text = (self.pieces, self.text) if opcode == 0 else (bytearray(), opcode == 1)
                self.pieces += payload
                if final and self.text:
                    return json.loads(self.pieces)
        return None

    def send(self, opcode, payload):
        """One short control frame (payload under 126 bytes), masked as clients must."""
        mask = os.urandom(4)
        self.socket.sendall(struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload)) + mask + apply_mask(payload, mask))

    def close(self):
        self.socket.close()


class Client:
    """ComfyUI over HTTP: queue a graph in API format, wait for it, fetch what it made."""

    def __init__(self, url):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.id = uuid.uuid4().hex
        self.socket = None
        self.graphs = {}  # prompt id -> graph, for the titles of its nodes
        local = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def request(self, path, body=None, timeout=60):
        """GET, or POST of a JSON body; the bytes of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with self.opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"No ComfyUI answers at {self.url}: {getattr(reason, 'strerror', None) or reason}.") from None

    def get(self, path):
        try:
            return json.loads(self.request(path))
        except (urllib.error.HTTPError, ValueError) as error:
            raise Problem(f"{self.url}{path} did not answer as ComfyUI does: {error}.") from None

    def object_info(self):
        return self.get("/object_info")

    def queue(self, prompt):
        """Queue a graph; its prompt id. What ComfyUI refuses, even in one branch only, is raised node by node."""
        self._listen()
        try:
            answer = json.loads(self.request("/prompt", {"prompt": prompt, "client_id": self.id}))
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError):
                answer = json.loads(body)
                raise PromptRejected(explain(answer, prompt), answer.get("node_errors") or {}) from None
            raise Problem(f"{self.url}/prompt answered {error.code}: {body[:300]}") from None
        self.graphs[answer["prompt_id"]] = prompt
        if answer.get("node_errors"):
            self.interrupt(answer["prompt_id"])
            raise PromptRejected(explain(answer, prompt), answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id, on_progress=None):
        """Wait for a queued graph: {node id: its ui outputs}. `on_progress(title, value, maximum)` is called on the way.

        The websocket only brings news sooner; what happened is read from /history, with or without it.
        """
        try:
            while True:
                waiting = any(prompt_id in item for part in self.get("/queue").values() for item in part)
                entry = self.get(f"/history/{prompt_id}").get(prompt_id)
                if entry:
                    return self._outcome(prompt_id, entry)
                if not waiting:
                    raise Problem(f"The graph {prompt_id} was taken out of ComfyUI's queue before it ran.")
                self._news(prompt_id, on_progress or (lambda *_: None))
        except KeyboardInterrupt:
            self.interrupt(prompt_id)
            raise

    def run(self, prompt, on_progress=None):
        return self.wait(self.queue(prompt), on_progress)

    def interrupt(self, prompt_id=None):
        """Stop what runs now, or this prompt wherever it is."""
        if prompt_id:
            self.request("/queue", {"delete": [prompt_id]})
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self):
        """Ask ComfyUI to unload its models and forget cached results."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def download(self, image, folder, name=None):
        """Fetch a file that a node reported ({filename, subfolder, type}) into a folder; the path."""
        query = urllib.parse.urlencode({key: image.get(key, "") for key in ("filename", "subfolder", "type")})
        target = Path(folder) / (name or Path(image["filename"]).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes(self.request(f"/view?{query}"))
        except urllib.error.HTTPError as error:
            raise Problem(f"ComfyUI does not hand out {image['filename']}: {error}.") from None
        return target

    def _listen(self):
        if self.socket is None:
            with contextlib.suppress(OSError):  # without it, wait() asks every half second
                self.socket = WebSocket(f"{self.url}/ws?clientId={self.id}")

    def _news(self, prompt_id, on_progress, seconds=5):
        """Pass on progress until something happened to the prompt, or for some seconds."""
        deadline = time.monotonic() + seconds
        while self.socket and time.monotonic() < deadline:
            try:
                message = self.socket.receive(deadline - time.monotonic()) or {}
            except (OSError, ValueError):
                self.socket.close()
                self.socket = None
                return
            kind, data = message.get("type", ""), message.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress":
                on_progress(self._title(prompt_id, data.get("node")), data["value"], data["max"])
            elif kind == "executing" and data.get("node"):
                on_progress(self._title(prompt_id, data["node"]), 0, 1)
            elif kind == "executing" or kind in ("execution_error", "execution_interrupted"):
                return
        time.sleep(0 if self.socket else 0.5)

    def _outcome(self, prompt_id, entry):
        status = entry.get("status") or {}
        for kind, data in status.get("messages", []):
            if kind == "execution_error":
                raise ExecutionError(self._title(prompt_id, data["node_id"]), data["node_id"], data["exception_message"])
            if kind == "execution_interrupted":
                raise Problem(f"The run was interrupted at node '{self._title(prompt_id, data['node_id'])}'.")
        if status.get("status_str") == "error":
            raise Problem("ComfyUI could not run the graph and did not say why; its log may.")
        return entry.get("outputs", {})

    def _title(self, prompt_id, node_id):
        graph = self.graphs.get(prompt_id, {})
        return title(graph[node_id]) if node_id in graph else str(node_id)


# ---------------------------------------------------------------- graphs in API format


def title(node):
    return node.get("_meta", {}).get("title") or node.get("class_type", "?")


def explain(answer, graph):
    """ComfyUI's refusal as one sentence per node."""
    sentences = []
    for node_id, report in (answer.get("node_errors") or {}).items():
        name = title(graph.get(node_id, report))
        for error in report.get("errors", []):
            details = f": {error['details']}" if error.get("details") else ""
            sentences.append(f"node '{name}' ({node_id}): {error.get('message', 'refused')}{details}")
    error = answer.get("error") or {}
    if not sentences and isinstance(error, dict):
        sentences.append(" ".join(part for part in (error.get("message"), error.get("details")) if part))
    return "ComfyUI refused the graph: " + ("; ".join(sentences) or str(error))


def load_graph(path):
    """Read a workflow in API format: {node id: {class_type, inputs, _meta}}."""
    try:
        graph = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise Problem(f"Cannot read the workflow {path}: {error.strerror}.") from None
    except ValueError as error:
        raise Problem(f"{path} is not JSON: {error}.") from None
    if isinstance(graph, dict) and "nodes" in graph and "links" in graph:
        raise Problem(f"{path} is an editor workflow; in ComfyUI use Workflow > Export (API) and give that file.")
    if not isinstance(graph, dict) or not all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        raise Problem(f"{path} is not a workflow in ComfyUI's API format.")
    return graph


def find_node(graph, name):
    """The id of the node with this id, title or class; None if there is none."""
    if name in graph:
        return name
    for key in (title, lambda node: node["class_type"]):
        found = [node_id for node_id, node in graph.items() if key(node) == name]
        if len(found) > 1:
            raise Problem(f"'{name}' fits several nodes of the workflow: name one by its id ({', '.join(found)}).")
        if found:
            return found[0]
    return None


def set_input(graph, node, name, value):
    """Set one input of a node named by id, title or class."""
    node_id = find_node(graph, node)
    if node_id is None:
        raise Problem(f"The workflow has no node '{node}'; it has {', '.join(sorted({title(n) for n in graph.values()}))}.")
    inputs = graph[node_id]["inputs"]
    if name not in inputs:
        raise Problem(f"Node '{node}' has no input '{name}'; it has {', '.join(inputs) or 'none'}.")
    inputs[name] = value


def apply_setting(graph, setting):
    """`node.input=value`. A text input takes the value as it is, any other takes JSON. Both names may hold dots."""
    left, equals, text = setting.partition("=")
    splits = [(left[:i], left[i + 1 :]) for i, letter in enumerate(left) if letter == "."]
    if not equals or not splits:
        raise Problem(f"'--set {setting}' is not of the form node.input=value.")
    node, name = next((pair for pair in reversed(splits) if find_node(graph, pair[0])), splits[-1])
    value = text
    if node_id := find_node(graph, node):
        if not isinstance(graph[node_id]["inputs"].get(name), str):
            with contextlib.suppress(ValueError):
                value = json.loads(text)
    set_input(graph, node, name, value)


def progress_bar(prefix=""):
    """An `on_progress` that draws one moving line."""

    def draw(name, value, maximum):
        done = round(20 * value / maximum) if maximum else 0
        show(f"{prefix}[{'#' * done}{'-' * (20 - done)}] {value}/{maximum} {name}")

    return draw


# ---------------------------------------------------------------- commands


def command_demo(args, rest):
    out = Path(args.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    comfyui = find_comfyui(args.comfyui) or install_comfyui()
    python = ensure_env(comfyui)
    if comfyui is None:
        say(NO_COMFYUI)
        options = ["--model", args.model, "--iterations", args.iterations, "--out", out, "--seed", args.seed]
        return run_in_env(python, ["-m", "core.fallback", *options], None)
    started, name = time.monotonic(), f"treerpo_demo_{args.model}"
    say(f"Starting ComfyUI from {comfyui} ...")
    with Server(comfyui, python, pack=REPO) as server:
        client = Client(server.url)
        try:
            rows = train(client, server.base, name, args)
            scores, pictures = compare(client, name, args, out)
        finally:
            files = collect(server.base, name, out)
    ends = [sum(row["reward"] for row in part) / len(part) for part in (rows[:4], rows[-4:])]
    summary = {"backend": "comfyui", "model": args.model, "iterations": len(rows), "seed": args.seed}
    summary |= {"reward_first": ends[0], "reward_last": ends[1], "held_out": scores, "seconds": time.monotonic() - started}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    say(f"Mean reward, first {len(rows[:4])} -> last {len(rows[-4:])} iterations: {ends[0]:.4f} -> {ends[1]:.4f}")
    if None not in scores.values():
        say(f"Held-out prompts, before -> after: {scores['before']:.4f} -> {scores['after']:.4f}")
    say(f"In {out}: {', '.join([*files, *pictures, 'summary.json'])}")
    return 0


def train(client, base, name, args):
    """Queue the one-iteration graph N times; the rows of metrics.jsonl."""
    graph = load_graph(REPO / "workflows" / "api" / "first_steps.json")
    settings = [("Model", "model", args.model), ("Policy", "run_name", name), ("Sampler", "seed", args.seed), ("Save", "lora_name", name)]
    for setting in settings:
        set_input(graph, *setting)
    metrics, rows = base / "output" / "treerpo" / name / "metrics.jsonl", []
    for number in range(1, args.iterations + 1):
        client.run(graph, progress_bar(f"  {number}/{args.iterations} "))
        if not metrics.is_file():
            raise Problem(f"The graph ran but left no {metrics.name} in {metrics.parent}.")
        rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines() if line.strip()]
        row = rows[-1]
        text = f"iteration {number:3d}/{args.iterations}   reward {row['reward']:.4f} ± {row['reward_std']:.4f}"
        say(f"{text}   {row['forwards']} forwards   {row['seconds']:.1f} s")
    return rows


def compare(client, name, args, out):
    """Held-out prompts on fixed seeds, without and with the trained LoRA: (mean scores, names of the pictures in `out`)."""
    graph = load_graph(REPO / "workflows" / "api" / "compare.json")
    set_input(graph, "Model", "model", args.model)
    set_input(graph, "LoRA", "lora_name", f"{name}.safetensors")
    outputs = client.run(graph, progress_bar("  before and after "))
    scores, pictures = {}, []
    for when in ("before", "after"):
        images = outputs.get(find_node(graph, when.capitalize()), {}).get("images", [])
        names = [f"{when}.png"] if len(images) == 1 else [f"{when}_{number}.png" for number in range(1, len(images) + 1)]
        pictures += [client.download(image, out, file).name for image, file in zip(images, names)]
        scores[when] = mean_score(outputs.get(find_node(graph, f"Score {when}"), {}).get("text", ""))
    return scores, pictures


def mean_score(text):
    """The number after the word 'mean' in what Score Images reports, or None."""
    text = text if isinstance(text, str) else "\n".join(map(str, text))
    found = re.search(r"\bmean\b[^\d\n-]*(-?\d+(?:\.\d+)?(?:e-?\d+)?)", text, re.IGNORECASE)
    return float(found.group(1)) if found else None


def collect(base, name, out):
    """Copy what the run left so far out of the private base directory; the names."""
    run = base / "output" / "treerpo" / name
    files = [run / "metrics.jsonl", run / "reward_curve.png", run / "tree.png", base / "models" / "loras" / f"{name}.safetensors"]
    for file in files:
        if file.is_file():
            shutil.copy2(file, out / file.name)
    return [file.name for file in files if file.is_file()]


def command_test(args, rest):
    """pytest over tests/ in the environment; the last line says what was skipped and why."""
    comfyui = find_comfyui()
    python = ensure_env(comfyui)
    older = []
    for path in older_comfyuis(comfyui):
        try:
            overlay(path, python)
            older.append(str(path))
        except Problem as problem:
            say(f"Left out {path}: {problem}")
    extra = {} if "TREERPO_COMFYUI_OLDER" in os.environ else {"TREERPO_COMFYUI_OLDER": os.pathsep.join(older)}
    paths = [] if any((REPO / word.split("::")[0]).exists() for word in rest if not word.startswith("-")) else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_in_env(python, ["-m", "pytest", *paths, *rest, f"--junitxml={report}"], comfyui, **extra)
        say(skipped_line(report))
    return code


def skipped_line(report):
    """`skipped: 2 (1 x no GPU; 1 x ...)` from pytest's report."""
    try:
        cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        return "skipped: unknown (pytest ended without a report)"
    reasons = collections.Counter()
    for case in cases:
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if reason == "collection skipped":  # a whole file: its text is ('file', line, 'Skipped: reason')
                reason = (skip.text or "").partition("Skipped: ")[2][:-2] or reason
            if skip.get("type") != "pytest.xfail":
                reasons[reason] += 1
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return f"skipped: {sum(reasons.values())}" + (f" ({why})" if why else "")


def command_bench(args, rest):
    names = sorted(path.stem for path in (REPO / "benchmarks").glob("*.py") if not path.stem.startswith("_"))
    if args.name not in names:
        raise Problem(f"There is no benchmark '{args.name}'; there are: {', '.join(names) or 'none yet'}.")
    comfyui = find_comfyui()
    return run_in_env(ensure_env(comfyui), [REPO / "benchmarks" / f"{args.name}.py", *rest], comfyui, PYTHONPATH=REPO)


def run_in_env(python, arguments, comfyui, **extra):
    """Run python in the repository root; its exit code."""
    env = environment(**extra)
    env.pop("COMFYUI_PATH", None)
    if comfyui:
        env["COMFYUI_PATH"] = str(comfyui)
    return subprocess.run([str(word) for word in (python, *arguments)], cwd=REPO, env=env).returncode


def command_workflow(args, rest):
    graph, out = load_graph(args.file), Path(args.out).expanduser().absolute()
    for setting in args.set:
        apply_setting(graph, setting)
    if args.server:
        return run_workflow(Client(args.server), graph, out)
    comfyui = find_comfyui(args.comfyui)
    if comfyui is None:
        raise Problem("No ComfyUI was found: give --server URL, --comfyui PATH or set COMFYUI_PATH.")
    python, base = ensure_env(comfyui), out / "comfyui"  # kept, so that the next run goes on from this one's results
    base.mkdir(parents=True, exist_ok=True)
    folders = [path.name for path in (comfyui / "models").iterdir() if path.is_dir()]
    paths = {"yours": {"base_path": str(comfyui / "models")} | {name: name for name in folders}}
    (base / "models.yaml").write_text(json.dumps(paths), "utf-8")  # JSON is YAML
    with Server(comfyui, python, base, args=("--extra-model-paths-config", base / "models.yaml")) as server:
        return run_workflow(Client(server.url), graph, out)


def run_workflow(client, graph, out):
    outputs = client.run(graph, progress_bar())
    for node_id, output in outputs.items():
        for items in output.values():
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and "filename" in item:
                    say(f"{title(graph.get(node_id, {}))}: {client.download(item, out)}")
                elif isinstance(item, str):
                    say(f"{title(graph.get(node_id, {}))}: {item}")
    return 0


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train the embedded model in ComfyUI and show before and after")
    demo.add_argument("--model", choices=("flux", "sd3"), default="flux")
    demo.add_argument("--comfyui", metavar="PATH", help="the ComfyUI to use (default: the one that is found)")
    demo.add_argument("--iterations", type=positive, default=20, metavar="N")
    demo.add_argument("--out", default="demo_output", metavar="DIR")
    demo.add_argument("--seed", type=int, default=0, metavar="S")
    commands.add_parser("test", help="run the test suite", add_help=False, allow_abbrev=False)
    bench = commands.add_parser("bench", help="run a benchmark", add_help=False, allow_abbrev=False)
    bench.add_argument("name", nargs="?", default="")
    flow = commands.add_parser("workflow", help="run a workflow in API format")
    flow.add_argument("file")
    place = flow.add_mutually_exclusive_group()
    place.add_argument("--server", metavar="URL", help="a ComfyUI that runs already")
    place.add_argument("--comfyui", metavar="PATH", help="start this one (default: the one that is found)")
    flow.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="NODE is an id, a title or a class")
    flow.add_argument("--out", default="workflow_output", metavar="DIR")
    return parser


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def main(argv=None):
    if sys.version_info < (3, 10):
        sys.exit("run.py needs Python 3.10 or newer.")
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("test", "bench"):
        parser.error(f"unknown argument: {' '.join(rest)}")
    commands = {"demo": command_demo, "test": command_test, "bench": command_bench, "workflow": command_workflow}
    try:
        return commands[args.command](args, rest)
    except Problem as problem:
        show("")
        print(f"run.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):  # end what we started too when someone ends us
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
