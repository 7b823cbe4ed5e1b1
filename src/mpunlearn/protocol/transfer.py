"""Files by reference: a store that the server owns, and how either party fetches from it and puts into it.

The idea: a message says what a file is (size, SHA-256) and where it lies (a URL); whoever fetches it writes a `.part` beside
the target, checks both, and renames, so that what has its name is whole and is what was signed. Never more than the announced
size is read. The store is any folder or bucket that `fsspec` knows. Where it can sign URLs (S3), the client gets signed URLs
for exactly its files and needs no account; URLs are never logged with their signature.

A client puts an update into numbered *slots*, URLs that the job allots: it cannot choose where the server's files lie, and the
server fetches from the slots that it allotted, not from where a result says.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mpunlearn.errors import NetworkError, PlanError
from mpunlearn.files import file_digest, write_all
from mpunlearn.progress import bar
from mpunlearn.protocol.messages import File

CHUNK = 1 << 22
ATTEMPTS = 3
"""How often a transfer is tried before it has failed."""
LONGEST_SIGNATURE = 7 * 86400.0
"""Seconds that S3 lets a signed URL hold."""
SCHEMES = ("file", "s3", "https", "http")
_HTTP = ("https", "http")


class Store:
    """Where the server puts copies and receives updates.

    Args:
        url: a folder (file:///… or a path) or a bucket (s3://BUCKET/PREFIX) that both parties reach.
        lasts: seconds that signed URLs hold.

    Raises:
        PlanError: no store of that kind is known, or its library is not installed.
    """

    def __init__(self, url: str, lasts: float = LONGEST_SIGNATURE) -> None:
        self._url = url if "://" in url else Path(url).resolve().as_uri()
        self.lasts = int(min(lasts, LONGEST_SIGNATURE))
        """Seconds that its signed URLs hold."""
        scheme = urlsplit(self._url).scheme
        if scheme not in ("file", "s3"):
            raise PlanError(f"--store {url}: expected a folder or s3://BUCKET/PREFIX")
        self._fs = _filesystem(scheme)
        self._signs = scheme == "s3"

    def put(self, path: Path, key: str) -> str:
        """Puts a file there and returns the URL under which a client gets it."""
        target = self._at(key)
        with _tried(f"putting {path.name} to {target}"):
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), target)
        return str(self._fs.url(target, expires=self.lasts)) if self._signs else target

    def slot(self, key: str) -> str:
        """The URL that a client may put one file to."""
        target = self._at(key)
        if not self._signs:
            return target
        return str(self._fs.url(target, expires=self.lasts, client_method="put_object"))

    def fetch(self, key: str, file: File, target: Path) -> None:
        """Fetches what was put into a slot."""
        fetch(self._at(key), file, target)

    def remove(self, key: str) -> None:
        """Removes everything below a key; nothing there is no error."""
        if self._fs.exists(self._at(key)):
            with _tried(f"removing {self._at(key)}"):
                self._fs.rm(self._at(key), recursive=True)

    def _at(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"


def _filesystem(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, **({"skip_instance_cache": True} if scheme == "s3" else {}))
    except ImportError as error:
        raise PlanError(f"--store {scheme}://: needs another library; pip install 'mpunlearn[{scheme}]'") from error


def shown(url: str) -> str:
    """A URL without the signature that it may carry."""
    return url.split("?")[0]


def receive(file: File, payload: memoryview | None, target: Path) -> None:
    """Writes one file of a message, from the message itself or from where it lies.

    Raises:
        NetworkError: it cannot be fetched, or is not what the message announced.
    """
    if payload is None:
        fetch(str(file.url), file, target)
        return
    _arrive(file, target, iter([payload]), "the message")


def fetch(url: str, file: File, target: Path) -> None:
    """Streams a URL into a file, through TARGET.part.

    Raises:
        NetworkError: it cannot be fetched, or has another size or digest than expected. Nothing is left behind.
    """
    import fsspec

    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise NetworkError(f"{shown(url)}: cannot be fetched; expected {', '.join(SCHEMES)}")

    def chunks() -> Iterator[bytes]:
        with fsspec.open(url, "rb", **({"block_size": 0} if scheme in _HTTP else {})) as source:
            while chunk := source.read(CHUNK):
                yield chunk

    for attempt in range(1, ATTEMPTS + 1):
        try:
            _arrive(file, target, chunks(), shown(url))
            return
        except NetworkError:
            raise
        except Exception as error:  # every file system has errors of its own
            if attempt == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                raise NetworkError(f"{shown(url)}: cannot be fetched: {_reason(error)}") from None
            time.sleep(attempt)


def _arrive(file: File, target: Path, chunks: Iterator[bytes | memoryview], source: str) -> None:
    """Writes chunks to TARGET.part, checks size and digest, and gives it its name."""
    part, digest, size = target.with_name(f"{target.name}.part"), hashlib.sha256(), 0
    part.unlink(missing_ok=True)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # The digest of a chunk is computed while it is written and the next one is read.
            with bar(file.size, file.name) as steps, ThreadPoolExecutor(1) as hasher:
                hashed: Future[None] | None = None
                for chunk in chunks:
                    if size + len(chunk) > file.size:
                        raise NetworkError(f"{source}: {file.name} is larger than the {file.size} bytes announced")
                    if hashed is not None:
                        hashed.result()
                    hashed = hasher.submit(digest.update, chunk)
                    write_all(descriptor, chunk, size)
                    size += len(chunk)
                    steps.update(len(chunk))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if size != file.size or digest.hexdigest() != file.sha256:
            raise NetworkError(
                f"{source}: {file.name} has {size} bytes of SHA-256 {digest.hexdigest()[:16]}, expected {file.size} of "
                f"{file.sha256[:16]}; it is damaged or incomplete"
            )
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def put(path: Path, url: str) -> None:
    """Puts a file where a URL says: a slot of a job.

    Raises:
        NetworkError: it cannot be put there.
    """
    scheme = urlsplit(url).scheme
    with _tried(f"putting {path.name} to {shown(url)}"):
        if scheme in _HTTP:
            import httpx

            with path.open("rb") as content:
                headers = {"Content-Length": str(path.stat().st_size)}
                answer = httpx.put(url, content=iter(lambda: content.read(CHUNK), b""), headers=headers, timeout=None)
                answer.raise_for_status()
        elif scheme == "file":
            target = Path(urlsplit(url).path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.part")
            partial.write_bytes(b"")
            _filesystem("file").put_file(str(path), str(partial))
            partial.rename(target)
        else:
            _filesystem(scheme).put_file(str(path), url)


def described(path: Path, url: str | None = None, slot: int | None = None) -> File:
    """A file as a message names it."""
    return File(path.name, path.stat().st_size, file_digest(path), url, slot)


@contextmanager
def _tried(what: str) -> Iterator[None]:
    """Turns whatever a file system raises into one error, without the signature of a URL."""
    try:
        yield
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(f"{what}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return f"{type(error).__name__}{f' {status}' if status else ''}"
