"""The optimizers: those of transformers by name, and one for which the copies' reparameterizations cancel exactly.

Adam divides every entry of a gradient by a running size of that entry. In the first steps that is nearly the entry's sign. It
is not differentiable in the weights, and harmonic or extrapolated denoising cancels only what is; and it depends on the basis,
so a rotated copy trains differently. `TensorAdam` keeps one second moment per tensor instead, the mean square of its gradient:
its step is as large as Adam's, smooth in the weights, and the same in every orthogonal basis.

Related: NovoGrad (Ginsburg et al., arXiv 1905.11286) also has one second moment per layer, but takes the moving average after
the division; Adam-mini (Zhang et al., arXiv 2406.16793) has one per block.
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
    """The optimizer and the learning-rate scheduler of a round. Weight decay applies to matrices, not to vectors.

    Args:
        parameters: what trains.
        training: optimizer, learning rate, ε, weight decay, scheduler, warmup.
        steps: number of optimizer steps.

    Raises:
        PlanError: transformers has no optimizer or scheduler of that name, it is not installed, or it needs more than its name.
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
    """Refuses an optimizer or scheduler that `make_optimizer` would refuse, before anything is published or downloaded."""
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
            f"--optimizer {training.optimizer}: works layer by layer, which is not supported; take adamw_torch"
        )
    return kind, options


class TensorAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) with decoupled weight decay and one second moment per tensor.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
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
        """One step from the current gradients."""
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
