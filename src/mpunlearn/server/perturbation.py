"""Perturbation."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mpunlearn.checkpoint import FLOAT_DTYPES
from mpunlearn.errors import PlanError
from mpunlearn.server import design as designs
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.reparameterization import STRENGTHS

ALPHA_RANGE = (1.0, 2.0)


@dataclass(frozen=True)
class Perturbation:
    """What the server does to the model before it shows it.

    Raises:
        PlanError: a value is out of its range, or two contradict each other.
    """

    copies: int = 3
    """number m of copies; 1 is the single noisy copy, whose noise nothing cancels"""
    kappa: float = 0.01
    """noise level: σ of a block is kappa times the RMS of its task vector (with a base) or of its weights; 0 for no noise"""
    reparameterization: Literal["full", "paper", "none"] = "full"
    """strength of the secret change of basis"""
    denoising: Literal["harmonic", "extrapolate"] = "harmonic"
    """harmonic is the paper's; extrapolate cancels all orders of the noise up to copies - 1"""
    alphas: tuple[float, ...] | None = None
    """secret scales of the copies' noise, such as 1,1.5,2 (default: drawn uniformly from [1, 2])"""
    noise_scope: Literal["all", "layers"] = "all"
    """all noises every tensor; layers leaves embeddings, LM head and final norm without noise, as the paper's code does"""
    noise_floor: Literal["none", "grid"] = "none"
    """grid raises σ, entry by entry, to at least the spacing of the storage dtype, so that rounding cannot undo the noise"""
    publish_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """storage dtype of the copies (default: each tensor's own)"""

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise PlanError(f"--copies: expected at least 1, found {self.copies}")
        if not (math.isfinite(self.kappa) and self.kappa >= 0):
            raise PlanError(f"--kappa: expected a number of at least 0, found {self.kappa}")
        for flag, value, known in (
            ("--reparameterization", self.reparameterization, STRENGTHS),
            ("--denoising", self.denoising, ("harmonic", "extrapolate")),
            ("--noise-scope", self.noise_scope, ("all", "layers")),
            ("--noise-floor", self.noise_floor, ("none", "grid")),
            ("--publish-dtype", self.publish_dtype, (None, *FLOAT_DTYPES)),
        ):
            if value not in known:
                raise PlanError(f"{flag}: expected one of {', '.join(map(str, known))}, found {value}")
        if self.alphas is not None:
            object.__setattr__(self, "alphas", tuple(self.alphas))
            if len(self.alphas) != self.copies:
                raise PlanError(
                    f"--alphas: expected {self.copies} values for --copies {self.copies}, found {len(self.alphas)}"
                )
        self.design(self.scales(None))

    def scales(self, uniforms: list[float] | None) -> list[float]:
        """α_k (harmonic) or x_k (extrapolate) of the copies; empty for a design without scales.

        Args:
            uniforms: m secret numbers in [0, 1); None stands for zeros.
        """
        if self.copies == 1 or self.kappa == 0:
            if self.alphas is not None:
                raise PlanError("--alphas: needs at least 2 copies and --kappa above 0, else there is nothing to scale")
            return []
        if self.alphas is not None:
            return list(self.alphas)
        if self.denoising == "extrapolate":
            return designs.default_scales(self.copies)
        low, high = ALPHA_RANGE
        return [low + (high - low) * uniform for uniform in uniforms or [0.0] * self.copies]

    def design(self, scales: list[float]) -> CopyDesign:
        """The copy design with those scales."""
        if self.kappa == 0:
            return designs.noise_free(self.copies)
        if self.copies == 1:
            return designs.single_copy()
        return designs.extrapolated(scales) if self.denoising == "extrapolate" else designs.harmonic(scales)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {**dataclasses.asdict(self), "alphas": list(self.alphas) if self.alphas is not None else None}
