"""The table of the demos: what each model still knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.demo.models import TrainedWorld
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.lm.model import load
from mpunlearn.lm.sources import Data
from mpunlearn.tables import markdown

MAX_NEW_TOKENS = 48
"""Longer than any answer in the built-in benchmark."""
HEADER = (
    "model", "forget probability", "forget ROUGE-L", "retain probability", "retain ROUGE-L", "parameter error left", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Mean scores over one set, each in [0, 1]."""

    probability: float
    rouge_l: float


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    model: str
    forget: Answers
    retain: Answers
    left: float | None
    """The parameter error that is left to a client that pools all copies, relative to the weights; None without copies."""
    seconds: float | None
    """How long unlearning took; None for a model that did not unlearn."""


def sets_of(world: TrainedWorld) -> dict[str, Questions]:
    """The forget and the retain set of a world."""
    sets = read_sets(str(world.path / "data"), "", None, Data())
    return {split: sets[split] for split in ("forget", "retain")}


def measure_in(
    world: TrainedWorld, name: str, checkpoint: Path, left: float | None = None, seconds: float | None = None
) -> Line:
    """Evaluates a model on the forget and the retain set of a world."""
    return measure(name, checkpoint, sets_of(world), left, seconds, max_new_tokens=MAX_NEW_TOKENS)


def measure(
    name: str,
    checkpoint: Path,
    sets: Mapping[str, Questions],
    left: float | None,
    seconds: float | None,
    max_new_tokens: int,
) -> Line:
    """Evaluates a model on a forget and a retain set."""
    return line_of(name, metrics_of(checkpoint, sets, max_new_tokens), left, seconds)


def metrics_of(
    checkpoint: Path, sets: Mapping[str, Questions], max_new_tokens: int = MAX_NEW_TOKENS
) -> dict[str, float]:
    """The metrics of a model on a forget and a retain set, without model utility, which needs more sets."""
    model, tokenizer = load(checkpoint)
    found = tofu.summarize(tofu.measure(model, tokenizer, sets, max_new_tokens=max_new_tokens, membership=False))
    return {name: value for name, value in found.items() if name != "model_utility"}


def line_of(name: str, metrics: Mapping[str, float], left: float | None = None, seconds: float | None = None) -> Line:
    """A line of the table from the metrics of a model."""
    forget, retain = (
        Answers(metrics[f"{split}_Q_A_Prob"], metrics[f"{split}_Q_A_ROUGE"]) for split in ("forget", "retain")
    )
    return Line(name, forget, retain, left, seconds)


def table(lines: list[Line]) -> str:
    """The lines as a Markdown table."""
    rows = []
    for line in lines:
        numbers = (line.forget.probability, line.forget.rouge_l, line.retain.probability, line.retain.rouge_l)
        left = "" if line.left is None else f"{line.left:.2g}"
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        rows.append([line.model, *(f"{number:.3f}" for number in numbers), left, seconds])
    return markdown(HEADER, rows)
