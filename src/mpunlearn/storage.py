"""Directories on the disk or in an object store, for code that takes either.

The idea: files are read by ranges and written in parts, so nothing is stored on the local disk, and only the parts that are
under way are in memory.

A store cannot rename a directory, so a new one does not appear at once. Instead, its manifest is written last: a directory
that was written here is complete when it has one (see `object_store`). Not covered: two writers of one directory at a time,
other than tasks for its shards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpunlearn import files
from mpunlearn.errors import FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, json_bytes, new_directory, parse_json
from mpunlearn.object_store import MANIFEST as MANIFEST
from mpunlearn.object_store import StorePath as StorePath

SCHEMES = ("s3", "gs", "az")
UNFINISHED = ".unfinished"
"""Name of a file that marks a directory in a store while it is written."""
PIECE_BYTES = 1 << 23
"""Number of bytes that are read at once where a whole file in a store is read."""
BUFFER_BYTES = 1 << 18
"""The same for a file on the disk."""
Place = Path | StorePath
"""A directory or file, on the disk or in a store."""


def as_place(value: Any, option: str) -> Place:
    """Converts the value of an option to a path or, if it is a URL, to that of a store.

    Raises:
        PlanError: it is neither, or a URL without a prefix or of another scheme.
        MissingPackageError: obstore is not installed.
    """
    if isinstance(value, StorePath):
        return value
    if not isinstance(value, str) or "://" not in value:
        return as_path(value, option)
    scheme, _, rest = value.partition("://")
    bucket, _, prefix = rest.strip("/").partition("/")
    if scheme not in SCHEMES or not bucket or not prefix or any(mark in value for mark in "?#\n\\"):
        known = ", ".join(f"{name}://BUCKET/PREFIX" for name in SCHEMES)
        raise PlanError(f"{option} {value}: expected a directory or one of {known}")
    needs("s3", f"{option} {value}")
    return StorePath(f"{scheme}://{bucket}/{prefix}")


def pieces(place: Place, start: int, stop: int) -> Iterator[memoryview]:
    """Reads the bytes `start` … `stop` - 1 of a file, a few at a time; each piece is valid until the next one is read.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(place, StorePath):
        for first in range(start, stop, PIECE_BYTES):
            yield place.read_range(first, min(first + PIECE_BYTES, stop))
        return
    with open(place, "rb", buffering=0) as file:
        file.seek(start)
        buffer = memoryview(bytearray(min(BUFFER_BYTES, stop - start)))  # small enough to stay in the processor's cache
        while start < stop and (count := file.readinto(buffer[: stop - start])):
            yield buffer[:count]
            start += count


def read_part(place: Place, start: int, stop: int) -> bytes:
    """The bytes `start` … `stop` - 1 of a file, or fewer if it ends there.

    Raises:
        OSError: the file cannot be read.
    """
    return b"".join(bytes(piece) for piece in pieces(place, start, stop))


def size_of(place: Place) -> int:
    """The size of a file in bytes."""
    return place.size() if isinstance(place, StorePath) else place.stat().st_size


def read_json(place: Place) -> dict[str, Any]:
    """Reads a JSON object from a file; errors as for `files.read_json`."""
    return parse_json(place.read_bytes(), str(place)) if isinstance(place, StorePath) else files.read_json(place)


def write_bytes(place: Place, data: bytes, mode: int = 0o666) -> None:
    """Creates or replaces a small file atomically. In a store, `mode` means nothing."""
    if isinstance(place, StorePath):
        place.write_bytes(data)
    else:
        files.write_bytes(place, data, mode)


def write_json(place: Place, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_bytes(place, json_bytes(value))


@contextmanager
def new_place(place: Place, mode: int = 0o777) -> Iterator[Place]:
    """`files.new_directory`, also for a directory in a store, which is complete when its manifests are (`write_manifest`).

    Raises:
        FileError: there is something already, or it cannot be written. Nothing is left behind.
    """
    if isinstance(place, Path):
        with new_directory(place, mode) as folder:
            yield folder
        return
    mark = place / UNFINISHED
    if UNFINISHED in (left := place.below()):  # of an attempt that was killed
        _remove(place, left)
    elif left:
        raise FileError(f"{place}: already exists ({left[0]}); choose another prefix, or remove what is there")
    mark.write_bytes(b"")
    try:
        yield place
        mark.unlink()
    except BaseException:
        _remove(place, place.below())
        raise


def _remove(folder: StorePath, names: list[str]) -> None:
    """Removes files of a directory in a store; the mark of an unfinished one goes last."""
    for name in sorted(names, key=lambda name: name == UNFINISHED):
        (folder / name).unlink()


def write_manifest(folder: StorePath, digests: Mapping[str, str]) -> None:
    """Completes a directory in a store, once all its files are there.

    Args:
        folder: the directory.
        digests: SHA-256 (hex) of each of its files, by name.
    """
    entries = [
        {"name": name, "size": (folder / name).size(), "sha256": sha256} for name, sha256 in sorted(digests.items())
    ]
    write_json(folder / MANIFEST, {"format": 1, "files": entries})
