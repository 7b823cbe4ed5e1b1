"""Pre-Process, the server's first pass of a round: turns its model θ into m published copies.

    θ_k = T_k(θ + ε_k),    ε_k = σ Σ_d A_kd z_d        (arXiv 2602.23798, Algorithm 1)

T_k is the secret reparameterization of copy k (see `reparameterization`), ε_k its noise (see `noise`), and A the
coefficients of the copy design (see `design`). A first pass over θ measures σ and computes digests; a second pass
streams θ through the noise and the reparameterizations (see `publisher`). All copies become visible atomically. The
second pass also measures how much of the noise survives the cast to the storage dtype: the share of published entries
that equal those of θ, and the residual entropy per entry on the grid of θ.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError, StateError
from mpunlearn.files import as_path, new_directory
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.server.state import RoundingLeakage


@dataclass(frozen=True)
class Published:
    """A published round."""

    round: int
    copies: list[Path]
    """Directories of the copies, in order."""
    rounding: "dict[str, RoundingLeakage]"
    """For each tensor, how much of the noise survived rounding; empty without noise."""

    def summary(self) -> str:
        """A summary in one or two lines."""
        lines = [f"round {self.round}: {len(self.copies)} copies"]
        if self.rounding:
            values = list(self.rounding.values())
            entropies = sorted(value.entropy for value in values)
            lines.append(
                f"residual entropy of the noise after rounding: {entropies[0]:.2f} to {entropies[-1]:.2f} bits per "
                f"entry (median {entropies[len(entropies) // 2]:.2f}); entries that rounding returned to their "
                f"original value: at most {max(value.equal for value in values):.1%} of a tensor"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {**dataclasses.asdict(self), "copies": [str(copy) for copy in self.copies]}


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
        checkpoint: The server's model θ, a Hugging Face checkpoint directory.
        state: Directory of the server's secret state. It is created in the first round and shared by all rounds of a
            run.
        out: A new directory for the copies, OUT/copy-1 … OUT/copy-m. It contains no secrets.
        base: The public checkpoint that the model was fine-tuned from. If given, the noise level is relative to the
            task vector (the model's weights minus the base's).
        device: Device of the computation, cpu or cuda. Their results agree up to float32 rounding.
        perturbation: Number of copies, noise level, reparameterization.

    Returns:
        The copies, and how much of their noise survived rounding.

    Raises:
        FileError: The checkpoint or the base is damaged, or `out` exists or cannot be written.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        StateError: The state is damaged or in use, or a round is open with different inputs.
    """
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import Checkpoint, dtype_name
    from mpunlearn.server.copies import write_copies
    from mpunlearn.server.noise import measure
    from mpunlearn.server.state import RoundRecord, ServerState, inputs_digest, locked
    from mpunlearn.server.stream import arithmetic_device

    perturbation, arithmetic = perturbation or Perturbation(), arithmetic_device(device)
    source, out = Checkpoint(as_path(checkpoint, "checkpoint")), as_path(out, "--out")
    state = as_path(state, "--state")
    architecture = Architecture.of(source)
    roles = architecture.tensor_roles(source)
    if out.exists():
        raise FileError(f"{out}: already exists; choose another directory for the copies, or remove this one")
    with locked(state):
        server = ServerState(state)
        if server.rounds and set(server.rounds[0].dtypes) != set(roles):
            raise StateError(f"{server.path}: belongs to a different model than {source.path}; use a new --state")
        measured = measure(source, Checkpoint(as_path(base, "--base")) if base is not None else None, roles)
        number = server.next_round
        dtypes = {name: dtype_name(source.tensors[name].dtype) for name in roles}
        dtypes = server.rounds[0].dtypes if server.rounds else dtypes
        inputs = inputs_digest(number, measured.digests, measured.base, dtypes, perturbation.to_json())
        uniforms = server.secret.stream("alpha", inputs).uniforms(perturbation.copies)
        record = RoundRecord(
            round=number,
            checkpoint=str(source.path.resolve()),
            digests=measured.digests,
            base=measured.base,
            dtypes=dtypes,
            perturbation=perturbation,
            inputs=inputs,
            alphas=perturbation.scales([float(uniform) for uniform in uniforms]),
            sigma={block: perturbation.kappa * rms for block, rms in measured.rms.items()},
        )
        with server.opened(record, out) as pinned, new_directory(out) as folder:
            rounding = write_copies(source, architecture, server, pinned, folder, arithmetic)
        server.measured(rounding)
    return Published(number, [out / f"copy-{copy}" for copy in range(1, perturbation.copies + 1)], rounding)
