"""One trainer at a time: a lock in the run's folder, held by the operating system and gone with its process.

The file says who holds it, for the sentence that others get, and for folders that are copied or shared between
machines, where the system's lock does not reach. A file that names a process which is gone was left by a crash; that is
logged.
"""

import json
import logging
import os
import socket
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

log = logging.getLogger("treerpo")
FILE = "training.lock"
FAR = 1 << 30  # Windows locks bytes and keeps others from reading them: one far behind the text


class Taken(ValueError):
    """Somebody else trains the run."""


class Lock:
    """A run's lock, taken and given back by whoever writes the run."""

    def __init__(self, folder: Path):
        self.path, self.file = Path(folder) / FILE, None

    def take(self) -> None:
        """Raises Taken, a sentence, where another process or another part of this one has it."""
        while True:
            file = self._open()
            free = _system_lock(file)
            if not free or self._is(file):
                break
            file.close()  # its owner has removed it meanwhile
        try:
            owner = _owner(file)
            if not free or (owner and owner.get("host") != socket.gethostname()):
                raise Taken(self._sentence(owner))
            if owner:
                log.warning("Run '%s' was left by process %s, which is gone.", self.path.parent.name, owner.get("pid"))
            with suppress(OSError):  # a full disk: the system's lock holds without words
                _write(file, {"host": socket.gethostname(), "pid": os.getpid(), "since": now()})
        except BaseException:
            file.close()
            raise
        self.file = file

    def give_back(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            try:
                self.path.unlink() if fcntl is not None else _write(file, None)  # Windows removes no open file
            except OSError:
                pass
            finally:
                file.close()  # which ends the system's lock

    def _open(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"Could not write {FILE} into {self.path.parent}: {error.strerror or error}. Nothing was changed."
            ) from error

    def _is(self, file) -> bool:
        """Whether the open file is still the one in the folder."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    def _sentence(self, owner: dict) -> str:
        run, who = self.path.parent.name, f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
        since = f" since {owner['since']}" if "since" in owner else ""
        if owner.get("host") in (None, socket.gethostname()):
            return f"Run '{run}' is being trained by {who}{since}: stop that one first, or choose another run name."
        return (
            f"Run '{run}' is being trained by {who}{since}, or its folder was copied from there meanwhile: stop that "
            f"one first; if nothing trains it any more, delete {FILE} in the run's folder."
        )


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _system_lock(file) -> bool:
    """Whether the file is now ours alone."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if fcntl is not None and not isinstance(error, BlockingIOError):
            return True  # a file system without locks: what the file says must do
        return False
    return True


def _owner(file) -> dict:
    try:
        file.seek(0)
        owner = json.loads(file.read(1000) or "{}")
    except ValueError:  # half written
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file, owner: dict | None) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) if owner else "")
    file.flush()
