"""Pre-Process: one checkpoint in, m published copies out.

    θ_k = T_k(θ + ε_k),    ε_k = σ Σ_d A_kd z_d        (arXiv 2602.23798, Algorithm 1)

One pass measures σ and fingerprints θ, a second streams it through noise, rotations, the cast to the storage dtype, which
comes once, and signed permutations, which move numbers without rounding. The copies get their names together, by one rename.

What the cast leaves of the noise is measured on the way: the share of published entries that equal the original's (before the
change of basis), and the bits of doubt that the noise leaves about an entry on the original's grid.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.architecture.spaces import architecture_of, compute_dtype
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint, TensorWriter, copy_companions, without_paths
from mpunlearn.errors import CheckpointError, DisclosureWarning, PlanError, StateError, UnsupportedModelError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import CARD, Card
from mpunlearn.server import design as designs
from mpunlearn.server.design import CopyDesign
from mpunlearn.server.noise import block_of, draw, floored, measure, noisy, spacing, uncertainty
from mpunlearn.server.reparameterization import STRENGTHS, Reparameterization
from mpunlearn.server.scratch import scratch
from mpunlearn.server.secret import Secret
from mpunlearn.server.state import RoundRecord, ServerState, locked
from mpunlearn.server.stream import Piece, arithmetic_device, chunks, in_parallel, on_device, pieces, read

ALPHA_RANGE = (1.0, 2.0)
SAMPLE = 4096
"""Entries of a piece from which the bits of doubt are estimated."""


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


@dataclass(frozen=True)
class Honesty:
    """What the cast to the storage dtype left of one tensor's noise."""

    equal: float
    """Share of published entries that equal the original's before the change of basis, in the copy with most of them."""
    bits: float
    """Mean doubt that the least noisy copy leaves about an entry, in bits: the entropy of the noise on the original's grid."""


@dataclass(frozen=True)
class Published:
    """A published round."""

    round: int
    copies: list[Path]
    """Their directories, in order."""
    honesty: dict[str, Honesty]
    """Per tensor; empty without noise."""

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"round {self.round}: {len(self.copies)} copies"]
        if self.honesty:
            values = list(self.honesty.values())
            bits = sorted(value.bits for value in values)
            lines.append(
                f"noise left after rounding: {bits[0]:.2f} to {bits[-1]:.2f} bits of doubt per entry, median tensor "
                f"{bits[len(bits) // 2]:.2f}; published entries that equal the original's, before the change of basis: at "
                f"most {max(value.equal for value in values):.1%} of a tensor"
            )
        return "\n".join(lines)


