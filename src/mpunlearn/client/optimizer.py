"""The optimizers: those of transformers, by name, and one whose steps do not depend on a copy's reparameterization.

In MPU, every copy of the model has its own noise and its own secret basis (its reparameterization). The server undoes
the basis and combines the updates such that the first-order effect of the noise cancels. Adam interferes with both. It
divides every entry of a gradient by a running magnitude of that entry, so its first steps are nearly the sign of the
gradient. The sign is not differentiable in the weights, so it has no first-order effect that could cancel. It also
depends on the basis, so a rotated copy trains differently. `TensorAdam` keeps one second moment per tensor instead, the
mean square of its gradient. Its steps are as large as Adam's, smooth in the weights, and the same in every orthogonal
basis.

Related: NovoGrad (Ginsburg et al., arXiv 1905.11286) also has one second moment per layer, but normalizes the gradient
before the first moment is taken; Adam-mini (Zhang et al., arXiv 2406.16793) has one second moment per block.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers

from mpunlearn.errors import PlanError
from mpunlearn.lm.processes import full_tensor
from mpunlearn.protocol.plan import Training

TENSOR_ADAM = "tensor_adam"
"""The name of `TensorAdam` on the command line."""


def make_optimizer(parameters: Sequence[torch.nn.Parameter], training: Training, steps: int) -> tuple[Any, Any]:
    """Creates the optimizer and the learning-rate scheduler of a round. Weight decay applies to matrices, not to
    vectors.

    Args:
        parameters: the parameters to train.
        training: optimizer, learning rate, ε, weight decay, scheduler, warmup.
        steps: number of optimizer steps.

    Raises:
        PlanError: transformers does not know the optimizer or the scheduler, its package is not installed, or it needs
            arguments that are not options here.
    """
    kind, options = _optimizer_class(training)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    try:
        optimizer = kind(groups, **options)
        scheduler = transformers.get_scheduler(training.scheduler, optimizer, training.warmup_steps, steps)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(f"--optimizer {training.optimizer}, --scheduler {training.scheduler}: {error}") from error
    return optimizer, scheduler


def check_optimizer(training: Training) -> None:
    """Raises the errors of `make_optimizer` early, before anything is published or downloaded."""
    make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], training, steps=1)


def _optimizer_class(training: Training) -> tuple[Any, dict[str, Any]]:
    if training.optimizer == TENSOR_ADAM:
        return TensorAdam, {"lr": training.learning_rate, "eps": training.adam_epsilon}
    try:
        arguments = transformers.TrainingArguments(
            output_dir="unused",
            optim=training.optimizer,
            learning_rate=training.learning_rate,
            adam_epsilon=training.adam_epsilon,
            weight_decay=training.weight_decay,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        )
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError, AttributeError) as error:
        known = ", ".join([TENSOR_ADAM, *(name.value for name in transformers.training_args.OptimizerNames)])
        reason = str(error).strip().split("\n")[0]
        raise PlanError(f"--optimizer {training.optimizer}: {reason}. Known optimizers: {known}") from error
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise PlanError(
            f"--optimizer {training.optimizer}: layer-wise optimizers are not supported; use adamw_torch, for example"
        )
    return kind, options


class TensorAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) with decoupled weight decay and one second moment per tensor.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, as in AdamW.
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
        """Performs one step with the current gradients."""
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
    return float(full_tensor(torch.linalg.vector_norm(gradient))) ** 2 / gradient.numel()
