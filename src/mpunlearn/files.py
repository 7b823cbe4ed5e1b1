"""Atomic writes: a directory or JSON file becomes visible complete or not at all.

The idea: write under a temporary name next to the target, sync, rename. An exception leaves nothing behind. A killed
process leaves a `.NAME.partial`, which the next attempt removes unless a running process holds its lock.
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
"""Larger JSON files are rejected, since the other party controls the size of what it sends."""


@contextmanager
def new_directory(path: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Yields a temporary directory, and renames it to `path` if the block ends without an exception.

    Raises:
        FileError: `path` exists, or it cannot be written (no space, no permission). Nothing is left behind.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileError(f"{path}: already exists; choose another directory, or remove this one")
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
            f"{path}: cannot be written: {error.strerror or error}; nothing was left behind; fix this and run again"
        ) from error
    finally:
        if lock >= 0:
            shutil.rmtree(path if named else partial, ignore_errors=True)
            os.close(lock)


def appear(pending: Path, path: Path) -> None:
    """Renames a complete directory to its final name, and syncs both.

    Raises:
        FileError: `path` exists, or the directory cannot be renamed.
    """
    if path.exists():
        raise FileError(f"{path}: already exists; choose another directory, or remove this one")
    try:
        for folder, _, files in os.walk(pending):
            for file in files:
                _sync(Path(folder) / file)
            _sync(Path(folder))
        pending.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}; fix this and run again") from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same lock file, which is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _claim(partial: Path, mode: int) -> int:
    """Creates and locks the temporary directory, after removing one that a killed process left behind."""
    for _ in range(2):
        with suppress(FileExistsError):
            partial.mkdir(mode=mode)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise FileError(f"{partial}: another process is writing to it; wait for that process, or stop it") from None
        if not any(partial.iterdir()):
            partial.chmod(mode & ~_umask())
            return lock
        shutil.rmtree(partial)
        os.close(lock)
    raise FileError(f"{partial}: cannot be removed; remove it by hand and run again")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileError: the file is missing, not JSON, not an object, or larger than `MAX_JSON_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileError(f"{path}: cannot be read as JSON: the file has more than {MAX_JSON_BYTES} bytes")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Reads a JSON object from the content of a file; `what` names it in error messages."""
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate, which could not be written back
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any], mode: int = 0o666) -> None:
    """Writes a JSON file atomically: after a crash it has either the old or the new content."""
    write_bytes(path, json_bytes(value), mode)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_bytes(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Creates or replaces a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
        partial.rename(path)
    except (Exception, KeyboardInterrupt):
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync(path.parent)


def cache_folder() -> Path:
    """The folder for files that can be recreated at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpunlearn"


def data_folder() -> Path:
    """The folder for files that must be kept."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mpunlearn"


def as_path(value: Any, option: str) -> Path:
    """Converts the value of an option to a path.

    Raises:
        PlanError: the value is not a path (but a model object or a URL, for example).
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise PlanError(
            f"{option}: expected a path, found an object of type {type(value).__name__}; save the model "
            "with save_pretrained and pass that directory"
        )
    if "://" in str(value):
        raise PlanError(f"{option} {value}: expected a path on this machine, found a URL; download it first")
    return Path(value)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at a byte offset of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
