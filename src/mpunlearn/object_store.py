"""Directories and files in an object store: s3://BUCKET/PREFIX, gs://… or az://….

The idea: a pass reads ranges of files and writes whole files, in order, and nothing else. A `StorePath` therefore has the few
methods of `pathlib.Path` that this needs. A directory that has a `MANIFEST` consists of the files that it lists; one without,
such as a model that another tool uploaded, of the files that the store lists.

The library is obstore, for all stores: with the same server, it takes less processor time and memory than s3fs
(`benchmarks/stores.py`). Credentials are found as by that library, for S3 in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or
from the machine's role.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mpunlearn.errors import FileError
from mpunlearn.files import parse_json

MANIFEST = "manifest.json"
"""Name of the file that makes a directory in a store complete."""
PART_BYTES = 1 << 25
"""Size of a part of a file that is written to a store."""
CONCURRENT_PARTS = 2
"""Number of parts of a file that are on their way at a time."""
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")
"""What the names of the environment variables begin with that the library reads."""


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

        with self._asking(), suppress(FileNotFoundError):
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
            sizes = {
                file["name"]: file["size"]
                for file in parse_json((self / MANIFEST).read_bytes(), str(self / MANIFEST))["files"]
            }
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
    if "status code: 403" in text or "status code: 401" in text:
        return "the store refuses access; check the credentials and what they are allowed to do there"
    if "status code: 404" in text:
        return "there is no such file, or no such bucket"
    return f"cannot be accessed: {_first(text)}"


def _first(text: str) -> str:
    """The first line of an error, without the details that follow."""
    return (text.strip().splitlines() or ["unknown error"])[0][:300]
