"""Options for training on the data owner's machine. The server never sees them. They change results only by rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mpunlearn.errors import PlanError
from mpunlearn.schema import check_options

Callback = Callable[[int, dict[str, float]], None]
"""Called after every optimizer step of a training with the number of the step, which starts at 1, and a dict with
`forget_loss`, `retain_loss` and `learning_rate`, and for a published copy its `round` and `copy`. An exception ends the
training."""


@dataclass(frozen=True)
class Resources:
    """Memory, precision, checkpoints and experiment trackers for local training.

    Raises:
        PlanError: a value has the wrong type or is out of range.
    """

    micro_batch_size: int | None = None
    """Forget examples per forward pass and process (default: the whole batch). Smaller micro-batches need less memory
    and give the same update."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward and backward passes. Weights and optimizer state stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory but takes more time."""
    cpu_offload: bool = False
    """With several processes, keep weights, gradients and optimizer state in the memory of the host while a GPU does not
    need them. Saves memory of the GPUs, but takes more time."""
    save_every: int = 0
    """Optimizer steps between checkpoints, from which an interrupted training can resume; 0 saves none."""
    report_to: str = "none"
    """Where to log losses: tensorboard, wandb, trackio, or another tracker that accelerate supports."""
    log_dir: str = "runs"
    """Folder for trackers that write files, such as tensorboard."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise PlanError(f"--micro-batch-size: expected at least 1, found {self.micro_batch_size}")
        if self.save_every < 0:
            raise PlanError(f"--save-every: expected at least 0, found {self.save_every}")
