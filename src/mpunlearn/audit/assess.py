"""Applies every attack for which the attacker has what it needs, and scores the results.

The idea: attacks know nothing of one another. Here is what each of them gets: all copies of each round, subsets of them,
one copy of each round, the public base, or what another attack estimated. To add an attack, write a file in `attacks`
and a line here.

Not covered: which copies an attacker would choose. Where one has to be chosen, the score chooses the worst for the server.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpunlearn.audit.attacks.base import base as align_to_base
from mpunlearn.audit.attacks.cancel import cancel
from mpunlearn.audit.attacks.predictable import predictable
from mpunlearn.audit.attacks.rounding import rounding
from mpunlearn.audit.attacks.rounds import rounds
from mpunlearn.audit.attacks.shrink import shrink
from mpunlearn.audit.report import CONTROL, ON_BASE, ONE, SHRUNK, Audit
from mpunlearn.audit.score import Score, score
from mpunlearn.audit.subject import Subject
from mpunlearn.audit.weights import Model, check_alike
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.lm.sources import Data
from mpunlearn.progress import progress

if TYPE_CHECKING:
    from mpunlearn.audit.behavior import Behavior

BASE = "public base"
REPAIRED = "one copy, repaired"
MAX_COPIES = 4
"""With more copies of a round than that, its subsets are not tried."""
WORTH_SHRINKING = 1e-3
"""Error below which there is no noise to shrink."""


@dataclass(frozen=True)
class Texts:
    """The text on which functions are compared, and what an attacker trains a copy on."""

    known: Path
    """Text that the server's model knows."""
    public: Path | None = None
    """Text that the attacker has; None for no repair."""
    epochs: int = 3
    learning_rate: float = 1e-4
    max_length: int = 512
    data: Data = field(default_factory=Data)


class _Results:
    """The best estimate of each attack, and its score."""

    def __init__(self, theta: Model, public: Model | None) -> None:
        self._theta, self._public = theta, public
        self.scores: dict[str, Score] = {}
        self.estimates: dict[str, Model] = {}

    def add(self, name: str, estimate: Model, *, in_place: bool = False) -> Score:
        """Scores an estimate, and keeps it if it is the best one of this name.

        Args:
            name: the attack.
            estimate: what it found.
            in_place: whether it may be in the coordinates of θ already; it is then scored both as it is and aligned.
        """
        found = score(self._theta, estimate, self._public)
        if in_place:
            unmoved = score(self._theta, estimate, self._public, in_place=True)
            found = min(found, unmoved, key=lambda candidate: (-candidate.equal_bfloat16, candidate.error))
        if name not in self.scores or found.error < self.scores[name].error:
            self.scores[name], self.estimates[name] = found, estimate
        return found

    @property
    def strongest(self) -> str:
        """The attack with the smallest error."""
        return min(self.scores, key=lambda name: self.scores[name].error)


def assess(subject: Subject, texts: Texts | None = None, floor: float | None = None) -> Audit:
    """Attacks the copies of a subject and compares the results with its model.

    Args:
        subject: the model and its copies.
        texts: what functions are compared on; None to compare weights only.
        floor: the announced floor (default: that of the run's common noise, if its state is known).

    Raises:
        CheckpointError: a checkpoint cannot be read.
        PlanError: the checkpoints are not of one architecture.
        StateError: the lineage of the run's common noise is missing or damaged.
    """
    if floor is None and subject.record is not None and subject.record.offset is not None:
        floor = subject.record.offset.floor
    theta = Model.read(subject.model)
    public = Model.read(subject.base) if subject.base is not None else None
    by_round, named = [], {str(subject.model): theta}
    for paths in subject.copies.values():
        by_round.append([Model.read(path) for path in paths])
        named.update({str(path): copy for path, copy in zip(paths, by_round[-1], strict=True)})
    check_alike(named if public is None else {**named, str(subject.base): public})
    results = _Results(theta, public)
    _combine(by_round, results)
    _refine(public, Checkpoint(subject.model), results)
    baselines = {}
    if public is not None:
        baselines[BASE] = score(theta, public, public, in_place=True)
    if subject.state is not None:
        baselines[CONTROL] = score(theta, _control(subject, by_round[0]), public, in_place=True)
    behaviors = {}
    if texts is not None:
        compared = {name: results.estimates[name] for name in dict.fromkeys((ONE, results.strongest))}
        if public is not None:
            compared[BASE] = public
        behaviors = _behaviors(subject.model, compared, texts)
    held = sum(len(copies) for copies in by_round)
    return Audit(str(subject.model), held, results.scores, floor, baselines, behaviors, len(by_round))


