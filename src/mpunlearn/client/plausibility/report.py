"""What the checks of a copy measure, and which values are allowed.

The limits were chosen on honest models: small models of all 13 families with random weights, trained models of the
built-in benchmark, and their copies with noise of up to 30 % of the weights, all of which have no idle neurons, at most
0.4 % single ones, no duplicates, row norms below 3 and an effective rank above 10. The planted copies in the tests
exceed several limits each, by factors of 2 to 50. Not covered: large models, which could not be measured; a limit that
turns out too narrow for one can be widened in policy.toml.
"""

import math
from dataclasses import dataclass

from mpunlearn.errors import PlanError
from mpunlearn.schema import explained


@dataclass(frozen=True)
class Measured:
    """One value that was measured on a copy."""

    check: str
    """A check: a field of `Limits`, "finite" or "above_base_retain"."""
    value: float
    where: str
    """The tensor or the text that it was measured on."""


@dataclass(frozen=True)
class Limits:
    """What a copy has to meet before the client trains on it: the table [plausibility] of policy.toml.

    Raises:
        PlanError: a limit is not a number.
    """

    row_norm: float = explained(
        30.0, "Largest norm of a row or column of a weight, relative to the median. Sharp thresholds need large rows."
    )
    rank: float = explained(
        2.0, "Least effective rank of a weight in the layers. Rows that all measure the same quantity have rank 1."
    )
    duplicates: float = explained(
        0.05, "Largest share of FFN neurons that equal another one up to size. Bins of one quantity are duplicates."
    )
    idle: float = explained(
        0.05,
        "Largest share of FFN neurons that nothing in a public text switches on. Neurons that wait for a trigger do.",
    )
    single: float = explained(
        0.05,
        "Largest share of FFN neurons that one position of a text switches on alone, in the public text and in yours. "
        "The update of such a neuron is the gradient of this position, which names its token.",
    )
    verbatim: bool = explained(
        True,
        "Whether the chat template must show every message as it is, and nothing that depends on the messages, and the "
        "tokenizer must give back the text. Tags in front of words or characters are neither.",
    )
    public_nll: float | None = explained(
        None,
        "Largest negative log-likelihood of a public text, in nats per token. There is no default, since it depends on "
        "the model and its vocabulary; `client review` writes it.",
    )
    above_base: float = explained(
        6.0,
        "Where [model] names a base: how much worse a copy may predict the public text and your retain set than the base, "
        "in nats per token. Noise of 30 % of the weights costs 1, training a small model on other text costs 4.6, and a model "
        "that predicts nothing is 7 or more behind a large one. For a large model, choose 1.",
    )
    public_text: str | None = explained(
        None, "A file of plain text, one text per line, to use instead of the sentences that the package contains."
    )

    def __post_init__(self) -> None:
        for name in ("row_norm", "rank", "duplicates", "idle", "single", "above_base"):
            if not getattr(self, name) >= 0:
                raise PlanError(f"policy: plausibility: {name}: expected at least 0, found {getattr(self, name)}")

    def failure(self, measured: Measured) -> str | None:
        """What is wrong with a value; None if it is allowed."""
        check, value = measured.check, measured.value
        if check in ("finite", "verbatim"):
            wanted = {"finite": "expected finite numbers only", "verbatim": "expected the text itself"}[check]
            return None if value or (check == "verbatim" and not self.verbatim) else f"{measured.where}: {wanted}"
        limit = getattr(self, "above_base" if check == "above_base_retain" else check)
        within = limit is None or (value >= limit if check == "rank" else value <= limit)
        least = "at least" if check == "rank" else "at most"
        if math.isfinite(value) and within:
            return None
        expected = "a finite number" if limit is None else f"{least} {limit:g}"
        return f"{measured.where}: {check} is {value:.3g}, expected {expected}"
