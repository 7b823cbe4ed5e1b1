"""Files by reference: a store that the server owns, and how either party fetches from it and puts into it.

The idea: a message says what a file is (size, SHA-256) and where it lies (a URL); whoever fetches it writes a `.part` beside
the target, checks both, and renames, so that what has its name is whole and is what was signed. Never more than the announced
size is read. The store is any folder or bucket that `fsspec` knows. Where it can sign URLs (S3), the client gets signed URLs
for exactly its files and needs no account; URLs are never logged with their signature.

A client puts an update into numbered *slots*, URLs that the job allots: it cannot choose where the server's files lie, and the
server fetches from the slots that it allotted, not from where a result says.
"""

import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mpunlearn.errors import DamagedError, NetworkError, PlanError
from mpunlearn.files import file_digest, write_all
from mpunlearn.progress import bar
from mpunlearn.protocol.messages import File

CHUNK = 1 << 20
MAX_ATTEMPTS = 3
"""How often a transfer is tried before it has failed."""
MAX_SIGNATURE_SECONDS = 7 * 86400.0
"""Seconds that S3 lets a signed URL hold."""
SCHEMES = ("file", "s3", "https", "http")
SILENCE = 120.0
"""Seconds without a byte after which an HTTP transfer has failed."""
_HTTP = ("https", "http")
_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
T = TypeVar("T")


