"""What both parties agree on before a run: how the client trains, and for how many rounds.

Nothing here is secret to either party; noise levels and scales are the server's own affair (`server.preprocess`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpunlearn.errors import PlanError
from mpunlearn.files import read_json, write_json


@dataclass(frozen=True)
class Training:
    """How one published copy is turned into an update. The same for every copy of a run.

    Raises:
        PlanError: a value is out of its range.
    """

    objective: str = "npo"
    """unlearning objective"""
    epochs: int = 2
    """passes over the forget set in one round"""
    learning_rate: float = 1e-5
    """of the optimizer"""
    batch_size: int = 32
    """forget examples per optimizer step, over all processes"""
    gamma: float | None = None
    """weight of the forget loss (default: the objective's)"""
    alpha: float | None = None
    """weight of the retain loss (default: the objective's)"""
    retain_loss: Literal["nll", "kl", "hidden"] | None = None
    """nll: the retain answers' own likelihood; kl: closeness to the reference model's predictions; hidden: to its hidden states
    (default: the objective's)"""
    skip_tokens: int | None = None
    """first answer tokens of each forget example that carry no loss (default: the objective's)"""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """the objective's own hyper-parameters by name, such as beta (default: the objective's)"""
    optimizer: str = "adamw_torch"
    """optimizer, by its name in transformers, or tensor_adam, for which a change of basis makes no difference; it starts afresh
    for every copy and round"""
    adam_epsilon: float = 1e-8
    """ε of Adam; a larger one makes its first steps smoother in the weights"""
    weight_decay: float = 0.0
    """of the optimizer"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    scheduler: str = "constant"
    """learning-rate schedule within a round, by its name in transformers"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate rises from 0"""
    train: str = "blocks"
    """which weights train: blocks (transformer layers only), all, or a regular expression over tensor names. An update of the
    embeddings or the LM head shows the server which tokens the forget set holds"""
    lora_rank: int = 0
    """train LoRA adapters of this rank on the selected linear weights, and send their factors; 0 trains the weights"""
    lora_alpha: float | None = None
    """the adapters' product is multiplied by lora-alpha / lora-rank (default: twice the rank)"""
    update_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """storage dtype of the update"""
    max_length: int = 512
    """tokens per example; longer answers are cut, longer plain texts are split"""
    seed: int = 0
    """of the order of batches and of dropout, equal for all copies"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise PlanError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        if self.update_dtype not in ("float32", "bfloat16", "float16"):
            raise PlanError(f"--update-dtype: expected float32, bfloat16 or float16, found {self.update_dtype}")
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
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise PlanError(f"--{name.replace('_', '-')}: expected a number of at least 0, found {value}")
        if self.seed >= 1 << 32:
            raise PlanError(f"--seed: expected a number below 2^32, found {self.seed}")
        for name, value in self.parameters.items():
            if not math.isfinite(value):
                raise PlanError(f"--{name.replace('_', '-')}: expected a number, found {value}")

    def plain(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {**asdict(self), "parameters": dict(self.parameters)}


def pin(path: Path, plan: Mapping[str, Any], out: Path) -> None:
    """Writes the plan of a new run into a folder of mode 0700, or checks that an old one is the same.

    Args:
        path: the plan's file.
        out: the run's directory, for errors.

    Raises:
        PlanError: the run that is there has another plan, or the file cannot be written.
    """
    if path.exists():
        pinned = read_json(path)
        if changed := [key for key, value in plan.items() if pinned.get(key) != value]:
            raise PlanError(
                f"{out}: holds a run with another {' and '.join(changed)}; give the same arguments to go on with it, or name "
                "another directory"
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        write_json(path, plan, mode=0o600)
    except OSError as error:
        raise PlanError(f"{out}: cannot be written: {error.strerror}") from error
