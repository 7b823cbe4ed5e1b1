"""Collapses the leading principal components of a weight's gradient (RepSelect, Sondej et al., arXiv 2606.17168).

What a forget set shares with other text dominates the gradients of the forget loss. Unlearning along these directions
damages the model, and a little fine-tuning undoes it. RepSelect takes the singular value decomposition G = U S Vᵀ of the
gradient of a weight, shape (outputs, inputs), and collapses the leading k directions on both sides, so that the update
acts on what is specific to the forget set:

    removed:  (1 - U_k U_kᵀ) G (1 - V_k V_kᵀ)
    damped:   along the i-th direction, divide by s_i / s_k on either side, which leaves s_k² / s_i of s_i

The defaults, damped and k = 512, are those of the published implementation, github.com/filyp/RepSelect
(`RepSelectSimple`). k is at most half of the rank of the gradient, or little would be left of small weights and of
batches of few tokens.

Each step costs a decomposition for every weight: O(outputs · inputs · k) operations, a few times the size of a gradient
in memory for one weight after the other. Above `EXACT` rows and columns, the decomposition is randomized, with a fixed
seed, and its leading directions are accurate.
"""

import torch

EXACT = 512
"""Matrices with at most this many rows or columns are decomposed exactly."""


def collapsed(gradient: torch.Tensor, components: int, soft: bool) -> torch.Tensor:
    """A gradient without its leading principal components.

    Args:
        gradient: shape (…, outputs, inputs); leading dimensions, such as experts, are collapsed one by one.
        components: the number k of principal components.
        soft: whether they are damped instead of removed.

    Returns:
        A tensor of the same shape and dtype. A gradient that is not finite is returned as it is.
    """
    if gradient.dim() > 2:
        return torch.stack([collapsed(matrix, components, soft) for matrix in gradient])
    largest = min(components, min(gradient.shape) // 2)
    if largest == 0 or not bool(gradient.isfinite().all()):
        return gradient
    matrix = gradient.float()
    u, s, v = _decomposed(matrix, 2 * largest)
    rank = int((s > s[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    k = min(largest, rank // 2)
    if k == 0:
        return gradient
    u, s, v = u[:, :k], s[:k], v[:, :k]
    taken = 1 - s[-1] / s if soft else torch.ones_like(s)
    matrix = matrix - (u * taken) @ (u.mT @ matrix)
    matrix = matrix - (matrix @ v) @ (v * taken).mT
    return matrix.to(gradient.dtype)


def _decomposed(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values: U, S, V of shapes (outputs, count), (count,) and (inputs, count)."""
    if min(matrix.shape) <= EXACT or count >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vh[:count].mT
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=count)
