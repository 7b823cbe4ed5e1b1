"""The files of a copy, an update or a model, by digest.

An artifact is a directory. Its digest is that of the list of its files, each with its SHA-256, so a verifier can name the
file that differs, and any tool that computes SHA-256 can check one file alone.
"""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mpunlearn.errors import SchemaError
from mpunlearn.files import file_digest
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.record.canonical import digest

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


def file_digests(paths: Iterable[Path]) -> list[FileDigest]:
    """The digests of files, by name; several files are read at once."""
    ordered = sorted(paths, key=lambda path: path.name)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [
            FileDigest(path.name, sha256) for path, sha256 in zip(ordered, pool.map(file_digest, ordered), strict=True)
        ]


def artifact_files(folder: Path) -> list[Path]:
    """The files of an artifact's directory, without the event and without hidden files, such as a half-written event."""
    return [path for path in folder.iterdir() if path.is_file() and path.name != EVENT_FILE and path.name[0] != "."]


def artifact_digest(files: Iterable[FileDigest]) -> str:
    """SHA-256 (hex) over the list of an artifact's files."""
    return digest([asdict(file) for file in sorted(files, key=lambda file: file.name)])
