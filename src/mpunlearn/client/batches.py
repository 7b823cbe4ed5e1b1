"""Optimizer steps that are decided before training starts, and the micro-batches they are made of.

Which examples make up which step is a function of seed, round and epoch, never of the copy or the hardware: the updates of a
round then differ by the noise alone, and a step means the same on one processor and on eight. Since the steps are known, every
micro-batch carries the number of tokens and examples of its whole step, and its losses are divided by that; averages of
averages, the usual way, depend on how a step is divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mpunlearn.lm.examples import IGNORED, Example, collate

Batch = dict[str, Any]


class Pick(NamedTuple):
    """What is in one place of a batch."""

    forget: int
    """Index of a forget example."""
    retain: int | None
    """Index of the retain example beside it."""
    alternate: int
    """A random number that chooses among the forget example's alternate answers."""


def optimizer_steps(
    forget: int, retain: int, *, batch_size: int, epochs: int, seed: int, round_number: int
) -> list[list[Pick]]:
    """The optimizer steps of a round: every forget example once per epoch, each with a random retain example.

    Args:
        forget: size of the forget set.
        retain: size of the retain set; 0 for none, and the picks then hold None.
        batch_size: forget examples per step.
        epochs: passes over the forget set.
        seed: of the order of the examples.
        round_number: another round has another order.
    """
    steps: list[list[Pick]] = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, round_number, epoch])
        order = random.permutation(forget).tolist()
        partners = random.integers(retain, size=forget).tolist() if retain else [None] * forget
        choices = random.integers(1 << 31, size=forget).tolist()
        picks = [Pick(*values) for values in zip(order, partners, choices, strict=True)]
        steps += [picks[start : start + batch_size] for start in range(0, forget, batch_size)]
    return steps


@dataclass(frozen=True)
class Examples:
    """Everything that batches are made of."""

    forget: Sequence[Example]
    retain: Sequence[Example] = ()
    alternates: Sequence[Sequence[Example]] = ()
    """The alternate answers of each forget example, for objectives that use them."""
    forget_nll: Sequence[float] = ()
    """NLL of each forget example under the reference model, in nats, for objectives that use it."""
    alternate_nll: Sequence[Sequence[float]] = ()
    """The same of each alternate answer."""


class MicroBatches:
    """The micro-batches of one process.

    Args:
        steps: the optimizer steps.
        examples: what they are made of.
        size: forget examples per micro-batch.
        pad: token for padding.
        processes: how many processes share every step.
        rank: number of this process. Every process has the same number of micro-batches per step; some may be empty.
    """

    def __init__(
        self, steps: list[list[Pick]], examples: Examples, *, size: int, pad: int, processes: int = 1, rank: int = 0
    ) -> None:
        self._steps, self._examples, self._pad = steps, examples, pad
        self._rank, self._processes = rank, processes
        self.per_step = -(-max(map(len, steps)) // (size * processes))
        """Micro-batches per step and process."""

    def __len__(self) -> int:
        """The number of optimizer steps."""
        return len(self._steps)

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step: forget, retain and alternate examples, with the totals of the step."""
        step = self._steps[number]
        parts = self.per_step * self._processes
        return [self._batch(step, step[part::parts]) for part in range(self._rank, parts, self._processes)]

    def _batch(self, step: list[Pick], picks: list[Pick]) -> Batch:
        source = self._examples
        batch = {"forget": self._side(source.forget, [pick.forget for pick in step], [pick.forget for pick in picks])}
        if source.forget_nll:
            batch["forget"]["reference_nll"] = _numbers([source.forget_nll[pick.forget] for pick in picks])
        if source.alternates:
            chosen = [(pick.forget, pick.alternate % len(source.alternates[pick.forget])) for pick in picks]
            answers = [source.alternates[example][number] for example, number in chosen]
            batch["alternate"] = collate(answers or [_uncounted(source.forget[0])], self._pad)
            values = [source.alternate_nll[example][number] for example, number in chosen]
            batch["alternate"]["reference_nll"] = _numbers(values)
        if source.retain:
            of_step = [pick.retain for pick in step if pick.retain is not None]
            batch["retain"] = self._side(source.retain, of_step, [p.retain for p in picks if p.retain is not None])
        return batch

    def _side(self, source: Sequence[Example], of_step: list[int], mine: list[int]) -> Batch:
        """One side of a micro-batch; an empty one holds an example that does not count."""
        examples = [source[index] for index in mine] or [_uncounted(source[0])]
        tokens = sum(source[index].tokens for index in of_step)
        return {**collate(examples, self._pad), "step_tokens": tokens, "step_examples": len(of_step)}


def _uncounted(example: Example) -> Example:
    return Example(example.input_ids, [IGNORED] * len(example.labels))


def _numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values or [0.0], dtype=torch.float32)
