"""Losses."""

import torch
from torch.nn import functional

from mpunlearn.lm.examples import IGNORED


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each answer token, in nats, shape (B, T), float32; zero where nothing counts."""
    counted = targets != IGNORED
    losses = functional.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return _at(counted, losses)


def answer_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL(y|x) of each example, in nats: the sum of its answer tokens' cross-entropies, shape (B,), float32."""
    return token_nll(logits, targets).sum(dim=1)


def _at(counted: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values of the counted positions at their places, zero elsewhere."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)
