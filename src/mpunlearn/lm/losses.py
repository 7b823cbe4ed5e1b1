"""Cross-entropy of answer tokens, for training and evaluation."""

import torch
from torch.nn import functional

from mpunlearn.lm.examples import IGNORED


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each answer token, in nats.

    Args:
        logits: shape (B, T, V); position t predicts targets[:, t].
        targets: shape (B, T); `IGNORED` at positions without loss.

    Returns:
        Shape (B, T), float32; zero at positions without loss.
    """
    counted = targets != IGNORED
    losses = functional.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return at_positions(counted, losses)


def answer_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL(y|x) of each example, in nats: the sum of its answer tokens' cross-entropies, shape (B,), float32."""
    return token_nll(logits, targets).sum(dim=1)


def at_positions(counted: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Puts one value at each counted position and zero elsewhere, shape (B, T)."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)
