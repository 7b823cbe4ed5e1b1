"""The announced floor: the parameter error that should remain, by the number of copies that an attacker holds.

The idea: the best linear unbiased combination of some aligned copies leaves noise of a known variance
(`CopyDesign.floor`), which averages further over rounds, because every round draws its own. Common noise c is the same
in all of them and remains in full. Nothing but the settings is needed.

Not covered: attackers who know more than copies. The floor is no bound for someone who knows the public base, or that
trained weights concentrate in a few singular values (`attacks.shrink`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, PlanError
from mpunlearn.presets import ADVICE, PRESETS
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.tables import aligned


def noise_floor(perturbation: Perturbation, scales: Sequence[float] | None = None) -> list[float]:
    """The noise that remains, relative to θ or its task vector, for the worst choice of 1, 2, … m copies of a round.

    Args:
        perturbation: the settings; common noise does not count here.
        scales: the secret scales of the copies (default: for harmonic, α = 1, the smallest; for extrapolate, the
            built-in ones).
    """
    design = perturbation.design(perturbation.scales(None) if scales is None else list(scales))
    copies = range(design.copies)
    left = [min(design.floor(list(held)) for held in itertools.combinations(copies, n + 1)) for n in copies]
    return [math.sqrt(variance) * perturbation.kappa for variance in left]


@dataclass(frozen=True)
class Floors:
    """The announced floors of a plan."""

    perturbation: Perturbation
    rounds: int
    with_base: bool
    """Whether the noise is relative to the task vector, and not to the weights."""
    one_round: list[float]
    """Noise that remains of k = 1 … m copies of one round, without common noise."""
    common: float | None
    """‖c‖/‖θ‖; None if it depends on a calibration of the model."""

    def left(self, held: int, rounds: int) -> float:
        """The floor for `held` copies of each of several rounds; with a base, common noise comes on top."""
        common = 0.0 if self.with_base else self.common or 0.0
        return math.hypot(self.one_round[held - 1] / math.sqrt(rounds), common)

    @property
    def relative_to(self) -> str:
        """What the floors are relative to."""
        return "task vector" if self.with_base else "weights"

    def text(self) -> str:
        """A table, and what it does not include."""
        rows = [
            (str(held), *(f"{self.left(held, rounds):.2%}" for rounds in (1, self.rounds)))
            for held in range(1, len(self.one_round) + 1)
        ]
        every = "1 round" if self.rounds == 1 else f"each of {self.rounds} rounds"
        lines = [
            f"parameter error that remains, relative to the {self.relative_to}",
            aligned(("copies held by one party", "of 1 round", f"of {every}"), rows),
        ]
        if self.common is None:
            lines.append(
                "common noise is auto: what it leaves on top depends on the model, and `mpunlearn calibrate` prints it (5 % "
                "of the weights without calibration)"
            )
        elif self.with_base and self.common:
            lines.append(f"common noise leaves {self.common:.2%} of the weights on top, whatever is held")
        elif self.common == 0 and self.one_round[-1] == 0:
            lines.append("Whoever holds all copies of a round has the model: --common-noise is 0.")
        if self.common != 0 and len(self.one_round) > 1:
            lines.append(ADVICE)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The floors as JSON."""
        floors = {
            str(held): {"one_round": self.left(held, 1), "all_rounds": self.left(held, self.rounds)}
            for held in range(1, len(self.one_round) + 1)
        }
        return {
            "relative_to": self.relative_to,
            "rounds": self.rounds,
            "common_noise": self.common,
            "copies_held": floors,
        }


def read_floors(path: Path) -> Floors:
    """The floors of a YAML file of options, as `--print-config` writes it.

    Raises:
        FileError: the file cannot be read.
        PlanError: it is not such a file, or an option has an invalid value.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"--plan {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"--plan {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PlanError(f"--plan {path}: expected options such as `copies: 3`, found {content!r:.60}")
    given = {str(key).replace("-", "_"): value for key, value in content.items()}
    values = {**PRESETS.get(str(given.get("preset")), {}), **given}
    names = Perturbation.__dataclass_fields__
    try:
        perturbation = Perturbation(**{name: value for name, value in values.items() if name in names})
    except PlanError as error:
        raise PlanError(f"--plan {path}: {error}") from None
    rounds = values.get("rounds", 5)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise PlanError(f"--plan {path}: rounds: expected an integer of at least 1, found {rounds!r:.60}")
    common = None if perturbation.common_noise == "auto" else float(perturbation.common_noise)
    return Floors(perturbation, rounds, values.get("base") is not None, noise_floor(perturbation), common)
