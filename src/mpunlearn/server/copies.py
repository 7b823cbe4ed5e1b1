"""Writes the published copies of a round, one shard of all copies at a time.

A shard is a file of each copy, and what one task computes: in this process, in another one that writes into the same
directory, or on another machine (`Copies.task`). Every shard is the same to the byte wherever and however often it is
computed, so a task can be repeated at any time. On a disk, its files get their names when they are complete; in a store,
they come to be only then. The draws of the noise are shared by all copies, which is why a task is a shard of all of them.
"""

import dataclasses
import math
import secrets as system_entropy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, ShardWriter, copy_companions, plan_shards, write_index
from mpunlearn.errors import DisclosureWarning
from mpunlearn.protocol.exchange import Card, derived_config
from mpunlearn.server.keys import StreamKeys
from mpunlearn.server.offset import Offset, OffsetPart
from mpunlearn.server.publisher import Publisher, check_unchanged
from mpunlearn.server.secret import Secret, Streams
from mpunlearn.server.state import RoundingLeakage, RoundRecord
from mpunlearn.server.stream import THREADS, RowSlice, in_parallel, read, row_slices
from mpunlearn.server.workspace import Workspace
from mpunlearn.storage import Place, write_json

MIN_ENTROPY = 1.0
"""Residual entropy, in bits per entry, below which a warning says that rounding undoes the noise of a tensor."""
Wanted = dict[str, list[int]]
"""The tensors of θ that a shard is made of, each with the copies in which it goes into this shard."""


@dataclass(frozen=True)
class Rounded:
    """How much of the noise of a tensor survived rounding, in the copies for which it was counted."""

    equal: list[int]
    """For each copy, the number of entries that equal those of θ."""
    entries: int
    """Number of entries of which the entropy was estimated."""
    entropy: float
    """Residual entropy of all of them, in bits."""

    def __add__(self, other: "Rounded") -> "Rounded":
        equal = [a + b for a, b in zip(self.equal, other.equal, strict=True)]
        return Rounded(equal, self.entries + other.entries, self.entropy + other.entropy)


@dataclass(frozen=True)
class WrittenShard:
    """One shard that was written."""

    digests: list[str]
    """SHA-256 of its file in each copy, in order."""
    rounded: dict[str, Rounded]
    """By tensor; empty without noise."""
    format: int = 1


