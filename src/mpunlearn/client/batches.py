"""Batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch.distributed
from torch.utils.data import Dataset

from mpunlearn.lm.examples import IGNORED, Example, collate


class Pick(NamedTuple):
    """What stands in one place of a batch."""

    forget: int
    """Index of a forget example."""
    retain: int | None
    """Index of its retain example."""
    alternate: int
    """A random number that chooses among its alternate answers."""


def batches(
    forget: int, retain: int, *, batch_size: int, epochs: int, seed: int, round_number: int
) -> list[list[Pick]]:
    """The optimizer steps of a round: every forget example once an epoch, each with one random retain example.

    Args:
        forget, retain: sizes of the sets; retain may be 0, and the picks then hold None.
    """
    plan: list[list[Pick]] = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, round_number, epoch])
        order = random.permutation(forget).tolist()
        partners = random.integers(retain, size=forget).tolist() if retain else [None] * forget
        choices = random.integers(1 << 31, size=forget).tolist()
        picks = [Pick(*values) for values in zip(order, partners, choices, strict=True)]
        plan += [picks[start : start + batch_size] for start in range(0, forget, batch_size)]
    return plan


def micro_batches(plan: list[list[Pick]], size: int, processes: int) -> tuple[list[list[Pick]], int]:
    """Every step of a plan cut into the same number of micro-batches, at most `size` examples each; some may be empty.

    Returns:
        All micro-batches in order, of which each process takes every `processes`-th; and how many each takes per step.
    """
    largest = max(map(len, plan))
    accumulated = -(-largest // (size * processes))
    count = accumulated * processes
    return [step[part::count] for step in plan for part in range(count)], accumulated


Batch = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """Everything that batches are made of."""

    forget: Sequence[Example]
    retain: Sequence[Example] = ()
    alternates: Sequence[Sequence[Example]] = ()
    """The alternate answers of each forget example, where the objective takes them."""
    forget_nll: Sequence[float] = ()
    """NLL of each forget example under the reference model, where the objective takes it."""
    alternate_nll: Sequence[Sequence[float]] = ()


class _MicroBatches(Dataset[Batch]):
    """Item i is micro-batch i, with the totals of its step."""

    def __init__(self, items: list[list[Pick]], per_step: int, examples: Examples, pad: int) -> None:
        self._items, self._per_step, self._examples, self._pad = items, per_step, examples, pad

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item: int) -> Batch:
        first = item - item % self._per_step
        step = [pick for part in self._items[first : first + self._per_step] for pick in part]
        forget = self._examples.forget
        batch: Batch = {"forget": self._part(item, [forget[pick.forget] for pick in step], forget, 0)}
        picks = self._items[item]
        if self._examples.forget_nll:
            batch["forget"]["reference_nll"] = self._numbers([self._examples.forget_nll[p.forget] for p in picks])
        if self._examples.alternates:
            chosen = [(p.forget, p.alternate % len(self._examples.alternates[p.forget])) for p in picks]
            other = [self._examples.alternates[example][number] for example, number in chosen]
            batch["alternate"] = collate(other or [self._filler(forget[0])], self._pad)
            values = [self._examples.alternate_nll[example][number] for example, number in chosen]
            batch["alternate"]["reference_nll"] = self._numbers(values)
        if self._examples.retain:
            retain = self._examples.retain
            batch["retain"] = self._part(item, [retain[p.retain] for p in step if p.retain is not None], retain, 1)
        return batch

    def of_step(self, step: int) -> Batch:
        """The first micro-batch of a step."""
        return self[step * self._per_step]

    def _part(self, item: int, step: list[Example], source: Sequence[Example], place: int) -> Batch:
        """One side of a micro-batch; an empty one holds an example that counts for nothing."""
        mine = [source[pick[place]] for pick in self._items[item]]  # type: ignore[index]
        part: Batch = collate(mine or [self._filler(source[0])], self._pad)
        return {**part, "step_tokens": sum(example.tokens for example in step), "step_examples": len(step)}

    @staticmethod
    def _filler(example: Example) -> Example:
        return Example(example.input_ids, [IGNORED] * len(example.labels))

    @staticmethod
    def _numbers(values: list[float]) -> torch.Tensor:
        return torch.tensor(values or [0.0], dtype=torch.float32)
