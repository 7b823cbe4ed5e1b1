"""Pre-Process: one checkpoint in, m published copies out.

    θ_k = T_k(θ + ε_k),    ε_k = σ Σ_d A_kd z_d        (arXiv 2602.23798, Algorithm 1)

One pass measures σ and fingerprints θ, a second streams it tensor by tensor through noise, reparameterisation and the cast
to the storage dtype, which comes last and once. The copies get their names together, by one rename, after the round's
record is safe in the server's state.

Not covered: noise below the spacing of the storage dtype is lost to the cast.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mpunlearn.architecture import FAMILIES, Architecture, Place
from mpunlearn.architecture.spaces import architecture_of, compute_dtype
from mpunlearn.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorWriter,
    copy_companions,
    new_directory,
    write_json,
)
from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.progress import progress
from mpunlearn.protocol.exchange import CARD, Card
from mpunlearn.server import design as designs
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.noise import block_of, copy_noise, draw, measure
from mpunlearn.server.reparameterization import STRENGTHS, Reparameterization
from mpunlearn.server.secret import Secret
from mpunlearn.server.state import RoundRecord, ServerState

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


class Publisher:
    """Computes published tensors, the same whenever it is asked.

    Args:
        secret: the run's secret.
        record: the round.
        architecture: the model's.
    """

    def __init__(self, secret: Secret, record: RoundRecord, architecture: Architecture) -> None:
        self._secret, self._record = secret, record
        self.perturbation = Perturbation(**record.settings)
        self.design = self.perturbation.design(record.alphas)
        self.maps = [
            Reparameterization(architecture, self.perturbation.reparameterization, secret, record.round, copy)
            for copy in range(self.design.copies)
        ]

    def dtype(self, name: str) -> torch.dtype:
        """The storage dtype of a tensor in the copies."""
        return FLOAT_DTYPES[self.perturbation.publish_dtype or self._record.dtypes[name]]

    def tensors(
        self, name: str, place: Place, stored: torch.Tensor, copies: list[int] | None = None
    ) -> list[torch.Tensor]:
        """T_k(θ + ε_k) of one tensor for some copies (from 0; default all), in the published dtype."""
        value = stored.to(compute_dtype(stored.dtype))
        silent = place.layer is None and self.perturbation.noise_scope == "layers"
        sigma = 0.0 if silent else self._record.sigma[block_of(name, place)]
        draws = draw(self._secret, self.design, self._record.round, name, value) if sigma else []
        published = []
        for copy in range(self.design.copies) if copies is None else copies:
            noise = copy_noise(draws, self.design, sigma, copy)
            noisy = value if noise is None else value + noise
            published.append(self.maps[copy].apply(place, noisy).to(self.dtype(name)))
        return published


def preprocess(
    checkpoint: str | Path,
    *,
    state: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    perturbation: Perturbation | None = None,
) -> list[Path]:
    """Publishes the copies of the next round.

    Args:
        checkpoint: the server's model θ, a checkpoint directory.
        state: the server's secret state; created with the first round, and the same directory for all rounds of a run.
        out: a new directory for the copies, OUT/copy-1 … OUT/copy-m. Nothing in it is secret.
        base: the public checkpoint that the model was trained from; the noise is then relative to the task vector.
        perturbation: number of copies, noise level, reparameterisation.

    Returns:
        The directories of the copies, in order.

    Raises:
        CheckpointError: the checkpoint or the base is damaged, or `out` exists or cannot be written.
        UnsupportedModelError: the model's family or number format has no exact handling.
        StateError: the state is damaged, or a round is open with other inputs.
    """
    perturbation = perturbation or Perturbation()
    source, out = Checkpoint(checkpoint), Path(out)
    architecture = architecture_of(source, FAMILIES)
    places = architecture.places(source)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another directory for the copies, or remove this one")
    server = ServerState(state)
    rms, digests = measure(source, Checkpoint(base) if base is not None else None, places)
    number = server.next_round
    uniforms = [float(u) for u in server.secret.stream("alpha", number).uniforms(perturbation.copies)]
    record = RoundRecord(
        round=number,
        checkpoint=str(source.path.resolve()),
        digests=digests,
        dtypes=server.rounds[0].dtypes if server.rounds else {n: _name(source.tensors[n].dtype) for n in places},
        settings=_plain(perturbation),
        alphas=perturbation.scales(uniforms),
        sigma={block: perturbation.kappa * value for block, value in rms.items()},
    )
    publisher = Publisher(server.secret, record, architecture)
    with new_directory(out) as folder:
        with ExitStack() as stack:
            specs = {name: (publisher.dtype(name), source.tensors[name].shape) for name in places}
            writers = []
            for copy in range(1, perturbation.copies + 1):
                target = folder / f"copy-{copy}"
                target.mkdir()
                copy_companions(source.path, target)
                card = Card(server.run, number, copy, perturbation.copies)
                write_json(target / "config.json", derived_config(source.config, specs, card))
                writers.append(stack.enter_context(TensorWriter(target, specs)))
            for name, place in progress(places.items(), f"round {number}: publishing {perturbation.copies} copies"):
                for writer, tensor in zip(writers, publisher.tensors(name, place, source.read(name)), strict=True):
                    writer.write(name, tensor)
        server.open(record)
    return [out / f"copy-{copy}" for copy in range(1, perturbation.copies + 1)]


def derived_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], card: Card | None = None
) -> dict[str, Any]:
    """The config.json of a checkpoint made from another: the dtype that most of its tensors have, the card of a copy or none,
    and not the path that the server loaded its model from.
    """
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", CARD)}
    dtypes = [dtype for dtype, _ in specs.values()]
    kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = _name(max(dtypes, key=dtypes.count))
    return {**kept, **(card.entry() if card else {})}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(perturbation: Perturbation) -> dict[str, Any]:
    settings = dataclasses.asdict(perturbation)
    settings["alphas"] = list(perturbation.alphas) if perturbation.alphas is not None else None
    return settings
