"""File transfer through a store (a folder or an S3 bucket) that belongs to the server.

The idea: a signed message contains the size, the SHA-256 and the URL of each file. The receiver downloads the file to a
`.part` file next to the target, checks size and digest, and renames it, so any file under its final name is complete
and matches the signed digest. Never more than the announced size is read. The store is accessed through `fsspec`. For
S3, the client gets signed URLs for exactly its own files and needs no account. URLs are never logged with their
signature.

A client uploads its update to numbered *slots*, which are URLs assigned by the job. It cannot choose where files are
stored, and the server reads from the slots that it assigned itself, never from a URL in a result.
"""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mpunlearn.errors import DamagedError, NetworkError, PlanError
from mpunlearn.files import file_digest, write_all
from mpunlearn.progress import Progress
from mpunlearn.protocol import shared_folder
from mpunlearn.protocol.messages import File

CHUNK_BYTES = 1 << 20
MAX_ATTEMPTS = 3
"""Number of attempts at a transfer before it fails."""
MAX_SIGNATURE_SECONDS = 7 * 86400.0
"""Maximum validity of a signed URL in S3."""
SCHEMES = ("file", "s3", "https", "http")
TIMEOUT_SECONDS = 120.0
"""Time without data after which an HTTP transfer fails."""
_HTTP = ("https", "http")
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors of the local disk."""
T = TypeVar("T")


class Store:
    """The store to which the server uploads copies, and clients upload updates.

    Args:
        url: a folder (a path or file:///…) or bucket (s3://BUCKET/PREFIX) that both parties can access.
        signature_seconds: how long signed URLs are valid, at most `MAX_SIGNATURE_SECONDS`.

    Raises:
        PlanError: the kind of store is not supported, or its library is not installed.
    """

    def __init__(self, url: str, signature_seconds: float = MAX_SIGNATURE_SECONDS) -> None:
        self._url = url if "://" in url else f"file://{Path(url).resolve()}"
        self.signature_seconds = int(min(signature_seconds, MAX_SIGNATURE_SECONDS))
        """How long signed URLs are valid."""
        scheme = urlsplit(self._url).scheme
        if scheme not in ("file", "s3"):
            raise PlanError(f"--store {url}: expected a folder or s3://BUCKET/PREFIX")
        if self._url != f"{scheme}://{urlsplit(self._url).netloc}{urlsplit(self._url).path}":
            raise PlanError(f"--store {url}: expected a name without ?, # or line breaks")
        self._filesystem = _filesystem(scheme) if scheme == "s3" else None

    def put(self, path: Path, key: str) -> File:
        """Uploads a file; returns its entry for a message, with the URL from which the client can download it."""
        target = self._at(key)

        def once() -> str:
            if self._filesystem is None:
                _write(path, target)
                return target
            self._filesystem.put_file(str(path), target)
            return str(self._filesystem.url(target, expires=self.signature_seconds))

        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(file_digest, path)
            url = with_retries(f"uploading {path.name} to {target}", once)
            return File(path.name, path.stat().st_size, digest.result(), url)

    def slot(self, key: str) -> str:
        """The URL to which a client may upload one file."""
        target = self._at(key)
        if self._filesystem is None:
            return target
        sign = partial(self._filesystem.url, target, expires=self.signature_seconds, client_method="put_object")
        return str(with_retries(f"signing {target}", sign))

    def fetch(self, key: str, file: File, target: Path) -> None:
        """Downloads the file that was uploaded to a slot; errors as for the function `fetch`."""
        fetch(self._at(key), file, target)

    def remove(self, key: str) -> None:
        """Removes all files below a key, if there are any."""
        target = self._at(key)

        def once() -> None:
            if self._filesystem is None:
                shared_folder.remove(_local(target))
            elif self._filesystem.exists(target):
                self._filesystem.rm(target, recursive=True)

        with_retries(f"removing {target}", once)

    def _at(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"


def _filesystem(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, **({"skip_instance_cache": True} if scheme == "s3" else {}))
    except ImportError as error:
        raise PlanError(f"--store {scheme}://: not installed; run `pip install 'mpunlearn[{scheme}]'`") from error


def redact(url: str) -> str:
    """Removes the signature and the password from a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def receive(file: File, payload: memoryview | None, target: Path) -> None:
    """Writes a file of a message to disk, from the message itself or from its URL; errors as for `fetch`."""
    if payload is None:
        fetch(str(file.url), file, target)
    else:
        _write_checked(file, target, iter([payload]), "the message")


def fetch(url: str, file: File, target: Path) -> None:
    """Downloads a URL to a file, through TARGET.part.

    Raises:
        DamagedError: the file is missing, or its size or digest differs from what was announced. Nothing is left
            behind.
        NetworkError: the file cannot be downloaded.
        OSError: the local disk is full or faulty.
    """
    if urlsplit(url).scheme not in SCHEMES:
        raise NetworkError(f"{redact(url)}: unsupported kind of URL; expected one of {', '.join(SCHEMES)}")
    with_retries(f"fetching {redact(url)}", lambda: _write_checked(file, target, _chunks(url), redact(url)))


def _chunks(url: str) -> Iterator[bytes]:
    """Reads a URL: a regular file (no symbolic link or pipe), or HTTP without redirects."""
    parts = urlsplit(url)
    if parts.scheme in _HTTP:
        with _http_client() as client, client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
            answer.raise_for_status()
            yield from answer.iter_raw(CHUNK_BYTES)
        return
    if parts.scheme == "file":
        source = shared_folder.read(_local(url))
    else:
        import fsspec

        source = fsspec.open(url, "rb").open()
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


def _local(url: str) -> Path:
    """The path of a file:// URL."""
    return Path(urlsplit(url).path)


def _write(path: Path, url: str) -> None:
    """Copies a file into a store that is a folder.

    Raises:
        NetworkError: a part of the target's path is a link.
    """
    try:
        shared_folder.write(path, _local(url))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise NetworkError(f"{redact(url)}: leads through a symbolic link or a file; expected real folders") from None


def _http_client() -> Any:
    """An HTTP client with a timeout, and without redirects, which could lead out of the allowed stores."""
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # at a lower level, it logs signed URLs
    return httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False)


