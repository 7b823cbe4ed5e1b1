"""The bounds of the training plan: what a server may choose, within what protects the client's text.

The plan is the server's. A plan can be an attack: one step of SGD on one text is that text's gradient. Every bound is a
line of policy.toml, with its reason.

Not covered: what a plan within the bounds reveals, which is more than nothing; `client audit` measures it.
"""

from dataclasses import dataclass, fields

from mpunlearn.errors import PlanError
from mpunlearn.protocol.objectives import OBJECTIVES
from mpunlearn.protocol.plan import Training
from mpunlearn.schema import explained

ROUNDING = 1e-9
"""Bounds are compared with this relative tolerance: a tenth of 1.0 is not a tenth too little."""


@dataclass(frozen=True)
class PlanBounds:
    """The table [plan] of policy.toml.

    Raises:
        PlanError: a bound is negative.
    """

    optimizers: tuple[str, ...] = explained(
        ("adamw_torch", "adamw_torch_fused"),
        "AdamW rescales every entry of a gradient on its own, which gives the update full rank. SGD, tensor_adam and "
        "others keep the low rank, from which texts can be spelled out (arXiv 2405.15586).",
    )
    max_learning_rate: float = explained(
        1e-3, "Larger steps make single neurons die after one text, and keep its gradient (arXiv 2404.00473)."
    )
    max_lora_learning_rate: float = explained(
        1e-2, "The same for LoRA, whose factors begin at zero and need larger steps."
    )
    min_batch_size: int = explained(4, "A step on fewer texts is nearly the gradient of each.")
    min_steps: int = explained(
        8, "Optimizer steps in a round. An update is the sum of its steps; with fewer, it is nearly one gradient."
    )
    min_max_length: int = explained(32, "Tokens to which a text is cut. Of shorter pieces, each shows its few tokens.")
    max_skip_tokens: int = explained(
        4, "Leading answer tokens without loss. Skipping more leaves few positions in the sum."
    )
    max_grad_norm: float = explained(
        10.0, "Clipping must be on, and not above this norm, so that no single step outweighs all others."
    )
    factor: float = explained(
        10.0,
        "How far gamma and alpha may be from the objective's defaults, as a factor, so that neither loss vanishes. Where "
        "the default is 0, at most 1.",
    )
    max_adam_epsilon: float = explained(1e-6, "With a large epsilon, AdamW leaks like SGD.")

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "optimizers" and not getattr(self, item.name) >= 0:
                raise PlanError(f"policy: plan: {item.name}: expected at least 0, found {getattr(self, item.name)}")

    def violations(self, training: Training) -> list[str]:
        """Which bounds a plan exceeds, without those that depend on the client's text."""
        lora = bool(training.lora_rank)
        rate, option = (
            (self.max_lora_learning_rate, "max lora learning rate")
            if lora
            else (self.max_learning_rate, "max learning rate")
        )
        reasons = [
            f"plan: {name} is {limit:g}, asked for {asked:g}"
            for name, limit, asked, broken in (
                (option, rate, training.learning_rate, _above(training.learning_rate, rate)),
                ("min batch size", self.min_batch_size, training.batch_size, training.batch_size < self.min_batch_size),
                ("min max length", self.min_max_length, training.max_length, training.max_length < self.min_max_length),
                (
                    "max adam epsilon",
                    self.max_adam_epsilon,
                    training.adam_epsilon,
                    _above(training.adam_epsilon, self.max_adam_epsilon),
                ),
                (
                    "max grad norm",
                    self.max_grad_norm,
                    training.max_grad_norm,
                    not training.max_grad_norm or _above(training.max_grad_norm, self.max_grad_norm),
                ),
            )
            if broken
        ]
        if training.optimizer not in self.optimizers:
            reasons.append(f"plan: optimizers are {', '.join(self.optimizers)}, asked for {training.optimizer}")
        default, asked_for = OBJECTIVES[training.objective], training.resolved()
        if asked_for.skip_tokens > self.max_skip_tokens:
            reasons.append(f"plan: max skip tokens is {self.max_skip_tokens}, asked for {asked_for.skip_tokens}")
        for name in ("gamma", "alpha"):
            usual, asked = getattr(default, name), getattr(asked_for, name)
            least, most = (usual / self.factor, usual * self.factor) if usual else (0.0, 1.0)
            if _above(asked, most) or _above(least, asked):
                reasons.append(f"plan: {name} is {least:g} to {most:g} for {training.objective}, asked for {asked:g}")
        return reasons

    def too_few_steps(self, training: Training, texts: int) -> str | None:
        """Why a round on this many texts to forget is too short; None if it is not.

        Args:
            training: the plan.
            texts: the number of texts in the forget set, decoys included.
        """
        steps = training.epochs * -(-texts // training.batch_size)
        if steps >= self.min_steps:
            return None
        return (
            f"plan: {training.epochs} epochs of {texts} texts in batches of {training.batch_size} are {steps} steps; min steps "
            f"is {self.min_steps}; agree with the server on a smaller --batch-size or more --epochs, or add --decoys"
        )


def _above(value: float, limit: float) -> bool:
    return value > limit * (1 + ROUNDING)