class Copies:
    """The copies of a round.

    Args:
        source: θ.
        run: the run's identifier.
        record: the record of the round.
        secret: the run's secret, or the keys of the streams of the shards that will be written.
        offset: the offset of all copies.
        folder: the directory of the copies, which get the names copy-1 … copy-m in it.
        max_shard_bytes: maximum size of a shard.
        device: device of the computation.
    """

    def __init__(
        self,
        source: Checkpoint,
        run: str,
        record: RoundRecord,
        secret: Streams,
        offset: Offset,
        folder: Place,
        max_shard_bytes: int,
        device: torch.device,
    ) -> None:
        self._source, self._run, self._record, self._secret, self._offset = source, run, record, secret, offset
        self._architecture = Architecture.of(source)
        self._publisher = Publisher(secret, record, self._architecture, device, offset)
        self._roles = self._architecture.tensor_roles(source)
        self._specs = {name: (self._publisher.dtype(name), source.tensors[name].shape) for name in self._roles}
        self._max_shard_bytes = max_shard_bytes
        self.shards = plan_shards(self._specs, max_shard_bytes=max_shard_bytes)
        """The layout of each copy."""
        self.folder = folder
        self.folders = [folder / f"copy-{copy}" for copy in range(1, self._publisher.design.copies + 1)]
        """The directory of each copy."""
        for target in self.folders:
            if isinstance(target, Path):
                target.mkdir(exist_ok=True)

    def write(
        self, number: int, wanted: Wanted | None = None, threads: int = THREADS, check: bool = True
    ) -> WrittenShard:
        """Writes a shard of every copy.

        Args:
            number: index of the shard.
            wanted: the tensors of θ that go into it (default: found from the maps of all copies).
            threads: number of threads.
            check: whether to check that θ is still what it was when the round was opened.

        Raises:
            StateError: θ has changed.
        """
        shard, partial = self.shards[number], f".{self.shards[number].file}.{system_entropy.token_hex(8)}"
        try:
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(ShardWriter(folder, shard, partial if isinstance(folder, Path) else ""))
                    for folder in self.folders
                ]
                rounded = self._write(number, wanted or self.wanted(number), writers, threads, check)
            for folder in self.folders:
                if isinstance(folder, Path):
                    (folder / partial).rename(folder / shard.file)
        finally:
            for folder in self.folders:
                if isinstance(folder, Path):
                    (folder / partial).unlink(missing_ok=True)
        return WrittenShard([writer.sha256 for writer in writers], rounded)

    def _write(
        self, number: int, wanted: Wanted, writers: list[ShardWriter], threads: int, check: bool
    ) -> dict[str, Rounded]:
        """Writes the tensors of a shard; returns how much of their noise survived rounding."""

        def work(rows: RowSlice, workspace: Workspace) -> Rounded | None:
            stored = read(self._source, rows.name, rows, workspace)
            if check:
                check_unchanged(self._source, self._record, rows, stored)
            copies = wanted[rows.name]
            published = self._publisher.publish(rows, stored, workspace, copies)
            for copy, values in zip(copies, published.rows, strict=True):
                name = self._publisher.maps[copy].published_name(rows.name, rows.role)
                writers[copy].write_rows(name, rows.start, values)
            return self._rounded(rows, stored, copies, published.equal)

        slices = row_slices(self._source, {name: self._roles[name] for name in wanted})
        of = f", shard {number + 1} of {len(self.shards)}" if len(self.shards) > 1 else ""
        what = f"round {self._record.round}: publishing {len(self.folders)} copies{of}"
        rounded: dict[str, Rounded] = {}
        for rows, result in zip(slices, in_parallel(slices, work, what, len, threads), strict=True):
            if result is not None:
                rounded[rows.name] = rounded[rows.name] + result if rows.name in rounded else result
        return rounded

    def wanted(self, number: int) -> Wanted:
        """The tensors of θ that go into a shard, with the copies; experts go into different shards of different copies."""
        tensors, maps = self.shards[number].tensors, self._publisher.maps
        wanted = {
            name: [copy for copy, one in enumerate(maps) if one.published_name(name, role) in tensors]
            for name, role in self._roles.items()
        }
        return {name: wanted[name] for name in self._roles if wanted[name]}

    def _rounded(self, rows: RowSlice, stored: torch.Tensor, copies: list[int], equal: list[int]) -> Rounded | None:
        entropy = self._publisher.residual_entropy(rows, stored) if self._publisher.sigma(rows) else math.inf
        if not math.isfinite(entropy):
            return None
        counts = [0] * len(self.folders)
        for copy, count in zip(copies, equal, strict=True):
            counts[copy] = count
        if 0 not in copies:  # the entropy is the same for all copies, and counted with the first
            return Rounded(counts, 0, 0.0)
        return Rounded(counts, stored.numel(), stored.numel() * entropy)

    def task(self, number: int) -> "CopyTask":
        """All that a worker on another machine needs to write a shard; of keys, those of the streams of the shard.

        The secret that these copies were made with must be the run's.
        """
        assert isinstance(self._secret, Secret)
        wanted = self.wanted(number)
        digests = {name: self._record.digests[name] for name in wanted}
        streams = self._publisher.streams({name: self._roles[name] for name in wanted})
        return CopyTask(
            self._source.place.resolve(),
            self._run,
            dataclasses.replace(self._record, digests=digests, rounding={}),
            StreamKeys.of(self._secret, streams),
            self._offset.part(wanted),
            self.folder.resolve(),
            self._max_shard_bytes,
            str(self._publisher.device),
            number,
            wanted,
        )

    def finish(self, written: Sequence[WrittenShard]) -> dict[str, RoundingLeakage]:
        """Writes the files beside the shards, once all shards are there.

        Issues a `DisclosureWarning` if rounding undoes the noise, before the copies become visible.

        Returns:
            For each tensor, how much of the noise survived rounding; empty without noise.
        """
        for copy, target in enumerate(self.folders, start=1):
            if isinstance(target, Path):
                for left in target.glob(".*"):  # of a worker that was killed
                    left.unlink()
            copy_companions(self._source.place, target)
            card = Card(self._run, self._record.round, copy, len(self.folders))
            write_index(target, self.shards)
            write_json(target / "config.json", derived_config(self._source.config, self._specs, card))
        if not self._publisher.design.draws:
            return {}
        total: dict[str, Rounded] = {}
        for shard in written:
            for name, rounded in shard.rounded.items():
                total[name] = total[name] + rounded if name in total else rounded
        rounding = {
            name: RoundingLeakage(
                max(total[name].equal) / total[name].entries, total[name].entropy / total[name].entries
            )
            for name in self._roles
            if name in total
        }
        _warn(rounding)
        return rounding

    def digests(self, written: Sequence[WrittenShard]) -> list[dict[str, str]]:
        """SHA-256 of the files of tensors of each copy, by name."""
        return [
            {shard.file: done.digests[copy] for shard, done in zip(self.shards, written, strict=True)}
            for copy in range(len(self.folders))
        ]


@dataclass(frozen=True)
class CopyTask:
    """One shard of the copies, to be written by any process that can reach θ and the directory of the copies."""

    source: Place
    run: str
    record: RoundRecord
    keys: StreamKeys
    offset: OffsetPart
    folder: Place
    max_shard_bytes: int
    device: str
    number: int
    wanted: Wanted

    def __call__(self) -> WrittenShard:
        """Writes the shard, on one thread."""
        copies = Copies(
            Checkpoint(self.source),
            self.run,
            self.record,
            self.keys,
            self.offset.open(),
            self.folder,
            self.max_shard_bytes,
            torch.device(self.device),
        )
        return copies.write(self.number, self.wanted, threads=1)


def _warn(rounding: dict[str, RoundingLeakage]) -> None:
    for name, leakage in rounding.items():
        if leakage.entropy < MIN_ENTROPY:
            warnings.warn(
                f"rounding undoes the noise of {name} (and perhaps of other tensors): the residual entropy is "
                f"{leakage.entropy:.2f} bits per entry; raise --kappa, or use --noise-floor grid",
                DisclosureWarning,
                stacklevel=4,
            )
            return
