"""How the data owner's machine does the work: none of it changes what is computed, and none of it concerns the server."""

from dataclasses import dataclass
from typing import Literal

from mpunlearn.errors import PlanError


@dataclass(frozen=True)
class Resources:
    """Memory, precision, checkpoints and loggers of local training.

    Raises:
        PlanError: a value is out of its range.
    """

    micro_batch_size: int | None = None
    """forget examples per forward pass and process (default: the whole batch); a batch takes as many passes as it needs, and
    the update stays the same"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """arithmetic of the forward and backward passes; weights and optimizer stay in float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    save_every: int = 0
    """optimizer steps between checkpoints from which an interrupted training goes on; 0 for none"""
    report_to: str = "none"
    """where losses are logged, by the names of transformers: tensorboard, wandb, trackio, …"""
    log_dir: str | None = None
    """folder for tensorboard's files"""

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise PlanError(f"--micro-batch-size: expected at least 1, found {self.micro_batch_size}")
        if self.save_every < 0:
            raise PlanError(f"--save-every: expected at least 0, found {self.save_every}")
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise PlanError(f"--precision: expected float32, bfloat16 or float16, found {self.precision}")
