"""The unlearning objectives: plain functions of logits and labels.

Every loss has the form γ · L_forget + α · L_retain, with L_retain the mean cross-entropy on retain answers. A forget loss
takes logits of shape (B, T, V), labels of shape (B, T) with `IGNORED` where nothing is predicted, and what else it declares;
position t of the logits predicts label t+1. Forward passes belong to the one training loop. A new objective is one function
and one line in `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from mpunlearn.client.dataset import IGNORED


def answer_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """NLL(y|x) of each example, in nats: the sum of its answer tokens' cross-entropies, shape (B,), float32."""
    targets = labels[:, 1:]
    predicted = targets != IGNORED
    losses = functional.cross_entropy(logits[:, :-1][predicted].float(), targets[predicted], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, predicted.nonzero()[:, 0], losses)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """CE: the mean over all answer tokens of the batch, in nats, a scalar."""
    return answer_nll(logits, labels).sum() / (labels[:, 1:] != IGNORED).sum()


def grad_ascent(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-CE(D_f) (Maini et al., arXiv 2401.06121; with a retain term GradDiff, Liu et al., arXiv 2203.12817)."""
    return -cross_entropy(logits, labels)


def npo(logits: torch.Tensor, labels: torch.Tensor, reference_nll: torch.Tensor, beta: float) -> torch.Tensor:
    """-(2/β) E log σ(β (NLL_θ - NLL_ref)) (Zhang et al., arXiv 2404.05868, equation 3).

    Args:
        reference_nll: NLL(y|x) of the examples under the reference model, shape (B,), nats.
    """
    difference = answer_nll(logits, labels) - reference_nll
    return -(2 / beta) * functional.logsigmoid(beta * difference).mean()


@dataclass(frozen=True)
class Objective:
    """A forget loss, what it needs, and its defaults."""

    forget_loss: Callable[..., torch.Tensor]
    gamma: float = 1.0
    alpha: float = 1.0
    """0: no retain term, and no retain set is needed."""
    beta: float | None = None
    """Passed to the forget loss where it is not None."""
    reference: bool = False
    """Whether the forget loss takes the reference model's `reference_nll`."""


OBJECTIVES: dict[str, Objective] = {
    "grad-ascent": Objective(grad_ascent, alpha=0.0),
    "grad-diff": Objective(grad_ascent),
    "npo": Objective(npo, beta=0.1, reference=True),
}
"""Every objective by its name on the command line."""
