"""The server's secret state: the key and one record per round, in a directory of mode 0700.

The idea: the same noise must never be added to two different models, because it would cancel in the difference of the
two publications. Therefore the names of a round's random streams include a digest of everything that the round hides
(model, base, settings): different inputs always get different noise, whatever was killed or run twice. The record of a
round is written to disk before the first byte of its copies. While the round is open, that is, published but not yet
aggregated, it can be published again only from the same inputs. Records are small, because copies can be recomputed
from the checkpoint and the secret.

    STATE/secret.key        32 bytes, mode 0600
    STATE/state.json        the run's public identifier
    STATE/round-001.json    one per round, replaced atomically
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import secrets as system_entropy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, SchemaError, StateError
from mpunlearn.files import new_directory
from mpunlearn.schema import read, write
from mpunlearn.server.offset import OffsetRecord
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.secret import Secret
from mpunlearn.storage import Place


@dataclass(frozen=True)
class RoundingLeakage:
    """How much of one tensor's noise survived the cast to the storage dtype."""

    equal: float
    """Share of published entries that equal those of θ before the reparameterization, the largest among the copies."""
    entropy: float
    """Residual entropy, in bits per entry, of the least noisy copy's noise on the grid of θ."""


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round. Format 3."""

    round: int
    """Starts at 1."""
    checkpoint: str
    """Path of θ."""
    digests: dict[str, list[str]]
    """SHA-256 of each slice of each of θ's tensors."""
    base: str | None
    """SHA-256 over the base model's tensors; None without a base."""
    dtypes: dict[str, str]
    """Storage dtype of each tensor in the run's first checkpoint. Between rounds, θ may be stored in a wider one."""
    perturbation: Perturbation
    inputs: str
    """SHA-256 over everything that the round's noise hides; part of the names of all random streams of the round."""
    alphas: list[float]
    """The secret scales α_k or x_k of the copies; empty if the design has none."""
    sigma: dict[str, float]
    """Noise level per block, in units of the weights."""
    offset: OffsetRecord | None = None
    """The secret offset of the copies, the same in all rounds of a run; None if they are made of θ itself."""
    rounding: dict[str, RoundingLeakage] = dataclasses.field(default_factory=dict)
    """For each tensor, how much of the noise survived rounding."""
    closed: bool = False
    """Whether the round's updates have been aggregated."""
    format: int = 3


def inputs_digest(
    number: int,
    digests: dict[str, list[str]],
    base: str | None,
    dtypes: dict[str, str],
    settings: dict[str, Any],
    offset: OffsetRecord | None = None,
) -> str:
    """SHA-256 (hex) over everything that a round's noise hides."""
    hidden = [number, digests, base, dtypes, settings, *([dataclasses.asdict(offset)] if offset else [])]
    return hashlib.sha256(json.dumps(hidden, sort_keys=True).encode()).hexdigest()


def _upgrade(value: dict[str, Any]) -> dict[str, Any]:
    """Converts a round's record to the current format.

    Format 1 had no fields `format` and `inputs`, and formats 1 and 2 knew no common noise.
    """
    if "format" in value:
        return {**value, "format": 3} if value["format"] == 2 else value
    settings, leakage = value.pop("settings"), value.pop("honesty", {})
    inputs = inputs_digest(value["round"], value["digests"], value["base"], value["dtypes"], settings)
    rounding = {name: {"equal": equal, "entropy": entropy} for name, (equal, entropy) in leakage.items()}
    return {**value, "perturbation": settings, "inputs": inputs, "rounding": rounding, "format": 3}


@dataclass(frozen=True)
class _Header:
    """The content of STATE/state.json."""

    run: str
    format: int = 1


class ServerState:
    """The state in a directory, which is created in the first round.

    Args:
        path: the directory; it need not exist.

    Raises:
        StateError: the directory exists but is not a valid state, or other users can access it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rounds: list[RoundRecord] = []
        self._new = not self.path.exists()
        if self._new:
            self.secret, self.run = Secret.generate(), system_entropy.token_hex(16)
            return
        try:
            self.run = read(_Header, self.path / "state.json").run
            if mode := self.path.stat().st_mode & 0o077:
                raise StateError(
                    f"{self.path}: other users can access the state (mode bits {mode:03o}); run `chmod 700 {self.path}`"
                )
            self.secret = Secret.load(self.path / "secret.key")
            for number, file in enumerate(sorted(self.path.glob("round-*.json")), start=1):
                record = read(RoundRecord, file, _upgrade)
                if record.round != number:
                    raise StateError(f"{file}: is the record of round {record.round}, expected round {number}")
                self.rounds.append(record)
        except (FileError, SchemaError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self.path}: not a valid server state: {error}") from None

    @property
    def open_round(self) -> RoundRecord | None:
        """The round that has been published but not aggregated."""
        return self.rounds[-1] if self.rounds and not self.rounds[-1].closed else None

    @property
    def next_round(self) -> int:
        """Number of the open round or, if none is open, of the one after the last."""
        return self.open_round.round if self.open_round else len(self.rounds) + 1

    def begin(self, record: RoundRecord) -> RoundRecord:
        """Opens a round, for good; returns the record to publish from, which is the stored one if the round is open already.

        Raises:
            StateError: a round is open with different inputs.
        """
        pinned = self.open_round
        if pinned is not None:
            names = {
                "digests": "a different checkpoint",
                "base": "a different base",
                "perturbation": "different options",
                "offset": "a different stand-in or lineage",
            }
            changed = [what for key, what in names.items() if getattr(pinned, key) != getattr(record, key)]
            if changed:
                raise StateError(
                    f"{self.path}: round {pinned.round} is open with {' and '.join(changed)}; finish it with "
                    "`postprocess`, repeat `preprocess` with its inputs, or start over with a new --state"
                )
            return pinned
        if self._new:
            with new_directory(self.path, mode=0o700) as folder:
                self.secret.save(folder / "secret.key")
                write(folder / "state.json", _Header(self.run))
            self._new = False
        self._store(record)
        return record

    @contextmanager
    def opened(self, record: RoundRecord, out: Place) -> Iterator[RoundRecord]:
        """Opens a round while its copies are written to `out`; yields the record to publish from.

        If the block raises before `out` exists, a newly opened round is discarded. This is safe, since different inputs get
        different noise anyway.

        Raises:
            StateError: a round is open with different inputs.
        """
        was_new, was_open = self._new, self.open_round is not None
        pinned = self.begin(record)
        try:
            yield pinned
        except BaseException:
            if was_open or out.exists():
                raise
            self.rounds.pop()
            self._file(record).unlink()
            if was_new:
                shutil.rmtree(self.path)
            raise

    def measured(self, rounding: dict[str, RoundingLeakage]) -> None:
        """Stores the rounding leakage that was measured while publishing the last round."""
        self._store(dataclasses.replace(self.rounds[-1], rounding=rounding))

    def close(self) -> None:
        """Marks the last round as aggregated, so that the next `preprocess` starts a new one."""
        self._store(dataclasses.replace(self.rounds[-1], closed=True))

    def _file(self, record: RoundRecord) -> Path:
        return self.path / f"round-{record.round:03d}.json"

    def _store(self, record: RoundRecord) -> None:
        try:
            write(self._file(record), record)
        except FileError as error:
            raise StateError(str(error)) from error
        self.rounds[record.round - 1 :] = [record]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a directory against other processes; a directory that does not exist yet is not locked.

    Raises:
        StateError: another process holds the lock.
    """
    if not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"{folder}: another process is using it; wait for that process, or stop it") from None
        yield
    finally:
        os.close(descriptor)
