"""The server's part of a run, as steps that can be repeated after an interruption.

    FOLDER/state            the secret state
    FOLDER/round-1 …        θ between rounds, in float32
    FINAL                   θ after the last round, in the dtypes of the original checkpoint

Each step checks which files exist and does what is missing, so no separate journal is needed.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.progress import say
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.postprocess import aggregate
from mpunlearn.server.preprocess import publish
from mpunlearn.server.state import ServerState


@dataclass(frozen=True)
class Rounds:
    """The models of a run, and the steps from one to the next."""

    plan: RunPlan
    folder: Path
    """The server's private directory."""
    final: Path
    """Path of the final model."""

    @property
    def state(self) -> Path:
        """Directory of the secret state."""
        return self.folder / "state"

    @property
    def identity(self) -> Path:
        """File of the server's key, which signs the record."""
        return self.folder / "identity.key"

    def theta(self, number: int) -> Path:
        """Path of the model after round `number`; round 0 is the original model."""
        if number == 0:
            return Path(self.plan.checkpoint)
        return self.final if number == self.plan.rounds else self.folder / f"round-{number}"

    def closed(self, number: int) -> bool:
        """Whether the updates of a round have been aggregated."""
        rounds = ServerState(self.state).rounds if self.state.exists() else []
        return any(record.closed for record in rounds[number - 1 : number])

    def extend(self) -> None:
        """Makes the final model of a run that was to have fewer rounds the model that its next round starts from.

        Between rounds, θ is stored in float32, but a final model has the dtypes of the original checkpoint. So the result
        is the same as with more rounds from the start only for a float32 model; any other was rounded once.
        """
        done = sum(record.closed for record in ServerState(self.state).rounds) if self.state.exists() else 0
        if 0 < done < self.plan.rounds and self.final.is_dir() and not self.theta(done).exists():
            say(f"going on after round {done} from the final model, in the dtypes that it is stored in")
            self.final.rename(self.theta(done))

    def publish(self, number: int, out: Path) -> None:
        """Publishes the copies of a round, unless they already exist."""
        plan = self.folder / "plan.json"
        if not out.exists():
            publish(
                self.theta(number - 1),
                state=self.state,
                out=out,
                base=self.plan.base,
                stand_in=self.plan.stand_in,
                lineage=self.plan.lineage,
                device=self.plan.device,
                identity=self.identity,
                perturbation=self.plan.perturbation,
                plan=plan if plan.is_file() else None,
            )

    def aggregate(self, number: int, updates: Sequence[Path], sent: Sequence[tuple[int, Path]] | None = None) -> None:
        """Aggregates the updates of all copies of a round into the next model, replacing an incomplete one.

        Args:
            number: the round.
            updates: one update per copy.
            sent: the updates that clients sent, each with its copy, if `updates` are averages of them.
        """
        shutil.rmtree(self.theta(number), ignore_errors=True)
        aggregate(
            updates,
            state=self.state,
            out=self.theta(number),
            eta=self.plan.eta,
            checkpoint=self.theta(number - 1),
            dtype=None if number == self.plan.rounds else "float32",
            device=self.plan.device,
            identity=self.identity,
            sent=sent,
        )

    def tidy(self, number: int) -> None:
        """Removes the model that a closed round started from, unless it is the original one."""
        if number > 1:
            shutil.rmtree(self.theta(number - 1), ignore_errors=True)
