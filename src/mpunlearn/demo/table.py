"""Table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.client import Data
from mpunlearn.demo import models
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.lm.model import load


@dataclass(frozen=True)
class Answers:
    """Means over one set, each in [0, 1]."""

    probability: float
    rouge_l: float


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    model: str
    forget: Answers
    retain: Answers
    seconds: float | None
    """Of the unlearning; None for the two models that were trained."""


def measure(name: str, checkpoint: Path, world: models.TrainedWorld, seconds: float | None = None) -> Line:
    """Evaluates a model on the forget and the retain set."""
    sets = read_sets(str(world.path / "data"), "", None, Data())
    return line(name, checkpoint, {split: sets[split] for split in ("forget", "retain")}, seconds, max_new_tokens=48)


def line(
    name: str, checkpoint: Path, sets: Mapping[str, Questions], seconds: float | None, max_new_tokens: int
) -> Line:
    """Evaluates a model on a forget and a retain set."""
    model, tokenizer = load(checkpoint)
    found = tofu.summarize(tofu.measure(model, tokenizer, sets, max_new_tokens=max_new_tokens, membership=False))
    forget, retain = (
        Answers(found[f"{split}_probability"], found[f"{split}_rouge_l_recall"]) for split in ("forget", "retain")
    )
    return Line(name, forget, retain, seconds)


def table(lines: list[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| model | forget probability | forget ROUGE-L | retain probability | retain ROUGE-L | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        numbers = (line.forget.probability, line.forget.rouge_l, line.retain.probability, line.retain.rouge_l)
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        rows.append(f"| {line.model} | {' | '.join(f'{number:.3f}' for number in numbers)} | {seconds} |")
    return "\n".join(rows)
