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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter, copy_companions, dtype_name
from mpunlearn.errors import CheckpointError, DisclosureWarning, StateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import Card, derived_config
from mpunlearn.server.noise import measure
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import RoundRecord, ServerState, locked
from mpunlearn.server.stream import RowSlice, arithmetic_device, in_parallel, read, row_slices


@dataclass(frozen=True)
class RoundingLeakage:
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
    honesty: dict[str, RoundingLeakage]
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
        perturbation: number of copies, noise level, reparameterization.

    Returns:
        The copies, and what rounding left of their noise.

    Raises:
        CheckpointError: the checkpoint or the base is damaged, or `out` exists or cannot be written.
        UnsupportedModelError: the model's family or number format has no exact handling.
        StateError: the state is damaged or in use, or a round is open with other inputs.
    """
    perturbation, arithmetic = perturbation or Perturbation(), arithmetic_device(device)
    source, out = Checkpoint(checkpoint), Path(out)
    architecture = Architecture.of(source)
    places = architecture.tensor_roles(source)
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
            dtypes=server.rounds[0].dtypes
            if server.rounds
            else {n: dtype_name(source.tensors[n].dtype) for n in places},
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
) -> dict[str, RoundingLeakage]:
    """Streams the copies into a folder."""
    publisher = Publisher(server.secret, record, architecture, device)
    places = architecture.tensor_roles(source)
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

        def work(piece: RowSlice) -> tuple[list[int], int, float]:
            stored = read(source, piece.name, piece, "stored")
            published, equal = publisher.publish(piece, stored)
            for writer, maps, rows in zip(writers, publisher.maps, published, strict=True):
                writer.write_rows(maps.published_name(piece.name, piece.place), piece.start, rows)
            return equal, stored.numel(), publisher.bits(piece, stored) if publisher.sigma(piece) else math.inf

        cut = row_slices(source, places)
        what = f"round {record.round}: publishing {copies} copies"
        results = in_parallel(cut, work, what, lambda piece: piece.stop - piece.start)
    if not publisher.design.draws:
        return {}
    found: dict[str, list[tuple[list[int], int, float]]] = {}
    for piece, result in zip(cut, results, strict=True):
        if math.isfinite(result[2]):
            found.setdefault(piece.name, []).append(result)
    return {
        name: RoundingLeakage(
            max(sum(equal[copy] for equal, _, _ in parts) for copy in range(copies))
            / sum(count for _, count, _ in parts),
            sum(bits * count for _, count, bits in parts) / sum(count for _, count, _ in parts),
        )
        for name, parts in found.items()
    }
