"""Directories on a disk or in an object store: s3://BUCKET/PREFIX, gs://… or az://….

The idea: a pass reads ranges of files and writes whole files, in order, and nothing else. A `StorePath` therefore has the few
methods of `pathlib.Path` that this needs, and the rest of the code takes either. Files are read by ranges and written in
parts, so nothing is stored on the local disk, and only the parts that are under way are in memory.

A store cannot rename a directory, so a new one does not appear at once. Instead, its `MANIFEST` is written last: a directory
that was written here is complete when it has one, and readers see the files that it lists, and no others. A directory
without one, such as a model that another tool uploaded, has the files that the store lists.

The library is obstore, for all stores: with the same server, it takes less processor time and memory than s3fs
(`benchmarks/stores.py`). Credentials are found as by that library, for S3 in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or
from the machine's role. Not covered: two writers of one directory at a time, other than tasks for its shards.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpunlearn import files
from mpunlearn.errors import FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, json_bytes, new_directory, parse_json

SCHEMES = ("s3", "gs", "az")
MANIFEST = "manifest.json"
"""Name of the file that makes a directory in a store complete."""
UNFINISHED = ".unfinished"
"""Name of a file that marks a directory in a store while it is written."""
PART_BYTES = 1 << 25
"""Size of a part of a file that is written to a store."""
CONCURRENT_PARTS = 2
"""Number of parts of a file that are on their way at a time."""
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")
"""What the names of the environment variables begin with that the library reads."""
PIECE_BYTES = 1 << 23
"""Number of bytes that are read at once where a whole file is read."""


@dataclass(frozen=True)
class StorePath:
    """A directory or a file in an object store. Its methods do what those of `pathlib.Path` do.

    Every method that asks the store raises a `FileError` if the store does not answer or refuses.
    """

    url: str
    """Without a slash at its end."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The directory above."""
        return StorePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def resolve(self) -> "StorePath":
        """The same; a URL is absolute."""
        return self

    def is_file(self) -> bool:
        """Whether there is such a file, according to the manifest of its directory if there is one."""
        return self.name in self.parent._names()

    def is_dir(self) -> bool:
        """Whether there is any file in it."""
        return bool(self._names())

    def exists(self) -> bool:
        """Whether there is anything in or below this directory."""
        import obstore

        with self._asking():
            return any(obstore.list(self._store, f"{self._key}/", chunk_size=1))

    def iterdir(self) -> Iterator["StorePath"]:
        """The files of a directory, sorted by name."""
        return (self / name for name in sorted(self._names()))

    def below(self) -> list[str]:
        """The names of all files in and below this directory, relative to it, whatever a manifest says."""
        import obstore

        with self._asking():
            listed = obstore.list(self._store, f"{self._key}/").collect()
        return sorted(entry["path"].removeprefix(f"{self._key}/") for entry in listed)

    def size(self) -> int:
        """The size of a file in bytes."""
        import obstore

        with self._asking():
            return int(obstore.head(self._store, self._key)["size"])

    def read_bytes(self) -> bytes:
        """The content of a small file."""
        import obstore

        with self._asking():
            return bytes(obstore.get(self._store, self._key).bytes())

    def read_range(self, start: int, stop: int) -> memoryview:
        """The bytes `start` … `stop` - 1 of a file."""
        import obstore

        if start == stop:
            return memoryview(b"")
        with self._asking():
            return memoryview(obstore.get_range(self._store, self._key, start=start, end=stop)).cast("B")

    def write_bytes(self, data: bytes) -> None:
        """Creates or replaces a small file."""
        import obstore

        with self._asking():
            obstore.put(self._store, self._key, data)

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Yields an object whose `write` appends to a new file, in parts. If the block raises, there is no file."""
        import obstore

        with self._asking():
            file = obstore.open_writer(self._store, self._key, buffer_size=PART_BYTES, max_concurrency=CONCURRENT_PARTS)
            try:
                yield file
            except BaseException:
                file.close()
                self.unlink()
                raise
            file.close()

    def unlink(self) -> None:
        """Removes a file, if there is one."""
        import obstore

        with self._asking():
            obstore.delete(self._store, self._key)

    def _names(self) -> frozenset[str]:
        """The names of the files in a directory: those of its manifest or, without one, those that the store lists."""
        import obstore

        with self._asking():
            listed = obstore.list_with_delimiter(self._store, f"{self._key}/")["objects"]
        stored = {entry["path"].rpartition("/")[2]: entry["size"] for entry in listed}
        if MANIFEST not in stored:
            return frozenset(stored)
        try:
            sizes = {file["name"]: file["size"] for file in read_json(self / MANIFEST)["files"]}
        except (KeyError, TypeError) as error:
            raise FileError(f"{self / MANIFEST}: not a manifest: {error!r}; upload the directory again") from error
        if wrong := sorted(name for name, size in sizes.items() if stored.get(name) != size):
            raise FileError(
                f"{self}: {wrong[0]} is missing or not as long as {MANIFEST} says; upload the directory again"
            )
        return frozenset(sizes)

    @property
    def _store(self) -> Any:
        scheme, _, rest = self.url.partition("://")
        settings = frozenset(item for item in os.environ.items() if item[0].startswith(_SETTINGS))
        return _store(f"{scheme}://{rest.partition('/')[0]}", settings)

    @property
    def _key(self) -> str:
        return self.url.partition("://")[2].partition("/")[2]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns the errors of the library into ours."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            raise FileError(f"{self.url}: {_reason(str(error))}") from error
        except OSError as error:
            raise FileError(f"{self.url}: cannot be accessed: {_first(str(error))}") from error


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
    """Reads the bytes `start` … `stop` - 1 of a file, a few at a time.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(place, StorePath):
        for first in range(start, stop, PIECE_BYTES):
            yield place.read_range(first, min(first + PIECE_BYTES, stop))
        return
    with open(place, "rb", buffering=0) as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
            yield memoryview(piece)
            start += len(piece)


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


@lru_cache(maxsize=16)
def _store(bucket: str, settings: frozenset[tuple[str, str]]) -> Any:
    """The store of a bucket, with the settings of the environment. Only an endpoint that is named there may lack TLS."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    plain = dict(settings).get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        return from_url(bucket, client_options={"allow_http": plain})
    except BaseError as error:
        raise FileError(f"{bucket}: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """What a person can do about an error of the library, which does not tell the causes apart by type."""
    if "NoSuchBucket" in text:
        return "there is no such bucket; create it, or correct the name"
    if "169.254.169.254" in text or "metadata.google" in text or "Account must be specified" in text:
        return (
            "found no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or "
            "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
        )
    if "403" in text or "401" in text or "AccessDenied" in text:
        return "the store refuses access; check the credentials and what they are allowed to do there"
    if "404" in text:
        return "there is no such file, or no such bucket"
    return f"cannot be accessed: {_first(text)}"


def _first(text: str) -> str:
    """The first line of an error, without the details that follow."""
    return (text.strip().splitlines() or ["unknown error"])[0][:300]
