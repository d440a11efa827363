"""Files that are whole or not there: atomic writes, additions that are undone, second names for the same content."""

import io
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path):
    """A temporary name beside `path` to write to;

    after the block it takes the place of `path`, or is removed if the block fails.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(
            missing_ok=True
        )  # of a killed process; it may be a hard link to a file that must not be written to
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"Could not write {path.name} into {path.parent}: {error.strerror or error}. The previous version is "
            "untouched."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(
                missing_ok=True
            )  # also after success: renaming one hard link to another of the same file does nothing


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside the target, flush it to the disk, then rename:

    readers see the old file or the new one.
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
            f"Could not add to {path.name} in {path.parent}: {error.strerror or error}. The run goes on in memory; "
            "its next save or iteration "
            "writes what is missing."
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
