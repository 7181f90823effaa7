"""Files that are whole or not there, and folders that one process holds at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import io


def sync(path: Path) -> None:
    """Flush a file to the disk, or a folder, so that renames in it survive a power cut; not every file system lets a
    folder be flushed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_dir():
            with contextlib.suppress(OSError):
                os.fsync(handle)
        else:
            os.fsync(handle)
    finally:
        os.close(handle)


def partial(path: Path) -> Path:
    """What `write_atomically` calls the file while it is written: all that a kill leaves of it."""
    return path.with_name(f".{path.name}.partial")


def write_all(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write to an unbuffered file until nothing is left: a nearly full disk takes a part and then refuses."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part. Raises OSError where it cannot
    be written, leaving nothing; what a kill leaves is overwritten the next time."""
    temporary = partial(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


class FolderLock:
    """Holds a folder for this process until `release`, or until the process ends, however it ends.

    Raises BlockingIOError where another process holds it. A file system without locks is taken as it is.
    """

    def __init__(self, folder: Path, create: bool = False):
        self._made = [path for path in (folder, *folder.parents) if create and not path.exists()]
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        self._handle: int | None = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            pass

    @property
    def held(self) -> bool:
        return self._handle is not None

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def undo(self) -> None:
        """Release it, and remove the folders that `create` made as far as they are empty."""
        self.release()
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()
