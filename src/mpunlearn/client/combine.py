"""How the gradients of the forget and the retain loss are combined into one.

`sum`: the gradients of γ · forget + α · retain are added.

`normalized` (NGDiff, Bu et al., arXiv 2410.22086): both gradients of a step are divided by their norms before they are
added. Every `adapt_every` steps, the learning rate is rescaled: a parabola is fitted to the retain loss before the
step, after it, and after a step in the opposite direction, and the step is rescaled to end at the parabola's minimum
(their section 4).

`dual` (PDU, arXiv 2506.05314): α is a dual variable that follows the retain loss,
α ← max(0, α + dual_step · (L_retain - retain_target)), starting at epoch `dual_warmup` of the run. It is reset at the
start of every round.

`collapsed` (RepSelect, Sondej et al., arXiv 2606.17168): the leading principal components of the forget gradient of each
weight are damped or removed (see `collapse`), then α times the retain gradient is added, if there is a retain term.
Vectors, such as those of norms, get no forget gradient. The elementwise division of Adam would bring the components back:
use `--optimizer sgd`, as that paper does, or `tensor_adam`. The principal components are those of a step's own gradient;
the published implementation takes them from one pass over the forget set, which is the same if that is one batch, and
before that it elicits the knowledge with an adapter that is trained on the forget set, which is not done here.

The training loop calls a `Combination` between and after its two backward passes, and before and after the optimizer
step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpunlearn.client.collapse import collapsed
from mpunlearn.lm.processes import full_tensor
from mpunlearn.protocol.objectives import Objective


class Combination:
    """`sum`, which needs none of the hooks below. The other combinations override them.

    Args:
        objective: weights and hyperparameters.
        parameters: the parameters being trained.
    """

    def __init__(self, objective: Objective, parameters: Sequence[torch.Tensor]) -> None:
        self.objective, self.alpha = objective, objective.alpha
        self._parameters = parameters

    def between(self) -> None:
        """Called between the two backward passes of a micro-batch."""

    def after(self, last: bool) -> None:
        """Called after the backward passes of a micro-batch; `last` says whether it is the last one of its step."""

    def before_step(self, step: int) -> None:
        """Called before the optimizer changes the weights."""

    def after_step(self, scheduler: Any, retain_loss: Callable[[], float]) -> None:
        """Called after the optimizer has changed the weights, and before the scheduler changes the learning rate.

        Args:
            scheduler: the learning-rate scheduler.
            retain_loss: computes the retain loss of the step at the current weights.
        """

    def finish(self, retain_loss: float, epoch: int) -> None:
        """Called at the end of a step.

        Args:
            retain_loss: the step's retain loss, over all micro-batches and processes.
            epoch: number of completed epochs of the run.
        """


class SeparateGradients(Combination):
    """Accumulates the forget gradient and the retain gradient of a step apart from each other."""

    def __init__(self, objective: Objective, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(objective, parameters)
        self._retain_gradients: dict[torch.Tensor, torch.Tensor | None] = {}

    def between(self) -> None:
        """Sets the forget gradient aside, so that the retain gradient accumulates separately."""
        self._swap()

    def _swap(self) -> None:
        for parameter in self._parameters:
            parameter.grad, other = self._retain_gradients.pop(parameter, None), parameter.grad
            self._retain_gradients[parameter] = other

    def _add_retain(self) -> None:
        """Adds the retain gradient to the forget gradient."""
        for parameter in self._parameters:
            other = self._retain_gradients.pop(parameter, None)
            if other is not None:
                parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)


class NormalizedGradients(SeparateGradients):
    """`normalized`, for NGDiff."""

    def __init__(self, objective: Objective, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(objective, parameters)
        self._every = max(1, int(objective.parameters["adapt_every"]))
        self._before: list[torch.Tensor] = []

    def after(self, last: bool) -> None:
        """Restores the forget gradient. At the end of a step, divides both gradients by their norms and adds them."""
        self._swap()
        if not last:
            return
        # The gradients already contain γ and α, which cancel when dividing by the norm, so multiply by them again.
        forget = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        retain = [gradient for gradient in self._retain_gradients.values() if gradient is not None]
        for gradients, weight in ((forget, self.objective.gamma), (retain, self.objective.alpha)):
            norm = float(full_tensor(torch.nn.utils.get_total_norm(gradients)))
            for gradient in gradients:
                gradient.mul_(weight / norm if norm else 0.0)
        self._add_retain()

    def before_step(self, step: int) -> None:
        """Saves the weights if the learning rate is to be rescaled after this step."""
        if step % self._every == 0:
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def after_step(self, scheduler: Any, retain_loss: Callable[[], float]) -> None:
        """Rescales the step to end at the minimum of the parabola through the retain loss at w + d, w and w - d.

        The optimizer has just moved the weights from w to w - d. The factor that rescales d and the learning rate is
        clamped to [1/2, 2], and is 1 if the parabola has no minimum.
        """
        if not self._before:
            return
        before, self._before = self._before, []
        after = [parameter.detach().clone() for parameter in self._parameters]
        losses = []
        for direction in (-1.0, 0.0, 1.0):
            for parameter, w, moved in zip(self._parameters, before, after, strict=True):
                parameter.copy_(w + direction * (w - moved))
            losses.append(retain_loss())
        ahead, here, opposite = losses
        curvature = ahead - 2 * here + opposite
        best = (opposite - ahead) / (2 * curvature) if curvature > 0 else 1.0
        factor = min(2.0, max(0.5, best))
        for parameter, w, moved in zip(self._parameters, before, after, strict=True):
            parameter.copy_(w + factor * (moved - w))
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


class CollapsedGradients(SeparateGradients):
    """`collapsed`, for RepSelect."""

    def after(self, last: bool) -> None:
        """At the end of a step, collapses the forget gradient of each weight and adds the retain gradient."""
        if self.objective.alpha:
            self._swap()
        if not last:
            return
        components, soft = int(self.objective.parameters["components"]), bool(self.objective.parameters["soft"])
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if parameter.dim() < 2:
                parameter.grad.zero_()
            else:
                parameter.grad = collapsed(parameter.grad, components, soft)
        self._add_retain()


class DualAscent(Combination):
    """`dual`, for PDU."""

    def finish(self, retain_loss: float, epoch: int) -> None:
        """Updates the dual variable."""
        parameters = self.objective.parameters
        if epoch >= parameters["dual_warmup"]:
            self.alpha = max(0.0, self.alpha + parameters["dual_step"] * (retain_loss - parameters["retain_target"]))


COMBINATIONS: dict[str, type[Combination]] = {
    "sum": Combination,
    "normalized": NormalizedGradients,
    "dual": DualAscent,
    "collapsed": CollapsedGradients,
}
