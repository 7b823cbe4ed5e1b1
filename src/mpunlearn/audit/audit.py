"""Audit: attacks the published copies of a round, and measures how close each attack comes to the server's model.

The idea: what a copy hides is not what its noise level says, but what the best attack leaves. So the server attacks its
own copies with what a client has, and scores each result against θ, which only the server has. Attacks are functions
(`audit.attacks`), and their arguments are all that they see.

Not covered: attacks that start from a public base model, from copies of several rounds, from rounding or from training
a copy further, and what a copy discloses as a function. What no attack found here may still be found by a better one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import PlanError
from mpunlearn.files import as_path
from mpunlearn.tables import aligned

if TYPE_CHECKING:
    from mpunlearn.audit.score import Score

ONE = "one copy, aligned"
TOLERANCE = 0.05
"""How far below an announced floor an error may be, relative to the floor."""
CONCLUSIVE = 0.5
"""From this error on, alignment may have failed, so that the error says nothing about better attacks."""


@dataclass(frozen=True)
class Audit:
    """What a client that holds some copies of a round learns of the server's model."""

    model: str
    held: int
    """Number of copies that the attacker holds."""
    attacks: "Mapping[str, Score]"
    """Name of the attack → its result."""
    floor: float | None = None
    """The relative parameter error that should remain, if one was announced."""

    @property
    def strongest(self) -> str:
        """The attack with the smallest parameter error."""
        return min(self.attacks, key=lambda name: self.attacks[name].error)

    @property
    def holds(self) -> bool | None:
        """Whether every attack left at least the floor, up to `TOLERANCE`; None without a floor, or if none can tell."""
        error = self.attacks[self.strongest].error
        return None if self.floor is None or error >= CONCLUSIVE else error >= (1 - TOLERANCE) * self.floor

    def text(self) -> str:
        """A table of the attacks, and the conclusion."""
        rows = [
            (name, f"{score.error:.2g}", f"{score.equal_bfloat16:.1%}", f"{score.equal_float32:.1%}")
            for name, score in self.attacks.items()
        ]
        copies = "1 copy" if self.held == 1 else f"{self.held} copies"
        lines = [
            f"{self.model}: attacked from {copies}",
            aligned(("attack", "parameter error", "equal in bfloat16", "equal in float32"), rows),
            f"The strongest attack leaves a parameter error of {self.attacks[self.strongest].error:.2g} of the weights' norm.",
        ]
        if self.attacks[self.strongest].error >= CONCLUSIVE:
            lines.append("The copies could probably not be aligned: this says nothing about better attacks.")
        elif self.floor is not None:
            lines.append(f"The announced floor of {self.floor:.2g} {'holds' if self.holds else 'does not hold'}.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "model": self.model,
            "copies": self.held,
            "attacks": {name: score.to_json() for name, score in self.attacks.items()},
            "strongest": self.strongest,
            "floor": self.floor,
            "holds": self.holds,
        }


def audit(*, model: str | Path, copies: Sequence[str | Path], floor: float | None = None) -> Audit:
    """Attacks the published copies of one round and compares the results with the server's model.

    The attacks see nothing but the copies. All models are held in memory in float32. Every result is aligned to the
    model before it is compared, since a model in other coordinates is the same function.

    Args:
        model: The server's model, a Hugging Face checkpoint directory, which the copies were published from.
        copies: The published copies that the attacker holds, all of one round.
        floor: The relative parameter error that should remain, such as 0.1. The audit then says whether it does.

    Returns:
        The error that each attack leaves, and the share of weights that it restores exactly.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        PlanError: The checkpoints are not of one architecture, a copy is missing or given twice, or `floor` is negative.
    """
    from mpunlearn.audit.attacks.cancel import cancel
    from mpunlearn.audit.score import score
    from mpunlearn.audit.weights import Model, check_alike

    if floor is not None and not (0 <= floor < math.inf):
        raise PlanError(f"--floor: expected a number of at least 0, found {floor:g}")
    paths = [as_path(copy, "--copies") for copy in copies]
    if not paths:
        raise PlanError("--copies: expected at least one copy, found none")
    if len({path.resolve() for path in paths}) < len(paths):
        raise PlanError("--copies: a copy is given twice; give each copy of the round once")
    source = as_path(model, "--model")
    theta, held = Model.read(source), [Model.read(path) for path in paths]
    check_alike({str(source): theta, **{str(path): copy for path, copy in zip(paths, held, strict=True)}})
    scores = {ONE: min((score(theta, copy) for copy in held), key=lambda found: found.error)}
    if len(held) > 1:
        for name, estimate in cancel(held).items():
            scores[f"all copies, {name}"] = score(theta, estimate)
    return Audit(str(source), len(held), scores, floor)
