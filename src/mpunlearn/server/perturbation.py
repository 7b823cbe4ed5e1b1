"""What the server does to the model before it shows it: number of copies, noise level, reparameterization, denoising."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mpunlearn.errors import PlanError
from mpunlearn.schema import check_options
from mpunlearn.server import design as designs
from mpunlearn.server.design import CopyDesign

ALPHA_RANGE = (1.0, 2.0)
"""α_k is drawn uniformly from this range."""
MAX_KAPPA = 10.0
Strength = Literal["full", "paper", "none"]


@dataclass(frozen=True)
class Perturbation:
    """What the server does to the model before it shows it.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    copies: int = 3
    """Number m of copies. With 1, the single noisy copy, nothing cancels the noise."""
    kappa: float = 0.01
    """Noise level: σ of a block is kappa times the RMS of its task vector (if --base is given) or of its weights. 0 for no
    noise."""
    reparameterization: Strength = "full"
    """Strength of the secret reparameterization of each copy: all exact symmetries of the model family, those that the paper
    uses, or none."""
    denoising: Literal["harmonic", "extrapolate"] = "harmonic"
    """How the noise is made to cancel: harmonic, as in the paper, cancels its first order; extrapolate cancels all orders up to
    copies - 1."""
    alphas: tuple[float, ...] | None = None
    """Secret scales of the copies' noise, such as 1,1.5,2 (default: drawn uniformly from [1, 2])."""
    noise_scope: Literal["all", "layers"] = "all"
    """Which tensors get noise: all of them, or only those of the transformer layers, as in the paper's code, which leaves
    embeddings, LM head and final norm as they are."""
    noise_floor: Literal["none", "grid"] = "none"
    """With grid, σ is raised, entry by entry, to at least the spacing of the storage dtype, so that rounding cannot undo the
    noise."""
    publish_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Storage dtype of the copies (default: each tensor's own)."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.copies < 1:
            raise PlanError(f"--copies: expected at least 1, found {self.copies}")
        if not 0 <= self.kappa <= MAX_KAPPA:
            raise PlanError(f"--kappa: expected a number from 0 to {MAX_KAPPA:g}, found {self.kappa:g}")
        if self.alphas is not None and len(self.alphas) != self.copies:
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
                raise PlanError("--alphas: needs at least 2 copies and --kappa above 0, or there is nothing to scale")
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

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {**dataclasses.asdict(self), "alphas": list(self.alphas) if self.alphas is not None else None}
