"""The client's memory folder: what it keeps between the rounds of a run, and while it trains.

    MEMORY/copy-K.json        log-likelihoods of the examples under copy K of round 1, for NPO, DPO and AltPO
    MEMORY/copy-K/            that copy itself, for objectives that use its logits or hidden states
    MEMORY/copy-K.training/   checkpoint of a training that is in progress
    MEMORY/retain.jsonl       the examples of `--retain auto`
    MEMORY/alternates.jsonl   the alternate answers of `--alternates generate`
    MEMORY/losses.jsonl       losses, one line per training

The server publishes several noisy copies of its model in every round. The reference model for copy K of any round is
copy K of round 1, never the server's own model.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mpunlearn.checkpoint import checkpoint_files
from mpunlearn.client.saving import has_checkpoint
from mpunlearn.errors import CheckpointError, DataError, FileError, MPUError, SchemaError
from mpunlearn.files import new_directory
from mpunlearn.lm.processes import all_or_none, is_main
from mpunlearn.protocol.exchange import Card
from mpunlearn.schema import read, write


@dataclass(frozen=True)
class ReferenceNLL:
    """Negative log-likelihoods under the reference model, in nats."""

    forget_nll: list[float] = field(default_factory=list)
    """One value per forget example."""
    alternate_nll: list[list[float]] = field(default_factory=list)
    """For each forget example, one value per alternate answer."""


@dataclass(frozen=True)
class _Entry:
    """The content of MEMORY/copy-K.json."""

    run: str
    round: int
    copy: int
    copies: int
    examples: str
    """SHA-256 (hex) of the tokenized examples."""
    forget_nll: list[float]
    alternate_nll: list[list[float]]
    format: int = 1


class ReferenceCache:
    """What the client keeps from one copy of round 1.

    Args:
        memory: the client's memory folder.
        card: run, round and number of the current copy. The copy of round 1 with the same number is its reference.
    """

    def __init__(self, memory: Path, card: Card) -> None:
        self._memory, self._card = memory, card
        self._file = memory / f"copy-{card.copy}.json"
        self.checkpoint = memory / f"copy-{card.copy}"
        """Folder of the copy of round 1, if it was stored."""
        self.training_folder = memory / f"copy-{card.copy}.training"
        """Folder for the checkpoint of a training that is in progress."""

    def load(self, examples: str) -> ReferenceNLL | None:
        """The stored log-likelihoods, or None if there are none.

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
            raise DataError(f"{error}; restore the file, or start a new run") from error
        if (entry.run, entry.examples) != (self._card.run, examples):
            raise DataError(
                f"{self._file}: belongs to another run, another forget set or another --max-length; give each run its "
                "own --memory"
            )
        return ReferenceNLL(entry.forget_nll, entry.alternate_nll)

    def save(self, examples: str, values: ReferenceNLL, copy: Path | None) -> None:
        """Stores log-likelihoods, and the copy itself if one is given (as hard links where possible).

        Raises:
            DataError: the folder cannot be written.
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
        """Appends the losses of a training to MEMORY/losses.jsonl, which is never sent to the server."""
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
    """Identifies the training that a folder belongs to."""

    fingerprint: str


class TrainingFolder:
    """A context manager for the folder that holds the checkpoint of a training.

    The folder stores the training's fingerprint, so that a different training does not resume from its checkpoint. It
    is removed when the training succeeds, or fails before it has saved a checkpoint.
    """

    def __init__(self, fingerprint: str, path: Path) -> None:
        self._fingerprint, self._path = _Fingerprint(fingerprint), path

    def __enter__(self) -> Path:
        with all_or_none():
            if is_main():
                self._prepare(self._path / "fingerprint.json")
        return self._path

    def _prepare(self, file: Path) -> None:
        try:
            if not file.is_file() or read(_Fingerprint, file) != self._fingerprint:
                shutil.rmtree(self._path, ignore_errors=True)
                self._path.mkdir(parents=True, mode=0o700)
                write(file, self._fingerprint)
        except (OSError, MPUError) as error:
            raise CheckpointError(f"{self._path}: cannot be written: {error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_main() and (kind is None or not has_checkpoint(self._path)):
            shutil.rmtree(self._path, ignore_errors=True)
