"""What the weights of a copy look like, before anything runs on them.

A model that somebody trained has weights of full rank, neurons of which no two are alike, and rows of similar size.
Published constructions that write inputs into an update do not: *Robbing the Fed* (Fowl et al., arXiv 2110.13057) needs
many rows that measure the same quantity, *Decepticons* (Fowl et al., arXiv 2201.12675) and *Privacy Backdoors* (Feng and
Tramèr, arXiv 2404.00473) need sharp thresholds, which are rows far larger than the others, and silent paths, which are
rows of zeros.

Not covered: constructions that are hidden in noise of the size of the weights, or in a few neurons among many.
"""

import math
from collections.abc import Iterator

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.plausibility.report import Measured

SAMPLE = 256
"""Rank and duplicates are measured on at most this many rows and columns, drawn at random."""
ALIKE = 0.98
"""From this cosine on, two rows count as duplicates. Random rows of 32 dimensions reach 0.7, of 1000 dimensions 0.2."""
SMALLEST = 16
"""Matrices with fewer rows or columns are not measured: they may well have a low rank."""


def measure(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[Measured]:
    """Measures every tensor of a copy, one after the other.

    Args:
        checkpoint: the copy.
        architecture: its architecture.
    """
    generator = torch.Generator().manual_seed(0)
    for name in sorted(checkpoint.tensors):
        weight, role = checkpoint.read(name).float(), architecture.role_of(name)
        finite = bool(torch.isfinite(weight).all())
        yield Measured("finite", float(finite), name)
        if not finite or weight.dim() != 2 or role is None or min(weight.shape) < SMALLEST:
            continue
        yield Measured("row_norm", _spread(weight), name)
        if role.layer is None:
            continue
        yield Measured("row_norm", _spread(weight.T), f"{name}, columns")
        yield Measured("rank", _rank(_sample(_sample(weight, generator).T, generator)), name)
        if {"gate", "ffn"} & set(role.axes[0]):
            yield Measured("duplicates", _duplicates(_sample(weight, generator)), name)


def _spread(weight: torch.Tensor) -> float:
    """The largest norm of a row, relative to the median."""
    norms = weight.norm(dim=1)
    return float(norms.max() / norms.median()) if norms.any() else math.inf  # infinite, too, if half of them are zero


def _rank(weight: torch.Tensor) -> float:
    """The effective rank of the normalized rows: (Σ s²)² / Σ s⁴ of their singular values s. Duplicates have rank 1."""
    gram = _normalized(weight) @ _normalized(weight).T
    return float(gram.trace() ** 2 / gram.square().sum().clamp(min=1e-30))


def _duplicates(weight: torch.Tensor) -> float:
    """The share of rows that equal another one up to sign and size. Rows of zeros count as duplicates."""
    rows = _normalized(weight)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    return float(((cosines > ALIKE).any(dim=1) | (weight.norm(dim=1) == 0)).float().mean())


def _normalized(weight: torch.Tensor) -> torch.Tensor:
    normalized: torch.Tensor = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return normalized


def _sample(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """At most `SAMPLE` rows of a matrix."""
    return weight[torch.randperm(len(weight), generator=generator)[:SAMPLE]]