def _write_checked(file: File, target: Path, chunks: Iterator[bytes | memoryview], source: str) -> None:
    """Writes chunks to TARGET.part, checks size and digest, and renames the file to TARGET."""
    part, digest, size = target.with_name(f"{target.name}.part"), hashlib.sha256(), 0
    part.unlink(missing_ok=True)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with Progress(file.size, file.name) as task:
                for chunk in chunks:
                    if size + len(chunk) > file.size:
                        raise DamagedError(f"{source}: {file.name} has more than the announced {file.size} bytes")
                    digest.update(chunk)
                    write_all(descriptor, chunk, size)
                    size += len(chunk)
                    task.update(len(chunk))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if size != file.size or digest.hexdigest() != file.sha256:
            raise DamagedError(
                f"{source}: {file.name} has {size} bytes with SHA-256 {digest.hexdigest()[:16]}, expected {file.size} "
                f"with {file.sha256[:16]}; it is damaged or incomplete"
            )
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def put(path: Path, url: str) -> File:
    """Uploads a file to a slot of a job; returns its entry for a message.

    Raises:
        NetworkError: the file cannot be uploaded.
    """
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(file_digest, path)
        with_retries(f"uploading {path.name} to {redact(url)}", lambda: _put(path, url))
        return File(path.name, path.stat().st_size, digest.result())


def _put(path: Path, url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme in _HTTP:
        with _http_client() as client, path.open("rb") as content:
            headers = {"Content-Length": str(path.stat().st_size)}
            answer = client.put(url, content=iter(lambda: content.read(CHUNK_BYTES), b""), headers=headers)
            answer.raise_for_status()
    elif scheme == "file":
        _write(path, url)
    else:
        _filesystem(scheme).put_file(str(path), url)


def file_entry(path: Path) -> File:
    """The entry for a file that is sent inside the message."""
    return File(path.name, path.stat().st_size, file_digest(path))


def with_retries(what: str, once: Callable[[], T]) -> T:
    """Calls `once`, at most `MAX_ATTEMPTS` times, and converts the errors of file systems to those of this package.

    Args:
        what: what is being done, for error messages.
        once: the operation.

    Raises:
        DamagedError: a file is missing, or differs from what was signed.
        NetworkError: the operation failed.
        OSError: the local disk is full or faulty.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return once()
        except NetworkError:
            raise
        except Exception as error:  # each file system library raises its own errors
            if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                raise
            if isinstance(error, FileNotFoundError) or _status(error) == 404:
                raise DamagedError(f"{what}: the file is missing") from None
            if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
                raise DamagedError(f"{what}: not a regular file") from None
            if attempt == MAX_ATTEMPTS or isinstance(error, PermissionError) or _status(error) in (400, 401, 403):
                raise NetworkError(f"{what}: {_reason(error)}") from None
        time.sleep(attempt)
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    """The HTTP status of an error, if it has one."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}{f' {_status(error)}' if _status(error) else ''}"
