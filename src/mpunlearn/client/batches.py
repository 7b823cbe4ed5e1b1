"""The optimizer steps of a round, planned before training starts, and the micro-batches that they are split into.

In every round of MPU, the client trains separately on several noisy copies of the same model. Which examples make up a
step depends only on seed, round and epoch, never on the copy or the hardware. The updates of a round therefore differ
only because of the noise, and a step is the same on one GPU as on eight.

Because the steps are known in advance, every micro-batch carries the token and example counts of its whole step, and
its losses are divided by these counts. Averaging the averages of micro-batches, as is usual, would depend on how a step
is split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mpunlearn.lm.examples import IGNORED, Example, collate

Batch = dict[str, Any]


class Pick(NamedTuple):
    """The examples in one slot of a batch."""

    forget: int
    """Index of the forget example."""
    retain: int | None
    """Index of the retain example paired with it; None without a retain set."""
    alternate: int
    """A random number that selects one of the forget example's alternate answers."""


def optimizer_steps(
    forget: int, retain: int, *, batch_size: int, epochs: int, seed: int, round_number: int
) -> list[list[Pick]]:
    """The optimizer steps of a round: every forget example once per epoch, each paired with a random retain example.

    Args:
        forget: size of the forget set.
        retain: size of the retain set, or 0 if there is none.
        batch_size: forget examples per step.
        epochs: passes over the forget set.
        seed: seed for the order of the examples.
        round_number: number of the round; every round has its own order.
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
    """All tokenized examples, and their likelihoods under the reference model."""

    forget: Sequence[Example]
    retain: Sequence[Example] = ()
    alternates: Sequence[Sequence[Example]] = ()
    """The alternate answers to each forget example, for objectives that use them."""
    forget_nll: Sequence[float] = ()
    """NLL of each forget example under the reference model, in nats, for objectives that use it."""
    alternate_nll: Sequence[Sequence[float]] = ()
    """The same for each alternate answer."""


class MicroBatches:
    """The micro-batches of one process.

    Args:
        steps: the optimizer steps.
        examples: the examples that the steps refer to.
        size: forget examples per micro-batch.
        pad: the padding token.
        processes: number of processes that share every step.
        rank: index of this process. Every process has the same number of micro-batches per step; some may be empty.
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
        """The micro-batches of a step: forget, retain and alternate examples, with the counts of the whole step.

        Examples of similar length are together, since every micro-batch is padded to its longest example. A forget example
        and the retain example that was drawn with it may be in different ones.
        """
        step, source, parts = self._steps[number], self._examples, self.per_step * self._processes
        forget = sorted(step, key=lambda pick: -len(source.forget[pick.forget].input_ids))
        drawn = [pick.retain for pick in step if pick.retain is not None]
        retain = sorted(drawn, key=lambda index: -len(source.retain[index].input_ids))
        mine = range(self._rank, parts, self._processes)
        return [self._batch(step, _part(forget, part, parts), drawn, _part(retain, part, parts)) for part in mine]

    def _batch(self, step: list[Pick], picks: list[Pick], drawn: list[int], retain: list[int]) -> Batch:
        source = self._examples
        batch = {"forget": self._side(source.forget, [pick.forget for pick in step], [pick.forget for pick in picks])}
        if source.forget_nll:
            batch["forget"]["reference_nll"] = _numbers([source.forget_nll[pick.forget] for pick in picks])
        if source.alternates:
            chosen = [(pick.forget, pick.alternate % len(source.alternates[pick.forget])) for pick in picks]
            answers = [source.alternates[example][number] for example, number in chosen]
            batch["alternate"] = collate(answers or [_without_loss(source.forget[0])], self._pad)
            if source.alternate_nll:
                values = [source.alternate_nll[example][number] for example, number in chosen]
                batch["alternate"]["reference_nll"] = _numbers(values)
        if source.retain:
            batch["retain"] = self._side(source.retain, drawn, retain)
        return batch

    def _side(self, source: Sequence[Example], of_step: list[int], indices: list[int]) -> Batch:
        """The forget or retain side of a micro-batch. An empty one gets a single example without loss.

        Args:
            source: all examples of this side.
            of_step: indices of the examples in the whole step.
            indices: indices of the examples in this micro-batch.
        """
        examples = [source[index] for index in indices] or [_without_loss(source[0])]
        tokens = sum(source[index].tokens for index in of_step)
        return {**collate(examples, self._pad), "step_tokens": tokens, "step_examples": len(of_step)}


def _part(items: list[Any], part: int, parts: int) -> list[Any]:
    """One of several consecutive parts of a list, of equal size or almost."""
    return items[part * len(items) // parts : (part + 1) * len(items) // parts]


def _without_loss(example: Example) -> Example:
    return Example(example.input_ids, [IGNORED] * len(example.labels))


def _numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values or [0.0], dtype=torch.float32)
