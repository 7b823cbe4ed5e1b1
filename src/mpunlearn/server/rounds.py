"""The server's part of a run, round by round, in steps that may each be repeated after an interruption.

    FOLDER/state            the secret state
    FOLDER/round-1 …        θ between rounds, in float32
    FINAL                   θ after the last, in the dtypes of the checkpoint

A step looks at what is there and does what is missing, so the tree is its own journal.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.state import ServerState


@dataclass(frozen=True)
class Rounds:
    """Where a run's models lie, and what makes one from the other."""

    folder: Path
    final: Path
    checkpoint: Path
    base: Path | None
    rounds: int
    eta: float
    device: str
    perturbation: Perturbation

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def theta(self, number: int) -> Path:
        """Where the model after round `number` lies; 0 is the model that was given."""
        if number == 0:
            return self.checkpoint
        return self.final if number == self.rounds else self.folder / f"round-{number}"

    def closed(self, number: int) -> bool:
        """Whether that round's updates have been aggregated."""
        rounds = ServerState(self.state).rounds if self.state.exists() else []
        return any(record.closed for record in rounds[number - 1 : number])

    def publish(self, number: int, out: Path) -> None:
        """Publishes the copies of a round, unless they are there."""
        if not out.exists():
            preprocess(
                self.theta(number - 1),
                state=self.state,
                out=out,
                base=self.base,
                device=self.device,
                perturbation=self.perturbation,
            )

    def aggregate(self, number: int, updates: Sequence[Path]) -> None:
        """Makes the model after a round from the updates of all its copies; what an interruption left of it goes first."""
        shutil.rmtree(self.theta(number), ignore_errors=True)
        postprocess(
            updates,
            state=self.state,
            out=self.theta(number),
            eta=self.eta,
            checkpoint=self.theta(number - 1),
            dtype=None if number == self.rounds else "float32",
            device=self.device,
        )

    def tidy(self, number: int) -> None:
        """Removes the model before a closed round; the one that was given stays."""
        if number > 1:
            shutil.rmtree(self.theta(number - 1), ignore_errors=True)
