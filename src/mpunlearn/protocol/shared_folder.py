"""Files in a folder that other users, or the other party, can write to as well.

The idea: a path is only a name for what stood there a moment ago. Each folder on the way is opened from the one before
it, and a link is never followed; everything is then done relative to the folder that was opened. Whoever replaces a
folder or a file by a link, before or meanwhile, makes the operation fail or has no effect on it. Nothing outside the
shared folder is read, written or removed.

Not covered: whoever can write to the folder can remove and replace what is in it. Digests show that.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mpunlearn.errors import NetworkError

CHUNK_BYTES = 1 << 20
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def folder(path: Path, create: bool = False) -> Iterator[int]:
    """Opens a folder by an absolute path without links, and yields its descriptor.

    Raises:
        OSError: a part of the path is missing, or a link, or no folder.
        NetworkError: the path is relative or leads back.
    """
    if not path.is_absolute() or ".." in path.parts:
        raise NetworkError(f"{path}: expected an absolute path without ..; check the location of the store")
    descriptor = os.open(path.anchor, _FOLDER)
    try:
        for name in path.parts[1:]:
            inner = _enter(descriptor, name, create)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(outer: int, name: str, create: bool) -> int:
    """Opens a folder within an open folder."""
    if create:
        with suppress(FileNotFoundError):
            return os.open(name, _FOLDER, dir_fd=outer)
        with suppress(FileExistsError):  # another process was faster
            os.mkdir(name, dir_fd=outer)
    return os.open(name, _FOLDER, dir_fd=outer)


def write(source: Path, target: Path) -> None:
    """Copies a file into the shared folder, creating the folders on the way; it becomes visible when it is complete.

    Raises:
        OSError: the target cannot be written, or a part of its path is a link.
    """
    with folder(target.parent, create=True) as place, source.open("rb") as content:
        part = f".{target.name}.{secrets.token_hex(8)}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=place)
        try:
            with open(descriptor, "wb") as copy:
                shutil.copyfileobj(content, copy, CHUNK_BYTES)
                copy.flush()
                os.fsync(copy.fileno())
            os.rename(part, target.name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=place)
            raise


def read(path: Path) -> BinaryIO:
    """Opens a file of the shared folder for reading.

    Raises:
        OSError: it does not exist, or a part of its path is a link.
        IsADirectoryError: it is not a regular file.
    """
    with folder(path.parent) as place:
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
    return open(descriptor, "rb")


def remove(path: Path) -> None:
    """Removes a folder and all that is in it, if there is one. Of a link, only the link is removed.

    Raises:
        OSError: it cannot be removed, or a part of its path is a link.
    """
    with suppress(FileNotFoundError), folder(path.parent) as place:
        if stat.S_ISDIR(os.lstat(path.name, dir_fd=place).st_mode):
            shutil.rmtree(path.name, dir_fd=place)
        else:
            os.unlink(path.name, dir_fd=place)