class Publisher:
    """Computes published tensors, the same whenever it is asked.

    Args:
        secret: the run's secret.
        record: the round.
        architecture: the model's.
        device: where the arithmetic runs.
    """

    def __init__(
        self, secret: Secret, record: RoundRecord, architecture: Architecture, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self._secret, self._record, self._inputs = secret, record, record.inputs
        self.perturbation = Perturbation(**record.settings)
        self.design = self.perturbation.design(record.alphas)
        self.maps = [
            Reparameterization(
                architecture, self.perturbation.reparameterization, secret, self._inputs, copy, self.device
            )
            for copy in range(self.design.copies)
        ]
        self._quietest = int((self.design.coefficients**2).sum(axis=1).argmin())

    def dtype(self, name: str) -> torch.dtype:
        """The storage dtype of a tensor in the copies."""
        return FLOAT_DTYPES[self.perturbation.publish_dtype or self._record.dtypes[name]]

    def sigma(self, piece: Piece) -> float:
        """The noise level of a piece's block, in units of the weights; 0 where there is no noise."""
        if piece.place.layer is None and self.perturbation.noise_scope == "layers":
            return 0.0
        return self._record.sigma[block_of(piece.name, piece.place)] if self.design.draws else 0.0

    def publish(
        self, piece: Piece, stored: torch.Tensor, copies: list[int] | None = None
    ) -> tuple[list[torch.Tensor], list[int]]:
        """T_k(θ + ε_k) of a piece.

        Args:
            stored: the piece's rows of θ.
            copies: for which copies (from 0; default all).

        Returns:
            The rows for each copy, in the published dtype, in scratch memory of the device; and for each how many entries
            equal θ's before the change of basis.

        Raises:
            UnsupportedModelError: a value leaves the range of the published dtype.
        """
        copies = list(range(self.design.copies)) if copies is None else copies
        dtype, sigma, device = self.dtype(piece.name), self.sigma(piece), self.device
        streams = [
            self._secret.stream("noise", self._inputs, number, piece.name)
            for number in range(self.design.draws if sigma else 0)
        ]
        rows, row = len(stored), stored.numel() // max(1, len(stored))
        maps = [self.maps[copy].maps(piece.place) for copy in copies]
        published = [scratch(f"published {copy}", tuple(stored.shape), dtype, device) for copy in copies]
        equal = [0] * len(copies)
        arithmetic = compute_dtype(stored.dtype)
        for start, stop in chunks(rows, row, maps[0][0].block, device):
            original = on_device(stored[start:stop], device, "original")
            value = scratch("value", tuple(original.shape), arithmetic, device).copy_(original)
            draws = draw(streams, (piece.start + start) * row, value)
            level = self._level(sigma, value, stored.dtype, dtype)
            for number, (copy, axes) in enumerate(zip(copies, maps, strict=True)):
                shown = noisy(value, draws, self.design, level, copy)
                if draws:
                    equal[number] += _equal(shown, original, dtype)
                shown = axes[0].rotate(shown, 0, start)
                for axis, axis_map in list(enumerate(axes))[1:]:
                    shown = axis_map.apply(shown, axis)
                cast = scratch("cast", tuple(shown.shape), dtype, device)
                axes[0].scatter(published[number], checked_cast(shown, dtype, piece.name, cast), start)
        return published, equal

    def _level(
        self, sigma: float, value: torch.Tensor, stored: torch.dtype, dtype: torch.dtype
    ) -> float | torch.Tensor:
        if self.perturbation.noise_floor == "none" or not sigma:
            return sigma
        coarser = max(stored, dtype, key=lambda kind: torch.finfo(kind).eps)
        return floored(sigma, value, coarser)

    def bits(self, piece: Piece, stored: torch.Tensor) -> float:
        """Mean bits of doubt about an entry of a piece, from a sample of its entries."""
        flat = stored.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to(compute_dtype(stored.dtype))
        level = self._level(self.sigma(piece), sample, stored.dtype, self.dtype(piece.name))
        scale = float((self.design.coefficients[self._quietest] ** 2).sum() ** 0.5)
        ratio = scale * level / spacing(sample, stored.dtype)
        return float(uncertainty(ratio.double().numpy()).mean())


def preprocess(
    checkpoint: str | Path,
    *,
    state: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
) -> Published:
    """Publishes the copies of the next round.

    Args:
        checkpoint: the server's model θ, a checkpoint directory.
        state: the server's secret state; created with the first round, and the same directory for all rounds of a run.
        out: a new directory for the copies, OUT/copy-1 … OUT/copy-m. Nothing in it is secret; config.json is the
            checkpoint's own, without paths.
        base: the public checkpoint that the model was trained from; the noise is then relative to the task vector.
        device: where the arithmetic runs, cpu or cuda; both agree to float32 rounding.
        perturbation: number of copies, noise level, reparameterisation.

    Returns:
        The copies, and what rounding left of their noise.

    Raises:
        CheckpointError: the checkpoint or the base is damaged, or `out` exists or cannot be written.
        UnsupportedModelError: the model's family or number format has no exact handling.
        StateError: the state is damaged or in use, or a round is open with other inputs.
    """
    perturbation, arithmetic = perturbation or Perturbation(), arithmetic_device(device)
    source, out = Checkpoint(checkpoint), Path(out)
    architecture = architecture_of(source, FAMILIES)
    places = architecture.places(source)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another directory for the copies, or remove this one")
    with locked(Path(state)):
        server = ServerState(state)
        if server.rounds and set(server.rounds[0].dtypes) != set(places):
            raise StateError(f"{server.path}: belongs to another model than {source.path}; give each run its own state")
        rms, digests, base_digest = measure(source, Checkpoint(base) if base is not None else None, places)
        number = server.next_round
        record = RoundRecord(
            round=number,
            checkpoint=str(source.path.resolve()),
            digests=digests,
            base=base_digest,
            dtypes=server.rounds[0].dtypes if server.rounds else {n: _name(source.tensors[n].dtype) for n in places},
            settings=perturbation.plain(),
            alphas=[],
            sigma={block: perturbation.kappa * value for block, value in rms.items()},
        )
        uniforms = server.secret.stream("alpha", record.inputs).uniforms(perturbation.copies)
        record = dataclasses.replace(record, alphas=perturbation.scales([float(u) for u in uniforms]))
        with server.opened(record, out) as pinned, new_directory(out) as folder:
            honesty = _write(source, architecture, server, pinned, folder, arithmetic)
        server.measured({name: dataclasses.astuple(value) for name, value in honesty.items()})
    for name, value in honesty.items():
        if value.bits < 1:
            warnings.warn(
                f"rounding undoes the noise of {name} (and perhaps others): it leaves {value.bits:.2f} bits of doubt per "
                "entry; raise --kappa, or take --noise-floor grid",
                DisclosureWarning,
                stacklevel=2,
            )
            break
    return Published(number, [out / f"copy-{copy}" for copy in range(1, perturbation.copies + 1)], honesty)


def _write(
    source: Checkpoint,
    architecture: Architecture,
    server: ServerState,
    record: RoundRecord,
    folder: Path,
    device: torch.device,
) -> dict[str, Honesty]:
    """Streams the copies into a folder."""
    publisher = Publisher(server.secret, record, architecture, device)
    places = architecture.places(source)
    copies = publisher.design.copies
    specs = {name: (publisher.dtype(name), source.tensors[name].shape) for name in places}
    with ExitStack() as stack:
        writers = []
        for copy in range(1, copies + 1):
            target = folder / f"copy-{copy}"
            target.mkdir()
            copy_companions(source.path, target)
            write_json(
                target / "config.json",
                derived_config(source.config, specs, Card(server.run, record.round, copy, copies)),
            )
            writers.append(stack.enter_context(TensorWriter(target, specs)))

        def work(piece: Piece) -> tuple[list[int], int, float]:
            stored = read(source, piece.name, piece, "stored")
            published, equal = publisher.publish(piece, stored)
            for writer, maps, rows in zip(writers, publisher.maps, published, strict=True):
                writer.write_rows(maps.published_name(piece.name, piece.place), piece.start, rows)
            return equal, stored.numel(), publisher.bits(piece, stored) if publisher.sigma(piece) else math.inf

        cut = pieces(source, places)
        what = f"round {record.round}: publishing {copies} copies"
        results = in_parallel(cut, work, what, lambda piece: piece.stop - piece.start)
    if not publisher.design.draws:
        return {}
    found: dict[str, list[tuple[list[int], int, float]]] = {}
    for piece, result in zip(cut, results, strict=True):
        if math.isfinite(result[2]):
            found.setdefault(piece.name, []).append(result)
    return {
        name: Honesty(
            max(sum(equal[copy] for equal, _, _ in parts) for copy in range(copies))
            / sum(count for _, count, _ in parts),
            sum(bits * count for _, count, bits in parts) / sum(count for _, count, _ in parts),
        )
        for name, parts in found.items()
    }


def derived_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], card: Card | None = None
) -> dict[str, Any]:
    """The config.json of a checkpoint made from another: the dtype that most of its tensors have, the card of a copy or none,
    and no path of the server's.
    """
    kept = {key: value for key, value in without_paths(config).items() if key != CARD}
    dtypes = [dtype for dtype, _ in specs.values()]
    kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = _name(max(dtypes, key=dtypes.count))
    return {**kept, **(card.entry() if card else {})}


def _equal(value: torch.Tensor, original: torch.Tensor, dtype: torch.dtype) -> int:
    """How many entries of a value, once cast to `dtype`, equal the original's."""
    cast = scratch("cast", tuple(value.shape), dtype, value.device).copy_(value)
    if dtype != original.dtype or value.device.type != "cpu":
        return int(torch.count_nonzero(cast == original))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # numpy compares and counts many times faster than torch.
    return int(np.count_nonzero(cast.view(bits).numpy() == original.view(bits).numpy()))


def checked_cast(value: torch.Tensor, dtype: torch.dtype, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The value in `dtype` (into `out` where it is given), once it is known that nothing overflowed.

    Only float16 has a smaller range than float32.

    Raises:
        UnsupportedModelError: an entry of the tensor `name` leaves the range.
    """
    cast = value.to(dtype) if out is None else out.copy_(value)
    if torch.finfo(dtype).max < 1e30 and not bool(torch.isfinite(cast).all()):
        raise UnsupportedModelError(
            f"{name}: a value of {float(value.abs().max()):.3g} leaves the range of {dtype}; use bfloat16 or float32"
        )
    return cast


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
