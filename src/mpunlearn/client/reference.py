"""What the client keeps between the rounds of a run, and while it trains.

    MEMORY/copy-K.json        log-likelihoods of the examples under the published copy of round 1, for NPO, DPO and AltPO
    MEMORY/copy-K/            that copy itself, for objectives that use its logits or hidden states
    MEMORY/copy-K.training/   the checkpoint of a training that is in progress
    MEMORY/losses.jsonl       what happened to the losses, one line per training

The reference model of a run is always the published copy of round 1, never the server's own model.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mpunlearn.checkpoint import checkpoint_files
from mpunlearn.errors import CheckpointError, DataError, FileError, MPUError, SchemaError
from mpunlearn.files import new_directory
from mpunlearn.lm.processes import is_main
from mpunlearn.protocol.exchange import Card
from mpunlearn.schema import read, write


@dataclass(frozen=True)
class ReferenceNLL:
    """Negative log-likelihoods under the reference model, in nats: the content of MEMORY/copy-K.json, without its label."""

    forget_nll: list[float] = field(default_factory=list)
    """Of each forget example."""
    alternate_nll: list[list[float]] = field(default_factory=list)
    """Of each alternate answer of each forget example."""


@dataclass(frozen=True)
class _Entry:
    """MEMORY/copy-K.json."""

    run: str
    round: int
    copy: int
    copies: int
    examples: str
    """SHA-256 of the tokenized examples."""
    forget_nll: list[float]
    alternate_nll: list[list[float]]
    format: int = 1


class ReferenceCache:
    """What the client keeps of one copy of round 1.

    Args:
        memory: the client's own directory.
        card: of the current copy; its number says which copy of round 1 is its reference.
    """

    def __init__(self, memory: Path, card: Card) -> None:
        self._memory, self._card = memory, card
        self._file = memory / f"copy-{card.copy}.json"
        self.checkpoint = memory / f"copy-{card.copy}"
        """The copy of round 1, if it was kept."""
        self.training_folder = memory / f"copy-{card.copy}.training"
        """For the checkpoint of a training that is in progress."""

    def load(self, examples: str) -> ReferenceNLL | None:
        """The log-likelihoods that were kept, or None if none were.

        Args:
            examples: digest of the examples that they should belong to.

        Raises:
            DataError: the file is damaged, or belongs to another run or other examples.
        """
        if not self._file.is_file():
            return None
        try:
            entry = read(_Entry, self._file)
        except (FileError, SchemaError) as error:
            raise DataError(f"{error}; restore the file, or begin the run again") from error
        if (entry.run, entry.examples) != (self._card.run, examples):
            raise DataError(
                f"{self._file}: belongs to another run, another forget set or another --max-length; give each run its own "
                "--memory"
            )
        return ReferenceNLL(entry.forget_nll, entry.alternate_nll)

    def save(self, examples: str, values: ReferenceNLL, copy: Path | None) -> None:
        """Keeps log-likelihoods, and the copy itself if one is given (by hard links where that is possible).

        Raises:
            DataError: the directory cannot be written.
        """
        try:
            self._memory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if copy is not None and not self.checkpoint.exists():
                with new_directory(self.checkpoint, mode=0o700) as folder:
                    for file in checkpoint_files(copy):
                        _link(file, folder / file.name)
            write(self._file, _Entry(**asdict(self._card), examples=examples, **asdict(values)))
        except (OSError, FileError) as error:
            raise DataError(f"{self._file}: cannot be written: {error}") from error

    def record(self, history: dict[str, Any]) -> None:
        """Appends what happened to the losses to MEMORY/losses.jsonl. That file stays with the client."""
        line = {"round": self._card.round, "copy": self._card.copy, **history}
        self._memory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._memory / "losses.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class _Fingerprint:
    """Which training a folder belongs to."""

    fingerprint: str


class TrainingFolder:
    """The folder with the checkpoint of a training; removed when the training ends without an exception.

    It holds the fingerprint of the training, so that a different training does not go on from its checkpoint.
    """

    def __init__(self, fingerprint: str, path: Path) -> None:
        self._fingerprint, self._path = _Fingerprint(fingerprint), path

    def __enter__(self) -> Path:
        mark = self._path / "fingerprint.json"
        if is_main():
            try:
                if not mark.is_file() or read(_Fingerprint, mark) != self._fingerprint:
                    shutil.rmtree(self._path, ignore_errors=True)
                    self._path.mkdir(parents=True, mode=0o700)
                    write(mark, self._fingerprint)
            except (OSError, MPUError) as error:
                raise CheckpointError(f"{self._path}: cannot be written: {error}") from error
        return self._path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_main() and (kind is None or not (self._path / "checkpoint.pt").exists()):
            shutil.rmtree(self._path, ignore_errors=True)
