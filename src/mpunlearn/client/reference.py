"""The client's memory: what it must remember between the rounds of a run, and while it trains.

MEMORY/copy-K.json holds the log-likelihoods that the copy of round 1 gave the examples, MEMORY/copy-K that copy where an
objective takes its logits, MEMORY/copy-K.training the checkpoints of a training that is under way.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import checkpoint_files
from mpunlearn.errors import CheckpointError, DataError, MPUError
from mpunlearn.files import new_directory, read_json, write_json
from mpunlearn.lm.processes import is_main
from mpunlearn.protocol.exchange import Card


class ReferenceCache:
    """What the client keeps of its copy of round 1: MEMORY/copy-K.json, and MEMORY/copy-K where the copy itself is needed."""

    def __init__(self, memory: Path, card: Card) -> None:
        self._memory, self._card = memory, card
        self._file = memory / f"copy-{card.copy}.json"
        self.checkpoint = memory / f"copy-{card.copy}"

    @property
    def training_folder(self) -> Path:
        """For checkpoints of a training that is under way."""
        return self._memory / f"copy-{self._card.copy}.training"

    def recall(self, examples: str) -> dict[str, Any] | None:
        """The log-likelihoods that were kept, or None if nothing was.

        Args:
            examples: digest of the examples that they should be of.

        Raises:
            DataError: the file is damaged, or belongs to another run or other examples.
        """
        if not self._file.is_file():
            return None
        try:
            found = read_json(self._file)
            same = found["run"] == self._card.run and found["examples"] == examples
            values = {
                "forget_nll": [float(value) for value in found["forget_nll"]],
                "alternate_nll": [[float(value) for value in row] for row in found["alternate_nll"]],
            }
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._file}: not a memory of round 1 ({error}); restore it, or begin the run anew"
            ) from error
        if not same:
            raise DataError(
                f"{self._file}: belongs to another run, another forget set or another --max-length; give each run its own "
                "--memory"
            )
        return values

    def remember(self, examples: str, values: Mapping[str, Any], copy: Path | None) -> None:
        """Keeps log-likelihoods, and the copy itself (by hard links where that is possible)."""
        try:
            self._memory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if copy is not None and not self.checkpoint.exists():
                with new_directory(self.checkpoint, mode=0o700) as folder:
                    for file in checkpoint_files(copy):
                        _link(file, folder / file.name)
            write_json(self._file, {**asdict(self._card), "examples": examples, **values}, mode=0o600)
        except OSError as error:
            raise DataError(f"{self._file}: cannot be written: {error.strerror}") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class TrainingFolder:
    """The folder of a training's checkpoints, removed when the training has ended well.

    It holds the fingerprint of the training: one that a different training left behind is cleared first.
    """

    def __init__(self, fingerprint: str, kept: ReferenceCache | None, out: Path) -> None:
        self._fingerprint = {"fingerprint": fingerprint}
        self._path = kept.training_folder if kept is not None else out.parent / f".{out.name}.training"

    def __enter__(self) -> Path:
        mark = self._path / "fingerprint.json"
        if is_main():
            try:
                if not mark.is_file() or read_json(mark) != self._fingerprint:
                    shutil.rmtree(self._path, ignore_errors=True)
                    self._path.mkdir(parents=True, mode=0o700)
                    write_json(mark, self._fingerprint)
            except (OSError, MPUError) as error:
                raise CheckpointError(f"{self._path}: cannot be written: {error}") from error
        return self._path

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if is_main() and (kind is None or not any(self._path.glob("checkpoint-*"))):
            shutil.rmtree(self._path, ignore_errors=True)
