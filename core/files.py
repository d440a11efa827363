"""Files that are whole or not there: atomic writes, additions that are undone, second names for the same content; and
the one reader of texts that people bring.
"""

import hashlib
import io
import os
import re
import shutil
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = hashlib.blake2b(socket.gethostname().encode(), digest_size=3).hexdigest()  # this machine, in names


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that only this process uses."""
    return path.with_name(f".{path.name}.{HERE}-{os.getpid()}.tmp")


def abandoned(path: Path) -> bool:
    """Whether a file of such a name was left by a process of this machine that is gone, or by this one."""
    found = re.fullmatch(r"\..+\.(?:([0-9a-f]{6})-)?(\d+)\.tmp", path.name)  # before 0.1.0 without the machine
    return bool(found) and found[1] in (None, HERE) and (int(found[2]) == os.getpid() or not alive(int(found[2])))


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    if os.name == "nt":  # os.kill would end it
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def tidy(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder."""
    for leftover in filter(abandoned, folder.glob(".*.tmp")):
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def replacing(path: Path):
    """A temporary name beside `path` to write to; after the block it takes the place of `path`, or is removed if the
    block fails.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # of a killed process; it may be a hard link to a file that must not be written to
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"Could not write {path.name} into {path.parent}: {error.strerror or error}. The previous version is "
            "untouched."
        ) from error
    finally:
        with suppress(OSError):
            # also after success: renaming one hard link to another of the same file does nothing
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside the target, flush it to the disk, then rename: readers see the old file or the
    new one.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, data: bytes, size: int) -> None:
    """Add to a file of `size` bytes, or leave it as it was."""
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise OSError(
            f"Could not add to {path.name} in {path.parent}: {error.strerror or error}. The run goes on in memory; its "
            "next save or iteration writes what is missing."
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """The same content under a second name.

    Files are only ever replaced, never rewritten, so a hard link is as good as a copy.
    """
    try:
        os.link(source, target)
    except OSError:  # FAT, some network drives, another file system
        with open(source, "rb") as original, open(target, "wb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())


def write_picture(path: Path, picture) -> None:
    """A PIL picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def read_text(path: Path, kind: str = "file", largest: int = 50_000_000) -> str:
    """The text of a UTF-8 file of at most `largest` bytes, without its byte order mark.

    kind: what the file is to the user. Raises ValueError in one sentence for whatever else it is.
    """
    if not path.is_file():
        raise ValueError(f"There is no {kind} {path}: check its folder and name.")
    try:
        with open(path, "rb") as file:
            raw = file.read(largest + 1)
    except OSError as error:
        raise ValueError(f"The {kind} {path} cannot be read ({error.strerror}): check that you may open it.") from error
    if len(raw) > largest:
        raise ValueError(
            f"The {kind} {path.name} is larger than {largest // 1_000_000} MB: split it, or keep only the prompts."
        )
    try:
        text = raw.decode("utf-8-sig")
        wrong = text.find("\0")  # UTF-16 without its mark reads as UTF-8 with zeros
        line = text.count("\n", 0, wrong) + 1 if wrong >= 0 else 0
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
    if line:
        raise ValueError(f"Line {line} of {path.name} is not UTF-8 text: save the file with the encoding UTF-8.")
    return text
