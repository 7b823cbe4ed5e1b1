"""The training plan: how the client trains, as agreed by both parties before a run.

Nothing in it is secret. Noise levels and scales are private to the server (see `server.perturbation`).
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpunlearn.errors import PlanError
from mpunlearn.protocol.objectives import HYPERPARAMETERS, OBJECTIVES, Objective, ObjectiveName, RetainLoss
from mpunlearn.schema import check_options, older, read, write

P = TypeVar("P")


@dataclass(frozen=True)
class Training:
    """How the client trains on a published copy. The plan is the same for all copies of a run.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    objective: ObjectiveName = "npo"
    """The unlearning objective."""
    epochs: int = 2
    """Number of passes over the forget set in one round."""
    learning_rate: float = 1e-5
    """Learning rate of the optimizer."""
    batch_size: int = 32
    """Number of forget examples per optimizer step, over all processes."""
    gamma: float | None = None
    """Weight of the forget loss (default: depends on the objective)."""
    alpha: float | None = None
    """Weight of the retain loss (default: depends on the objective)."""
    retain_loss: RetainLoss | None = None
    """The retain loss: nll is the negative log-likelihood of the retain answers, kl the KL divergence from the
    predictions of the reference model, jsd the Jensen-Shannon divergence from them, and hidden (for rmu) the distance
    from its hidden states (default: depends on the objective)."""
    skip_tokens: int | None = None
    """Number of leading answer tokens of each forget example that are excluded from the loss (default: depends on the
    objective)."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameters of the objective by name, such as beta (default: depends on the objective)."""
    optimizer: str = "adamw_torch"
    """The optimizer: a name from transformers, or tensor_adam, an Adam variant whose steps do not depend on the
    reparameterization. Its state is reset for every copy and round."""
    adam_epsilon: float = 1e-8
    """Adam's ε. With a larger value, the first steps are smoother functions of the weights."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm for clipping. 0 turns clipping off."""
    sam_radius: float = 0.0
    """Sharpness-aware minimization of the forget loss, which makes relearning harder: its gradient is taken at the weights
    moved by this distance in the direction in which the loss rises fastest (such as 0.01). It costs a second forward and
    backward pass of the forget examples. 0 turns it off."""
    scheduler: str = "constant"
    """Learning-rate schedule within a round: a name from transformers."""
    warmup_steps: int = 0
    """Number of optimizer steps over which the learning rate increases from 0."""
    train: str = "blocks"
    """Which weights are trained: blocks (the transformer layers without their token-local weights), all, or a regular
    expression over tensor names. The update of an embedding, of the LM head or of a token-local weight reveals to the
    server which tokens occur in the forget set."""
    token_local: bool = older(absent=True, default=False)
    """With --train blocks, also train the token-local weights: those whose input depends on the current token alone, that
    is, layer 0's q, k and v, and its FFN where attention and FFN are parallel."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the selected linear weights. Only the adapters are trained, and their factors are sent
    as the update. 0 trains the weights themselves."""
    lora_alpha: float | None = None
    """LoRA scaling: the product of the factors is multiplied by lora-alpha / lora-rank (default: twice the rank)."""
    update_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage dtype of the update."""
    max_length: int = 512
    """Maximum number of tokens in an example. Longer answers are truncated, longer plain texts are split."""
    seed: int = 0
    """Random seed of the batch order and of dropout, the same for all copies."""

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise PlanError(f"{_option(name)}: expected at least 1, found {getattr(self, name)}")
        for name in (
            "learning_rate",
            "adam_epsilon",
            "weight_decay",
            "max_grad_norm",
            "sam_radius",
            "warmup_steps",
            "seed",
            "gamma",
            "alpha",
            "skip_tokens",
            "lora_rank",
            "lora_alpha",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise PlanError(f"{_option(name)}: expected a number of at least 0, found {value}")
        if self.seed >= 1 << 32:
            raise PlanError(f"--seed: expected a number below 2^32, found {self.seed}")
        self.resolved()

    def resolved(self) -> Objective:
        """The objective, with the overrides of this plan applied.

        Raises:
            PlanError: the objective does not have one of the hyperparameters, or a value is not valid for it.
        """
        objective = OBJECTIVES[self.objective]
        for name, value in self.parameters.items():
            if name not in objective.parameters:
                known = ", ".join(_option(known) for known in objective.parameters) or "none"
                raise PlanError(f"{_option(name)}: not a hyperparameter of {self.objective}, which has {known}")
            if HYPERPARAMETERS[name][0] is int and value != int(value):
                raise PlanError(f"{_option(name)}: expected an integer, found {value:g}")
            if name == "soft" and value not in (0, 1):
                raise PlanError(f"--soft: expected 0 or 1, found {value:g}")
            if name == "components" and value < 0:
                raise PlanError(f"--components: expected a number of at least 0, found {value:g}")
            if name == "beta" and value <= 0:
                raise PlanError(f"--beta: expected a number above 0, found {value:g}")
        if self.retain_loss == "hidden" and "layer" not in objective.parameters:
            raise PlanError(f"--retain-loss hidden: only available for --objective rmu, found {self.objective}")
        names = ("gamma", "alpha", "retain_loss", "skip_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parameters = {**objective.parameters, **self.parameters}
        objective = dataclasses.replace(objective, **given, parameters=parameters)
        if objective.combine in ("normalized", "dual") and not objective.alpha:
            raise PlanError(f"--alpha 0: {self.objective} needs a retain gradient; expected a number above 0")
        if objective.combine == "collapsed" and self.lora_rank:
            raise PlanError(
                f"--lora-rank: not supported by {self.objective}, which needs the gradients of whole weights; leave it out"
            )
        return objective

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**dataclasses.asdict(self), "parameters": dict(self.parameters)}


def pin(path: Path, plan: P, read_pinned: Any = read) -> None:
    """Writes the plan of a new run to a directory of mode 0700, or compares it with the existing run's plan.

    Args:
        path: the file of the plan.
        plan: the plan, a dataclass.
        read_pinned: reads the dataclass from the file, also in older formats, with the signature of `schema.read`.

    Raises:
        PlanError: the existing run has a different plan (the message lists each option with both values), or the file
            cannot be written.
    """
    if path.exists():
        pinned = read_pinned(type(plan), path)
        changes = _changes(dataclasses.asdict(pinned), dataclasses.asdict(plan))  # type: ignore[call-overload]
        if changes:
            raise PlanError(
                f"{path.parent.parent if path.parent.name in ('server', 'client') else path.parent}: the run was started "
                f"with {'; '.join(changes)}; use the same options to resume it, or another directory for a new run"
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        write(path, plan)
    except OSError as error:
        raise PlanError(f"{path.parent}: cannot be written: {error.strerror}") from error


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options that differ, each formatted like "--kappa 0.05, not 0.1"."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changes += _changes(before, now)
        elif before != now:
            changes.append(f"{_option(name)} {_shown(before)}, not {_shown(now)}")
    return changes


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"with SHA-256 {value[:12]}"
    return "(none)" if value is None or value == {} else f"{value!s:.80}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
