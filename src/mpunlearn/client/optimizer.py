"""An optimizer for which the copies' changes of basis cancel exactly, and whose steps are smooth in the weights.

Adam divides every entry of a gradient by a running size of that entry. That is nearly the entry's sign in the first steps,
which is not differentiable in the weights, and harmonic or extrapolated denoising cancels only what is; and it depends on the
basis, so a rotated copy trains differently. `TensorAdam` keeps one second moment per tensor instead, the mean square of its
gradient: the step is as large as Adam's, smooth in the weights, and the same in every orthogonal basis.

Related: NovoGrad (Ginsburg et al., arXiv 1905.11286), which also has one second moment per layer, but takes the moving average
after the division; Adam-mini (Zhang et al., arXiv 2406.16793), one per block.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

NAME = "tensor_adam"
"""Its name on the command line."""


class TensorAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) with decoupled weight decay and one second moment per tensor.

    Args:
        params: as for every torch optimizer.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gradients at hand."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"], state["v"] = 0, 0.0
                    state["m"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["m"].lerp_(parameter.grad, 1 - first)
                state["v"] = second * state["v"] + (1 - second) * _mean_square(parameter.grad)
                size = (state["v"] / (1 - second ** state["step"])) ** 0.5 + group["eps"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(state["m"], alpha=-group["lr"] / (1 - first ** state["step"]) / size)
        return loss


def _mean_square(gradient: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(gradient)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(whole) ** 2 / gradient.numel()
