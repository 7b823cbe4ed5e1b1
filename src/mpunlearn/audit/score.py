"""How close an attack's estimate comes to a model.

The idea: an estimate may be in coordinates of its own, so it is first aligned to the model (`alignment`). That is fair
to the attacker, who loses nothing by not knowing the coordinates: models that differ by such a map are the same
function. The scorer knows θ, the attacker does not.

Not covered: how close the two are as functions (see `behavior`).
"""

import dataclasses
from dataclasses import dataclass

from mpunlearn.audit.alignment import Alignment, align
from mpunlearn.audit.weights import Model, norm


@dataclass(frozen=True)
class Score:
    """The distance between an estimate and a model."""

    error: float
    """‖estimate - θ‖ / ‖θ‖ over all weights, after alignment to θ."""
    equal_bfloat16: float
    """Share of weights that equal those of θ if both are rounded to bfloat16."""
    equal_float32: float
    """Share of weights that equal those of θ if both are rounded to float32."""
    exposed: str
    """The matrix with the largest share of weights that equal those of θ in bfloat16."""
    exposed_bfloat16: float
    """That share."""
    task_error: float | None = None
    """‖estimate - θ‖ / ‖θ - θ_base‖, if there is a public base that differs from θ."""

    def to_json(self) -> dict[str, str | float | None]:
        """The score as JSON."""
        return dataclasses.asdict(self)


def score(theta: Model, estimate: Model, base: Model | None = None, *, in_place: bool = False) -> Score:
    """Aligns an estimate to a model and compares them, weight by weight.

    Args:
        theta: the server's model.
        estimate: a model of the same architecture, in any coordinates.
        base: the public model that θ was fine-tuned from.
        in_place: whether the estimate is in the coordinates of θ already. It is not aligned then, so that rotations
            do not move it off its grid.
    """
    aligned = Alignment(theta.architecture) if in_place else align(theta, estimate)
    squares = bfloat16 = float32 = entries = 0.0
    exposed, share = "", -1.0
    for name, value in theta.weights.items():
        found = aligned.tensor(estimate, name)
        squares += float((found - value.double()).square().sum())
        equal = int((found.bfloat16() == value.bfloat16()).sum())
        if value.dim() == 2 and equal / value.numel() > share:
            exposed, share = name, equal / value.numel()
        bfloat16 += equal
        float32 += int((found.float() == value.float()).sum())
        entries += value.numel()
    task = 0.0
    if base is not None:
        task = norm(value.double() - base.weights[name].double() for name, value in theta.weights.items())
    return Score(
        squares**0.5 / norm(theta.weights.values()),
        bfloat16 / entries,
        float32 / entries,
        exposed,
        share,
        squares**0.5 / task if task else None,
    )
