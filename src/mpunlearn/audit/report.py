"""The result of an audit: one line per attack, beside what one copy, the public base and the announced floor leave.

Not covered: which result the attacker would pick. A client cannot compare with θ, but it can tell a good model from a bad
one by its loss on any text, so the strongest result counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpunlearn.tables import aligned

if TYPE_CHECKING:
    from mpunlearn.audit.behavior import Behavior
    from mpunlearn.audit.score import Score

ONE = "one copy, aligned"
ON_BASE, SHRUNK = "on the base", "shrunk"
"""Parts of the names of attacks that know more than copies: the public base, or what trained weights look like."""
CONTROL = "control: known key"
CONTROL_ERROR = 0.02
"""Largest error of the control: rounding to bfloat16 leaves about 0.002."""
TOLERANCE = 0.05
"""How far below an announced floor an error may be, relative to the floor."""
CONCLUSIVE = 0.5
"""From this error on, alignment may have failed, so that the error says nothing about better attacks."""
PREDICTIONS = ("logit-error", "kl", "agreement", "probability")
"""What `--require` can limit if there is text."""
LIMITS = (
    "parameter-error", "task-error", "equal-bfloat16", "equal-float32", "tensor-equal-bfloat16", *PREDICTIONS,
)  # fmt: skip
"""What `--require` can limit."""


@dataclass(frozen=True)
class Audit:
    """What a client that holds some copies learns of the server's model."""

    model: str
    held: int
    """Number of copies that the attacker holds."""
    attacks: "Mapping[str, Score]"
    """Name of the attack → its result."""
    floor: float | None = None
    """The relative parameter error that should remain, if one was announced."""
    baselines: "Mapping[str, Score]" = field(default_factory=dict)
    """The public base, and the control; not attacks that count."""
    behaviors: "Mapping[str, Behavior]" = field(default_factory=dict)
    """Name of an attack or baseline → its predictions, if text was given."""
    rounds: int = 1
    """Number of rounds that the copies are from."""

    @property
    def strongest(self) -> str:
        """The attack with the smallest parameter error."""
        return min(self.attacks, key=lambda name: self.attacks[name].error)

    @property
    def holds(self) -> bool | None:
        """Whether every attack that averages copies left at least the floor, up to `TOLERANCE`.

        None without a floor, or if the copies could not be aligned.
        """
        error = min(score.error for name, score in self.attacks.items() if ON_BASE not in name and SHRUNK not in name)
        return None if self.floor is None or error >= CONCLUSIVE else error >= (1 - TOLERANCE) * self.floor

    @property
    def trusted(self) -> bool:
        """Whether the control succeeded, if there is one."""
        return CONTROL not in self.baselines or self.baselines[CONTROL].error <= CONTROL_ERROR

    def values(self) -> dict[str, float]:
        """What `--require` limits: of each number, the one of all attacks that is the worst for the server."""
        scores = list(self.attacks.values())
        found = {
            "parameter-error": min(score.error for score in scores),
            "equal-bfloat16": max(score.equal_bfloat16 for score in scores),
            "equal-float32": max(score.equal_float32 for score in scores),
            "tensor-equal-bfloat16": max(score.exposed_bfloat16 for score in scores),
        }
        if task := [score.task_error for score in scores if score.task_error is not None]:
            found["task-error"] = min(task)
        if behaviors := [value for name, value in self.behaviors.items() if name not in self.baselines]:
            found["logit-error"] = min(value.logit_error for value in behaviors)
            found["kl"] = min(value.kl for value in behaviors)
            found["agreement"] = max(value.agreement for value in behaviors)
            found["probability"] = max(value.probability for value in behaviors)
        return found

    def text(self) -> str:
        """A table of the attacks, and the conclusion."""
        copies = "1 copy" if self.held == 1 else f"{self.held} copies"
        rounds = "" if self.rounds == 1 else f" of {self.rounds} rounds"
        lines = [f"{self.model}: attacked from {copies}{rounds}", self._table()]
        if self.behaviors:
            lines += ["", self._behavior_table(), ""]
        error = self.attacks[self.strongest].error
        lines.append(f"The strongest attack leaves a parameter error of {error:.2g} of the weights' norm.")
        worst = max(self.attacks.values(), key=lambda score: score.exposed_bfloat16)
        lines.append(f"Most exposed matrix: {worst.exposed}, {worst.exposed_bfloat16:.1%} equal in bfloat16.")
        if error >= CONCLUSIVE:
            lines.append("The copies could probably not be aligned: this says nothing about better attacks.")
        elif self.floor is not None:
            verdict = "holds" if self.holds else "does not hold"
            beyond = error < (1 - TOLERANCE) * self.floor and self.holds
            more = "; attacks that know more than copies go below it" if beyond else ""
            lines.append(f"The announced floor of {self.floor:.2g} {verdict} for attacks that average copies{more}.")
        if not self.trusted:
            lines.append("The control failed: the copies are not those of this state, so do not trust this audit.")
        return "\n".join(lines)

    def _table(self) -> str:
        scores = {**self.attacks, **self.baselines}
        with_task = any(score.task_error is not None for score in scores.values())
        header = ["attack", "parameter error", "equal in bfloat16", "equal in float32"]
        rows = []
        for name, score in scores.items():
            row = [name, f"{score.error:.2g}", f"{score.equal_bfloat16:.1%}", f"{score.equal_float32:.1%}"]
            if with_task:
                row.append("" if score.task_error is None else f"{score.task_error:.2g}")
            rows.append(row)
        return aligned([*header, *(["of the task vector"] if with_task else [])], rows)

    def _behavior_table(self) -> str:
        header = ("as a function", "logit error", "KL, nats a token", "same next token", "probability of answers")
        rows = [
            (name, f"{of.logit_error:.2g}", f"{of.kl:.2g}", f"{of.agreement:.1%}", f"{of.probability:.3f}")
            for name, of in self.behaviors.items()
        ]
        return aligned(header, rows)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "model": self.model,
            "copies": self.held,
            "rounds": self.rounds,
            "attacks": {name: score.to_json() for name, score in self.attacks.items()},
            "baselines": {name: score.to_json() for name, score in self.baselines.items()},
            "behaviors": {name: value.to_json() for name, value in self.behaviors.items()},
            "strongest": self.strongest,
            "floor": self.floor,
            "holds": self.holds,
            "trusted": self.trusted,
        }
