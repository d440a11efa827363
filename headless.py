"""A headless ComfyUI and its client: start a server, queue graphs in API format, follow them, fetch what they made.

    with Server(comfyui, python) as server:
        outputs = Client(server.url).run(load_graph("flow.json"))

Standard library only. `Client` works with any ComfyUI that runs already; `Server` starts one in an environment of
`environments.py`. Whatever goes wrong is a `Problem`: one sentence that says what to do about it.
"""

import base64
import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from environments import REPO, WINDOWS, Problem, environment, overlay, remove, show, spawned


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


# ---------------------------------------------------------------- the server


@functools.cache
def has_accelerator(python):
    """Whether this python's torch can use a GPU."""
    code = (
        "import torch as t; print(t.cuda.is_available() or t.backends.mps.is_available() or hasattr(t, 'xpu') and "
        "t.xpu.is_available())"
    )
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
            raise Problem(
                f"ComfyUI ended in mid-work (code {self.process.returncode}); its last lines:\n{reason}"
            ) from None

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
                raise Problem(
                    f"ComfyUI could not start (code {self.process.returncode}); its last lines:\n{self.tail()}"
                )
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
        if (
            not WINDOWS
            or subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(source)], capture_output=True).returncode
        ):
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
    """As much of RFC 6455 as listening to ComfyUI takes: text, fragments, pings; binary ones, previews, are skipped."""

    def __init__(self, url, timeout=10):
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme in ("wss", "https")
        self.socket = socket.create_connection((parts.hostname, parts.port or (443 if secure else 80)), timeout)
        if secure:
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=parts.hostname)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET {parts.path}?{parts.query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
        ]
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
            raise Unreachable(
                f"No ComfyUI answers at {self.url}: {getattr(reason, 'strerror', None) or reason}."
            ) from None

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
        """Wait for a queued graph: {node id: its ui outputs}. `on_progress(title, value, maximum)` is called on the
        way.

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
                raise ExecutionError(
                    self._title(prompt_id, data["node_id"]), data["node_id"], data["exception_message"]
                )
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
    return (node.get("_meta") or {}).get("title") or node.get("class_type", "?")


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
    """Read a workflow in API format: {node id: {class_type, inputs, _meta}}, or {"prompt": that} as it is queued.

    Windows' editors begin a file with a byte order mark, and some write it in UTF-16: both are read.
    """
    try:
        graph = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise Problem(f"Cannot read the workflow {path}: {error.strerror}.") from None
    except ValueError as error:
        raise Problem(f"{path} is not JSON: {error}.") from None
    except RecursionError:
        raise Problem(f"{path} is not a workflow: it is nested too deeply.") from None
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        graph = graph["prompt"]
    if isinstance(graph, dict) and "nodes" in graph and "links" in graph:
        raise Problem(f"{path} is an editor workflow; in ComfyUI use Workflow > Export (API) and give that file.")
    if not isinstance(graph, dict) or not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    ):
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
        raise Problem(
            f"The workflow has no node '{node}'; it has {', '.join(sorted({title(n) for n in graph.values()}))}."
        )
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
