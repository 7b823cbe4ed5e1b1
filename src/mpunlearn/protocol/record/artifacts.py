"""The files of a copy, an update or a model, by digest.

An artifact is a directory. Its digest is that of the list of its files, each with its SHA-256, so a verifier can name the
file that differs, and any tool that computes SHA-256 can check one file alone.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mpunlearn.errors import SchemaError
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.record.canonical import digest
from mpunlearn.storage import MANIFEST, Place, StorePath, pieces, size_of, write_manifest

EVENT_FILE = "event.json"
"""The event that produced an artifact, inside its directory."""
_NAME = re.compile(r"[^\x00-\x1f/\\]{1,255}")


@dataclass(frozen=True)
class FileDigest:
    """One file of an artifact."""

    name: str
    sha256: str

    def __post_init__(self) -> None:
        if not (_NAME.fullmatch(self.name) and HEX.fullmatch(self.sha256)):
            raise SchemaError(f"expected the name of a file and its SHA-256, found {self.name!r:.40}")


def file_digests(paths: Iterable[Place], known: Mapping[str, str] | None = None) -> list[FileDigest]:
    """The digests of files, by name; several files are read at once.

    Args:
        paths: the files.
        known: SHA-256 of those that need not be read, by name, since it was computed when they were read or written.
    """
    ordered, before = sorted(paths, key=lambda path: path.name), known or {}

    def of(path: Place) -> FileDigest:
        return FileDigest(path.name, before.get(path.name) or sha256_of(path))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(of, ordered))


def sha256_of(path: Place) -> str:
    """SHA-256 (hex) of a file on the disk or in a store."""
    total = hashlib.sha256()
    for piece in pieces(path, 0, size_of(path)):
        total.update(piece)
    return total.hexdigest()


def artifact_files(folder: Place) -> list[Place]:
    """The files of an artifact's directory, without the event and without hidden files, such as a half-written event."""
    found = (path for path in folder.iterdir() if path.is_file()) if isinstance(folder, Path) else folder.iterdir()
    return [path for path in found if path.name not in (EVENT_FILE, MANIFEST) and path.name[0] != "."]


def complete(folder: Place, known: Mapping[str, str]) -> None:
    """Writes the manifest of an artifact in a store, with the event, once all its files are there; on a disk, does nothing.

    Args:
        folder: the artifact's directory.
        known: as for `file_digests`.
    """
    if isinstance(folder, StorePath):
        files = file_digests([*artifact_files(folder), folder / EVENT_FILE], known)
        write_manifest(folder, {file.name: file.sha256 for file in files})


def artifact_digest(files: Iterable[FileDigest]) -> str:
    """SHA-256 (hex) over the list of an artifact's files."""
    return digest([asdict(file) for file in sorted(files, key=lambda file: file.name)])
