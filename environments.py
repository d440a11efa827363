"""Where ComfyUI is, and the Python environments that run it: found or made once, kept in the user's cache folder.

Standard library only. `run.py` is the command line over this; `headless.py` starts servers in these environments.
"""

import collections
import configparser
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent
WINDOWS = os.name == "nt"
TESTED_COMFYUI = "0.33.0"  # what is installed where there is none


class Problem(Exception):
    """Something the user can act on; shown as one sentence, without a traceback."""


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


def find_comfyui(explicit=None, script=__file__):
    """The ComfyUI folder, or None. Order: argument, COMFYUI_PATH, around this pack, comfy-cli's, our own.

    script  a file of this pack; a link in its path counts too (Python resolves those in the path of an imported file)
    """
    for path, source in ((explicit, "--comfyui"), (os.environ.get("COMFYUI_PATH"), "COMFYUI_PATH")):
        if path:
            folder = Path(path).expanduser().absolute()
            if is_comfyui(folder):
                return folder
            raise Problem(f"{source} names {folder}, which is not ComfyUI (it has no main.py beside a comfy folder).")
    here, home = Path(script).absolute(), Path.home()
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
        env = environment(
            HOME=home, USERPROFILE=home, VIRTUAL_ENV=python.parent.parent, DO_NOT_TRACK=1, GIT_TERMINAL_PROMPT=0
        )
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
    identity = [
        platform.python_version(),
        sys.platform,
        platform.machine(),
        *(file.read_text("utf-8") for file in files),
    ]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:12]
    # one call: our torch pins hold for both files
    requirements = [part for file in files for part in ("-r", str(file))]
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
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, env=environment()
    )
    if made.returncode:
        reason = " ".join((made.stdout + made.stderr).split())[-300:]
        raise Problem(
            f"Python could not make a virtual environment in {folder} (Debian and Ubuntu need python3-venv): {reason}"
        )


def pip_install(python, arguments):
    """pip in the given environment, its output shown as one moving line; a failure becomes one sentence."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        *arguments,
    ]
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
    pins = (
        re.findall(r"^([\w.-]+==[\w.]+)", requirements.read_text("utf-8"), re.MULTILINE)
        if requirements.is_file()
        else []
    )
    code = (
        "import importlib.metadata as m; print(*(d.metadata['Name'] + '==' + d.version for d in m.distributions()), "
        "sep='\\n')"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment()).stdout
    have = {line.strip().lower().replace("_", "-") for line in found.splitlines()}
    missing = sorted(pin for pin in pins if pin.lower().replace("_", "-") not in have)
    if not missing:
        return None
    folder = (
        cache_dir()
        / f"overlay-{hashlib.sha256(' '.join([platform.python_version(), *missing]).encode()).hexdigest()[:12]}"
    )
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
