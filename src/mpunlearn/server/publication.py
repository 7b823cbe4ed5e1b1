"""One publication of a round: its inputs, its record, and its directory of copies.

The first pass over θ measures the noise levels and computes digests. The record of the round is written then, before the
first byte of a copy. All else is shards (see `copies`), which threads, tasks or other invocations write (see `parts`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture, TensorRole
from mpunlearn.checkpoint import Checkpoint, dtype_name
from mpunlearn.errors import StateError
from mpunlearn.protocol.record.artifacts import complete
from mpunlearn.server.copies import Copies, WrittenShard
from mpunlearn.server.lineage import Lineage, open_offset
from mpunlearn.server.noise import Measurement, measure
from mpunlearn.server.offset import OffsetRecord, open_stand_in
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.recording import Recording
from mpunlearn.server.state import RoundingLeakage, RoundRecord, ServerState, inputs_digest
from mpunlearn.storage import Place

Digests = dict[str, dict[str, str]]
"""For each model, SHA-256 of its files, by name."""


@dataclass(frozen=True)
class Publication:
    """What `preprocess` is asked for; its docstring explains the fields."""

    checkpoint: Place
    state: Path
    out: Place
    base: Place | None
    stand_in: Path | None
    lineage: Path | None
    device: torch.device
    identity: Path | None
    perturbation: Perturbation
    max_shard_bytes: int
    plan: Path | None

    def open(self, server: ServerState) -> tuple[RoundRecord, Digests]:
        """Measures the model; returns the record of the next round, which is not stored yet, and the models' digests.

        Raises:
            StateError: the model, the stand-in or the common noise is not that of the run.
        """
        source = Checkpoint(self.checkpoint, hashed=True)
        roles = Architecture.of(source).tensor_roles(source)
        if server.rounds and set(server.rounds[0].dtypes) != set(roles):
            raise StateError(f"{server.path}: belongs to a different model than {source.place}; use a new --state")
        base = Checkpoint(self.base, hashed=True) if self.base is not None else None
        measured = measure(source, base, roles)
        number, perturbation = server.next_round, self.perturbation
        dtypes = {name: dtype_name(source.tensors[name].dtype) for name in roles}
        dtypes = server.rounds[0].dtypes if server.rounds else dtypes
        offset = self._offset(server, source, roles, measured)
        inputs = inputs_digest(number, measured.digests, measured.base, dtypes, perturbation.to_json(), offset)
        uniforms = server.secret.stream("alpha", inputs).uniforms(2 * perturbation.copies)
        record = RoundRecord(
            round=number,
            checkpoint=str(source.place.resolve()),
            digests=measured.digests,
            base=measured.base,
            dtypes=dtypes,
            perturbation=perturbation,
            inputs=inputs,
            alphas=perturbation.scales([float(uniform) for uniform in uniforms]),
            sigma={block: perturbation.kappa * rms for block, rms in measured.rms.items()},
            offset=offset,
        )
        return record, {"model": source.digests(), **({"base": base.digests()} if base is not None else {})}

    def _offset(
        self, server: ServerState, source: Checkpoint, roles: Mapping[str, TensorRole], measured: Measurement
    ) -> OffsetRecord | None:
        """The offset of the next round: that of the first round, or a new one in the first.

        Raises:
            StateError: it differs from that of the first round.
        """
        first, asked = server.rounds[0] if server.rounds else None, self.perturbation
        pinned = first.offset if first else None
        part = None
        if self.stand_in is not None:
            origin = Checkpoint(pinned.stand_in.origin) if pinned and pinned.stand_in else source
            part = open_stand_in(self.stand_in, origin, roles)
        if first is not None:
            before = pinned.stand_in if pinned else None
            if (part and part.digest) != (before and before.digest):
                raise StateError(
                    f"{server.path}: round 1 had {f'the stand-in {before.path}' if before else 'no stand-in'}; use the same "
                    "in every round, since two offsets in one run would show both"
                )
            had = first.perturbation
            if (asked.common_noise, asked.common_noise_shape) != (had.common_noise, had.common_noise_shape):
                raise StateError(
                    f"{server.path}: round 1 had --common-noise {had.common_noise}; use the same in every round"
                )
            return pinned
        if asked.common_noise == 0:
            return OffsetRecord(stand_in=part) if part else None
        kept = Lineage.of(measured, roles, self.lineage)
        common = kept.common_noise(asked.common_noise, asked.common_noise_shape, measured, roles)
        return OffsetRecord(str(kept.path.resolve()), common, part)

    def copies(self, server: ServerState, record: RoundRecord, folder: Place) -> Copies:
        """The copies of the open round, to be written to a directory."""
        source, offset = Checkpoint(self.checkpoint), open_offset(record.offset)
        return Copies(source, server.run, record, server.secret, offset, folder, self.max_shard_bytes, self.device)

    def finish(
        self, server: ServerState, copies: Copies, written: Sequence[WrittenShard], models: Digests
    ) -> dict[str, RoundingLeakage]:
        """Completes the copies, once all shards are there, and records them; returns how their noise survived rounding."""
        rounding, known = copies.finish(written), copies.digests(written)
        places = {"model": self.checkpoint, "base": self.base, "stand_in": self.stand_in}
        given = {name: place for name, place in places.items() if place is not None}
        recording = Recording(self.state, server.run, self.identity, self.plan)
        recording.published(copies.folders, server.next_round, given, self.perturbation, known, models)
        # The first copy is completed last. So if it is complete, all are.
        for folder, digests in reversed(list(zip(copies.folders, known, strict=True))):
            complete(folder, digests)
        return rounding