class Store:
    """Where the server puts copies and receives updates.

    Args:
        url: a folder (file:///… or a path) or a bucket (s3://BUCKET/PREFIX) that both parties reach.
        lasts: seconds that signed URLs hold.

    Raises:
        PlanError: no store of that kind is known, or its library is not installed.
    """

    def __init__(self, url: str, lasts: float = MAX_SIGNATURE_SECONDS) -> None:
        self._url = url if "://" in url else f"file://{Path(url).resolve()}"
        self.lasts = int(min(lasts, MAX_SIGNATURE_SECONDS))
        """Seconds that its signed URLs hold."""
        scheme = urlsplit(self._url).scheme
        if scheme not in ("file", "s3"):
            raise PlanError(f"--store {url}: expected a folder or s3://BUCKET/PREFIX")
        if self._url != f"{scheme}://{urlsplit(self._url).netloc}{urlsplit(self._url).path}":
            raise PlanError(f"--store {url}: expected a name without ?, # and line breaks")
        self._fs = _filesystem(scheme)
        self._signs = scheme == "s3"

    def put(self, path: Path, key: str) -> File:
        """Puts a file there; as a message names it, with the URL under which a client gets it."""
        target = self._at(key)

        def once() -> str:
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), target)
            return str(self._fs.url(target, expires=self.lasts)) if self._signs else target

        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(file_digest, path)
            url = _tried(f"putting {path.name} to {target}", once)
            return File(path.name, path.stat().st_size, digest.result(), url)

    def slot(self, key: str) -> str:
        """The URL that a client may put one file to."""
        target = self._at(key)
        if not self._signs:
            return target
        sign = partial(self._fs.url, target, expires=self.lasts, client_method="put_object")
        return str(_tried(f"signing {target}", sign))

    def fetch(self, key: str, file: File, target: Path) -> None:
        """Fetches what was put into a slot."""
        fetch(self._at(key), file, target)

    def remove(self, key: str) -> None:
        """Removes everything below a key; nothing there is no error."""
        target = self._at(key)
        _tried(f"removing {target}", lambda: self._fs.exists(target) and self._fs.rm(target, recursive=True))

    def _at(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"


def _filesystem(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, **({"skip_instance_cache": True} if scheme == "s3" else {}))
    except ImportError as error:
        raise PlanError(f"--store {scheme}://: needs another library; pip install 'mpunlearn[{scheme}]'") from error


def shown(url: str) -> str:
    """A URL without the signature and the password that it may carry."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def receive(file: File, payload: memoryview | None, target: Path) -> None:
    """Writes one file of a message, from the message itself or from where it lies.

    Raises:
        NetworkError: as for `fetch`.
    """
    if payload is None:
        fetch(str(file.url), file, target)
        return
    _arrive(file, target, iter([payload]), "the message")


def fetch(url: str, file: File, target: Path) -> None:
    """Streams a URL into a file, through TARGET.part.

    Raises:
        DamagedError: it is not there, or has another size or digest than expected. Nothing is left behind.
        NetworkError: it cannot be fetched.
        OSError: this machine's own disk is full or broken.
    """
    if urlsplit(url).scheme not in SCHEMES:
        raise NetworkError(f"{shown(url)}: cannot be fetched; expected {', '.join(SCHEMES)}")
    _tried(f"fetching {shown(url)}", lambda: _arrive(file, target, _chunks(url), shown(url)))


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes behind a URL: of a regular file, not through a link or a pipe; over HTTP without redirects."""
    parts = urlsplit(url)
    if parts.scheme in _HTTP:
        with _http() as client, client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
            answer.raise_for_status()
            yield from answer.iter_raw(CHUNK)
        return
    import fsspec

    def plainly(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    with open(parts.path, "rb", opener=plainly) if parts.scheme == "file" else fsspec.open(url, "rb") as source:
        if parts.scheme == "file" and not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise DamagedError(f"{shown(url)}: is no regular file")
        while chunk := source.read(CHUNK):
            yield chunk


def _http() -> Any:
    """An HTTP client that follows no redirects, which would lead out of the allowed stores, and never waits forever."""
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log signed URLs
    return httpx.Client(timeout=SILENCE, follow_redirects=False)


def _arrive(file: File, target: Path, chunks: Iterator[bytes | memoryview], source: str) -> None:
    """Writes chunks to TARGET.part, checks size and digest, and gives it its name."""
    part, digest, size = target.with_name(f"{target.name}.part"), hashlib.sha256(), 0
    part.unlink(missing_ok=True)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with bar(file.size, file.name) as steps:
                for chunk in chunks:
                    if size + len(chunk) > file.size:
                        raise DamagedError(f"{source}: {file.name} is larger than the {file.size} bytes announced")
                    digest.update(chunk)
                    write_all(descriptor, chunk, size)
                    size += len(chunk)
                    steps.update(len(chunk))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if size != file.size or digest.hexdigest() != file.sha256:
            raise DamagedError(
                f"{source}: {file.name} has {size} bytes of SHA-256 {digest.hexdigest()[:16]}, expected {file.size} of "
                f"{file.sha256[:16]}; it is damaged or incomplete"
            )
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def put(path: Path, url: str) -> File:
    """Puts a file where a URL says, a slot of a job; as a message names it.

    Raises:
        NetworkError: it cannot be put there.
    """
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(file_digest, path)
        _tried(f"putting {path.name} to {shown(url)}", lambda: _put(path, url))
        return File(path.name, path.stat().st_size, digest.result())


def _put(path: Path, url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme in _HTTP:
        with _http() as client, path.open("rb") as content:
            headers = {"Content-Length": str(path.stat().st_size)}
            answer = client.put(url, content=iter(lambda: content.read(CHUNK), b""), headers=headers)
            answer.raise_for_status()
    elif scheme == "file":
        target = Path(urlsplit(url).path)
        if target.parent.resolve() != target.parent:
            raise NetworkError(
                f"{shown(url)}: leads through a link, to {target.parent.resolve()}; expected a real folder"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            with path.open("rb") as source, open(descriptor, "wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK)
                copy.flush()
                os.fsync(descriptor)
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
    else:
        _filesystem(scheme).put_file(str(path), url)


def file_of(path: Path) -> File:
    """A file as the message that carries it names it."""
    return File(path.name, path.stat().st_size, file_digest(path))


def _tried(what: str, once: Callable[[], T]) -> T:
    """Does something over the network, several times if need be. Whatever a file system raises becomes one error.

    Raises:
        DamagedError: what should be there is not, or is not what was signed.
        NetworkError: it cannot be done.
        OSError: this machine's own disk is full or broken.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return once()
        except NetworkError:
            raise
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, OSError) and error.errno in _OURS:
                raise
            if isinstance(error, FileNotFoundError) or _status(error) == 404:
                raise DamagedError(f"{what}: it is not there") from None
            if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
                raise DamagedError(f"{what}: it is no regular file") from None
            if attempt == MAX_ATTEMPTS or isinstance(error, PermissionError) or _status(error) in (400, 401, 403):
                raise NetworkError(f"{what}: {_reason(error)}") from None
        time.sleep(attempt)
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    """The HTTP status of an error that has one."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}{f' {_status(error)}' if _status(error) else ''}"