def _combine(by_round: list[list[Model]], results: _Results) -> None:
    """The attacks that combine copies: of one round, and of several."""
    for copy in by_round[0]:
        results.add(ONE, copy)
    best: list[Model] = []
    known = None
    for index, copies in enumerate(progress(by_round, "attacking rounds")):
        if index == 0 and 2 < len(copies) <= MAX_COPIES:
            for count in range(2, len(copies)):
                for subset in itertools.combinations(copies, count):
                    for estimate in cancel(subset, whole=False).values():
                        results.add(f"{count} of {len(copies)} copies", estimate)
        if len(copies) > 1:
            held = "all copies" if index == 0 else "all copies of a later round"
            found = cancel(copies, only=known)  # what is best in one round is best in all
            errors = {name: results.add(f"{held}, {name}", model).error for name, model in found.items()}
            known = min(errors, key=errors.__getitem__)
            best.append(found[known])
    if len(by_round) > 1:
        results.add(f"one copy of each of {len(by_round)} rounds", rounds([copies[0] for copies in by_round]))
    if len(best) > 1:
        results.add(f"all copies of {len(best)} rounds", rounds(best))


def _refine(public: Model | None, stored: Checkpoint, results: _Results) -> None:
    """The attacks that start from one estimate: with the public base, by rounding, and by shrinking."""
    best = results.strongest
    grid = min((info.dtype for info in stored.tensors.values()), key=lambda dtype: dtype.itemsize)
    if public is not None:
        for name in dict.fromkeys((ONE, best, *(name for name in results.scores if name.startswith("one copy of")))):
            known = align_to_base(results.estimates[name], public)
            results.add(f"{name}, {ON_BASE}", known, in_place=True)
            if grid.itemsize < torch.float32.itemsize:
                results.add(f"{name}, {ON_BASE}, rounded", rounding(known, grid), in_place=True)
    for name in dict.fromkeys((ONE, best)):
        found = results.scores[name]
        if found.error >= WORTH_SHRINKING:
            results.add(f"{name}, {SHRUNK}", shrink(results.estimates[name], found.error))
            if public is not None and found.task_error is not None:
                known = results.estimates[f"{name}, {ON_BASE}"]
                results.add(f"{name}, {ON_BASE}, {SHRUNK}", shrink(known, found.task_error, public), in_place=True)


def _control(subject: Subject, copies: Sequence[Model]) -> Model:
    """θ from the first copy and the server's own keys."""
    from mpunlearn.protocol.exchange import Card
    from mpunlearn.server.lineage import open_offset

    assert subject.state is not None
    assert subject.record is not None
    card = Card.of(Checkpoint(subject.copies[subject.record.round][0]).config)
    offset = open_offset(subject.record.offset)
    return predictable(copies[0], card.copy - 1 if card else 0, subject.state.secret, subject.record, offset)


def _behaviors(path: Path, compared: dict[str, Model], texts: Texts) -> dict[str, "Behavior"]:
    """Compares the predictions of some models with those of θ, and repairs a copy if there is text for that."""
    from mpunlearn.audit.attacks.repair import repair
    from mpunlearn.audit.behavior import behavior, with_weights
    from mpunlearn.lm.examples import encode
    from mpunlearn.lm.model import load
    from mpunlearn.lm.records import read_records

    theta, tokenizer = load(path)
    examples = encode(read_records(texts.known, texts.data, "text"), tokenizer, texts.max_length)
    found = {name: behavior(theta, with_weights(theta, model), tokenizer, examples) for name, model in compared.items()}
    if texts.public is not None:
        material = encode(read_records(texts.public, texts.data, "public text"), tokenizer, texts.max_length)
        copy = with_weights(theta, compared[ONE])
        repair(copy, tokenizer, material, texts.epochs, texts.learning_rate)
        found[REPAIRED] = behavior(theta, copy, tokenizer, examples)
    return found
