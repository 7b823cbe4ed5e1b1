"""Nothing half-written: directories and JSON files that appear whole or not at all.

The idea: build beside the target under a temporary name, sync, rename. An exception leaves nothing behind; a killed process
leaves a `.NAME.partial`, which the next attempt removes unless a living process holds it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpunlearn.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000
"""Bytes of a JSON file that is still read: what arrives may be as large as an update."""


@contextmanager
def new_directory(path: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Builds a directory under a temporary name and renames it to `path` when the block ends well.

    Raises:
        CheckpointError: `path` exists, or the file system refuses (no space, no permission). Nothing is left behind.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; name another directory, or remove this one")
    partial = path.parent / f".{path.name}.partial"
    lock, named = -1, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, mode)
        yield partial
        for folder, _, files in os.walk(partial):
            for file in files:
                _sync(Path(folder) / file)
            _sync(Path(folder))
        partial.rename(path)
        named = True
        _sync(path.parent)
        named = False
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was left behind, free the cause and run again"
        ) from error
    finally:
        if lock >= 0:
            shutil.rmtree(path if named else partial, ignore_errors=True)
            os.close(lock)


def _claim(partial: Path, mode: int) -> int:
    """Makes a temporary directory and locks it; one that a killed process left unlocked is removed first."""
    for _ in range(2):
        with suppress(FileExistsError):
            partial.mkdir(mode=mode)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise CheckpointError(f"{partial}: another process is writing there; wait for it, or stop it") from None
        if not any(partial.iterdir()):
            partial.chmod(mode & ~_umask())
            return lock
        shutil.rmtree(partial)
        os.close(lock)
    raise CheckpointError(f"{partial}: cannot be emptied; remove it")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, not JSON, not an object, or impossibly large.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be written again
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any], mode: int = 0o666) -> None:
    """A JSON file, replaced atomically: after a crash it holds the old text or the new one, whole."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), mode)


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A file that appears whole, or replaces another whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.rename(path)
    _sync(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of the data at that offset of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
