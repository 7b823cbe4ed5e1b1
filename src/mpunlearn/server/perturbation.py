"""How the server perturbs the model before publishing it: number of copies, noise, reparameterization, denoising."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mpunlearn.errors import PlanError
from mpunlearn.schema import check_options, older
from mpunlearn.server import design as designs
from mpunlearn.server.design import CopyDesign

ALPHA_RANGE = (1.0, 2.0)
"""Range from which the secret noise scales α_k are drawn uniformly."""
SCALE_RANGE = (1.0, 1.1)
"""Range of the secret factors of the scales x_k of `extrapolate`: narrow, so that no two scales come close."""
MAX_KAPPA = 10.0
Strength = Literal["full", "paper", "none"]


@dataclass(frozen=True)
class Perturbation:
    """How the server perturbs the model before publishing it.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    copies: int = 3
    """Number m of published copies. With a single copy, nothing cancels the noise."""
    kappa: float = 0.05
    """Level of the noise that cancels. The noise in a block (a transformer layer, or a tensor outside the layers) has a
    standard deviation of kappa times the RMS of the block's task vector (if --base is given) or of its weights. 0 turns
    the noise off."""
    reparameterization: Strength = "full"
    """Strength of the secret reparameterization of each copy: all exact symmetries of the model family (full), only
    those used in the paper (paper), or none."""
    denoising: Literal["harmonic", "extrapolate"] = "harmonic"
    """How the effect of the noise is canceled: harmonic, as in the paper, cancels its first order; extrapolate cancels
    all orders up to copies - 1."""
    alphas: tuple[float, ...] | None = None
    """Secret noise scales of the copies, such as 1,1.5,2 (default: drawn anew in every round)."""
    common_noise: float | Literal["auto"] = older(absent=0.0, default="auto")
    """Level κ_c of the secret offset that all copies share and that never cancels for a client: its standard deviation
    relative to the RMS of the weights. With auto, the level that `mpunlearn calibrate` found for this model, or 5 %
    without calibration. With 0 there is no offset, and whoever holds all copies of a round can recover the model."""
    common_noise_shape: Literal["whitened", "gauss"] = "whitened"
    """Shape of the offset: whitened spares the directions in which the inputs of a layer vary most (it needs
    `mpunlearn calibrate`), gauss treats all alike."""
    noise_scope: Literal["all", "layers"] = "all"
    """Which tensors get noise: all, or only those of the transformer layers, which leaves embeddings, LM head and final
    norm unchanged, as the paper's code does."""
    noise_floor: Literal["none", "grid"] = "none"
    """Minimum noise level. With grid, the standard deviation at each entry is at least the spacing of the storage dtype
    there, so that rounding cannot undo the noise of a single copy. It helps an attacker who holds all copies, because
    they then round differently."""
    publish_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Storage dtype of the copies (default: that of each tensor in the checkpoint)."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.copies < 1:
            raise PlanError(f"--copies: expected at least 1, found {self.copies}")
        if not 0 <= self.kappa <= MAX_KAPPA:
            raise PlanError(f"--kappa: expected a number from 0 to {MAX_KAPPA:g}, found {self.kappa:g}")
        if self.common_noise != "auto" and not 0 <= self.common_noise <= MAX_KAPPA:
            raise PlanError(
                f"--common-noise: expected auto, or a number from 0 to {MAX_KAPPA:g}, found {self.common_noise:g}"
            )
        if self.alphas is not None and len(self.alphas) != self.copies:
            raise PlanError(
                f"--alphas: expected {self.copies} values for --copies {self.copies}, found {len(self.alphas)}"
            )
        self.design(self.scales(None))

    def scales(self, uniforms: list[float] | None) -> list[float]:
        """The scales α_k (harmonic) or x_k (extrapolate) of the copies; empty for a design without scales.

        Args:
            uniforms: 2m secret uniform numbers in [0, 1). The first m determine α_k, or the sizes of x_k within
                `SCALE_RANGE`, and the others the order of x_k. None means zeros.
        """
        if self.copies == 1 or self.kappa == 0:
            if self.alphas is not None:
                raise PlanError("--alphas: requires at least 2 --copies and --kappa above 0; leave the option out")
            return []
        if self.alphas is not None:
            return list(self.alphas)
        if self.denoising == "extrapolate":
            known = designs.default_scales(self.copies)
            if uniforms is None:
                return known
            order = sorted(range(self.copies), key=uniforms[self.copies :].__getitem__)
            low, high = SCALE_RANGE
            return [known[index] * (low + (high - low) * uniforms[index]) for index in order]
        low, high = ALPHA_RANGE
        return [low + (high - low) * uniform for uniform in (uniforms or [0.0] * self.copies)[: self.copies]]

    def design(self, scales: list[float]) -> CopyDesign:
        """The copy design with the given scales."""
        if self.kappa == 0:
            return designs.noise_free(self.copies)
        if self.copies == 1:
            return designs.single_copy()
        return designs.extrapolated(scales) if self.denoising == "extrapolate" else designs.harmonic(scales)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        values = {**dataclasses.asdict(self), "alphas": list(self.alphas) if self.alphas is not None else None}
        if self.common_noise == 0:  # as before there was common noise, so that old runs keep their streams
            del values["common_noise"], values["common_noise_shape"]
        return values
