"""Sharpness-aware minimization of the forget loss, `--sam-radius` (Fan et al., arXiv 2502.05374).

Whoever relearns a forgotten text moves the weights a little. If the forget loss is still low there, it takes more to
relearn. SAM therefore minimizes the largest forget loss within a distance ρ, to first order: at each step, it takes the
forget gradient at w + ρ g / ‖g‖ instead of w, where g is the forget gradient at w, over all trained weights and the whole
step. The forget loss rises in this direction, which is that of relearning. The retain gradient is taken at w.

As in the published implementation, github.com/OPTML-Group/Unlearn-Smooth, which uses a radius of 0.01; but g is that of
the whole step, however it is split into micro-batches and processes. The restored weights are equal bit by bit.

It costs a second forward and backward pass of the forget examples, and memory for g and for the trained weights. It
works with every objective. The paper's other ways to smooth (randomized smoothing, penalties on gradient and curvature,
weight averaging) are not implemented.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mpunlearn.lm.processes import full_tensor


class Sharpness:
    """Moves the weights to where the forget gradient of a step is taken.

    Args:
        parameters: the parameters being trained.
        radius: the distance ρ. If it is 0, nothing is moved, and nothing is computed.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], radius: float) -> None:
        self._parameters, self._radius = parameters, radius
        self._moves: list[tuple[torch.Tensor, torch.Tensor]] = []

    def aim(self, forget_gradient: Callable[[], None]) -> None:
        """Called at the beginning of a step, when there are no gradients; leaves none.

        Args:
            forget_gradient: adds the gradient of the step's whole forget loss to the parameters.
        """
        if not self._radius:
            return
        forget_gradient()
        gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        norm = float(full_tensor(torch.nn.utils.get_total_norm([gradient for _, gradient in gradients])))
        scale = self._radius / norm if norm and math.isfinite(norm) else 0.0
        self._moves = [(parameter, gradient.mul_(scale)) for parameter, gradient in gradients] if scale else []
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The weights are moved within the block."""
        before = [parameter.detach().clone() for parameter, _ in self._moves]
        try:
            with torch.no_grad():
                for parameter, move in self._moves:
                    parameter.add_(move)
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), weights in zip(self._moves, before, strict=True):
                    parameter.copy_(weights)
