"""What both parties agree on before a run: how the client trains, and for how many rounds.

Nothing here is secret to either party; noise levels and scales are the server's own affair (`server.preprocess`).
"""

import math
from dataclasses import dataclass

from mpunlearn.errors import PlanError


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
    """of AdamW, which starts afresh for every copy and round"""
    batch_size: int = 32
    """forget examples per optimiser step"""
    gamma: float | None = None
    """weight of the forget loss (default: the objective's)"""
    alpha: float | None = None
    """weight of the retain loss (default: the objective's)"""
    beta: float | None = None
    """sharpness of npo's forget loss (default: the objective's)"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    scheduler: str = "constant"
    """learning-rate schedule within a round, by its name in transformers"""
    warmup_steps: int = 0
    """optimiser steps over which the learning rate rises from 0"""
    train: str = "blocks"
    """which weights train: blocks (transformer layers only), all, or a regular expression over tensor names. An update of the
    embeddings or the LM head shows the server which tokens the forget set holds"""
    max_length: int = 512
    """tokens per example; longer answers are cut, longer plain texts are split"""
    seed: int = 0
    """of the order of batches and of dropout, equal for all copies"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise PlanError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "seed",
            "gamma",
            "alpha",
            "beta",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise PlanError(f"--{name.replace('_', '-')}: expected a number of at least 0, found {value}")
