"""How the client trains: what both parties agree on before a run.

Nothing here is secret to either party. Noise levels and scales are the server's own affair (`server.perturbation`).
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpunlearn.errors import PlanError
from mpunlearn.protocol.objectives import HYPERPARAMETERS, OBJECTIVES, Objective, ObjectiveName, RetainLoss
from mpunlearn.schema import check_options, read, write

P = TypeVar("P")


@dataclass(frozen=True)
class Training:
    """How one published copy is turned into an update. It is the same for every copy of a run.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    objective: ObjectiveName = "npo"
    """The unlearning objective."""
    epochs: int = 2
    """Passes over the forget set in one round."""
    learning_rate: float = 1e-5
    """The optimizer's learning rate."""
    batch_size: int = 32
    """Forget examples per optimizer step, over all processes."""
    gamma: float | None = None
    """Weight of the forget loss (default: the objective's)."""
    alpha: float | None = None
    """Weight of the retain loss (default: the objective's)."""
    retain_loss: RetainLoss | None = None
    """The retain loss. nll: the likelihood of the retain answers; kl: divergence from the reference model's predictions;
    hidden: distance from the reference model's hidden states, for rmu (default: the objective's)."""
    skip_tokens: int | None = None
    """Leading answer tokens of each forget example that carry no loss (default: the objective's)."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """The objective's own hyper-parameters by name, such as beta (default: the objective's)."""
    optimizer: str = "adamw_torch"
    """The optimizer, by its name in transformers, or tensor_adam, whose steps do not depend on the reparameterization. Its
    state starts afresh for every copy and round."""
    adam_epsilon: float = 1e-8
    """Adam's ε. A larger value makes its first steps smoother functions of the weights."""
    weight_decay: float = 0.0
    """The optimizer's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    scheduler: str = "constant"
    """Learning-rate schedule within a round, by its name in transformers."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    train: str = "blocks"
    """Which weights train: blocks (the transformer layers), all, or a regular expression over tensor names. Training the
    embeddings or the LM head shows the server which tokens the forget set contains."""
    lora_rank: int = 0
    """Rank of the LoRA adapters that are trained on the selected linear weights and whose factors are sent; 0 trains the
    weights themselves."""
    lora_alpha: float | None = None
    """The product of the LoRA factors is scaled by lora-alpha / lora-rank (default: twice the rank)."""
    update_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage dtype of the update."""
    max_length: int = 512
    """Maximum number of tokens of an example. Longer answers are cut, longer plain texts are split."""
    seed: int = 0
    """Seed of the order of batches and of dropout, the same for all copies."""

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
        """The objective with everything that this plan overrides.

        Raises:
            PlanError: the objective has no such hyper-parameter, or a value makes no sense for it.
        """
        objective = OBJECTIVES[self.objective]
        for name, value in self.parameters.items():
            if name not in objective.parameters:
                known = ", ".join(_option(known) for known in objective.parameters) or "none"
                raise PlanError(f"{_option(name)}: not a hyper-parameter of {self.objective}, which has {known}")
            if HYPERPARAMETERS[name][0] is int and value != int(value):
                raise PlanError(f"{_option(name)}: expected an integer, found {value:g}")
            if name == "beta" and value <= 0:
                raise PlanError(f"--beta: expected a number above 0, found {value:g}")
        if self.retain_loss == "hidden" and "layer" not in objective.parameters:
            raise PlanError(
                f"--retain-loss hidden: only rmu names a layer whose hidden states are compared; {self.objective} does not"
            )
        names = ("gamma", "alpha", "retain_loss", "skip_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parameters = {**objective.parameters, **self.parameters}
        objective = dataclasses.replace(objective, **given, parameters=parameters)
        if objective.combine != "sum" and not objective.alpha:
            raise PlanError(f"--alpha 0: {self.objective} combines a forget and a retain gradient and needs both")
        return objective

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**dataclasses.asdict(self), "parameters": dict(self.parameters)}


def pin(path: Path, plan: P, read_pinned: Any = read) -> None:
    """Writes the plan of a new run into a directory of mode 0700, or checks that the run there has the same plan.

    Args:
        path: the plan's file.
        plan: a dataclass.
        read_pinned: reads the dataclass back, also from the formats of older versions: `schema.read`, or a function like it.

    Raises:
        PlanError: the run has another plan; the message names each option with both values. Or the file cannot be written.
    """
    if path.exists():
        pinned = read_pinned(type(plan), path)
        changes = _changes(dataclasses.asdict(pinned), dataclasses.asdict(plan))  # type: ignore[call-overload]
        if changes:
            raise PlanError(
                f"{path.parent.parent if path.parent.name in ('server', 'client') else path.parent}: this run was started with "
                f"{'; '.join(changes)}. Give the same options to go on with it, or name another directory for a new run"
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        write(path, plan)
    except OSError as error:
        raise PlanError(f"{path.parent}: cannot be written: {error.strerror}") from error


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every option that differs, as "--kappa 0.05, not 0.1"."""
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
