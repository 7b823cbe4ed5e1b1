"""Nothing half-written: directories and JSON files that become visible whole, or not at all.

The idea: build under a temporary name beside the target, sync, rename. An exception leaves nothing behind. A killed process
leaves a `.NAME.partial`, which the next attempt removes unless a running process holds its lock.
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

from mpunlearn.errors import FileError, PlanError

MAX_JSON_BYTES = 100_000_000
"""Larger JSON files are refused: what the other party sends may be of any size."""


@contextmanager
def new_directory(path: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Builds a directory under a temporary name and renames it to `path` when the block ends without an exception.

    Raises:
        FileError: `path` exists, or the file system refuses (no space, no permission). Nothing is left behind.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileError(f"{path}: already exists; name another directory, or remove this one")
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
        raise FileError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was left behind, fix the cause and run again"
        ) from error
    finally:
        if lock >= 0:
            shutil.rmtree(path if named else partial, ignore_errors=True)
            os.close(lock)


def _claim(partial: Path, mode: int) -> int:
    """Creates and locks the temporary directory; one that a killed process left behind is removed first."""
    for _ in range(2):
        with suppress(FileExistsError):
            partial.mkdir(mode=mode)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise FileError(f"{partial}: another process is writing there; wait for it, or stop it") from None
        if not any(partial.iterdir()):
            partial.chmod(mode & ~_umask())
            return lock
        shutil.rmtree(partial)
        os.close(lock)
    raise FileError(f"{partial}: cannot be emptied; remove it")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileError: the file is missing, not JSON, not an object, or larger than `MAX_JSON_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any], mode: int = 0o666) -> None:
    """Writes a JSON file atomically: after a crash it holds the old content or the new, whole."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), mode)


def write_bytes(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Writes or replaces a file atomically."""
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


def cache_folder() -> Path:
    """Where the program keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpunlearn"


def as_path(value: Any, option: str) -> Path:
    """The path that a Python caller gave for an option.

    Raises:
        PlanError: it is not a path, but a model object, say.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise PlanError(
            f"{option}: expected a path, found an object of type {type(value).__name__}; save a model with "
            "save_pretrained and give its directory"
        )
    return Path(value)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of the data at an offset of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
