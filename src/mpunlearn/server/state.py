"""The server's state: the secret, and one record per round, in a directory of mode 0700.

The idea: the same noise must never serve two different models, since the difference of the two publications would be free of
it. So every stream of a round is named by the digest of everything that the round hides (the model, the base, the settings):
other inputs have other noise, no matter what was killed or run twice. The record of a round is on disk before the first byte of
its copies, and a round that is open is published again only from the same inputs. Records are small; copies are recomputed from
the checkpoint and the secret.

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
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.secret import Secret


@dataclass(frozen=True)
class RoundingLeakage:
    """What the cast to the storage dtype left of one tensor's noise."""

    equal: float
    """Share of published entries that equal the original's before the reparameterization, in the copy with the most of them."""
    entropy: float
    """Residual entropy, in bits per entry, that the noise of the least noisy copy leaves on the original's grid."""


@dataclass(frozen=True)
class RoundRecord:
    """What the server must remember of one round. Format 2."""

    round: int
    """Counted from 1."""
    checkpoint: str
    """Path of θ."""
    digests: dict[str, list[str]]
    """SHA-256 of each slice of each of θ's tensors."""
    base: str | None
    """SHA-256 over the base's tensors."""
    dtypes: dict[str, str]
    """Storage dtype of each tensor in the run's first checkpoint. Between rounds θ may be kept in a wider one."""
    perturbation: Perturbation
    inputs: str
    """SHA-256 over everything that the round's noise hides: the name of all its streams."""
    alphas: list[float]
    """α_k or x_k of the copies; empty if the design has none. Secret."""
    sigma: dict[str, float]
    """Noise level per block, in units of the weights."""
    rounding: dict[str, RoundingLeakage] = dataclasses.field(default_factory=dict)
    """Per tensor, what rounding left of the noise."""
    closed: bool = False
    """Whether the round's updates have been aggregated."""
    format: int = 2


def inputs_digest(
    number: int, digests: dict[str, list[str]], base: str | None, dtypes: dict[str, str], settings: dict[str, Any]
) -> str:
    """SHA-256 (hex) over everything that a round's noise hides."""
    hidden = [number, digests, base, dtypes, settings]
    return hashlib.sha256(json.dumps(hidden, sort_keys=True).encode()).hexdigest()


def _upgrade(value: dict[str, Any]) -> dict[str, Any]:
    """The record of a round in the current format. Format 1 had no field `format` and computed `inputs` when it was needed."""
    if "format" in value:
        return value
    settings, leakage = value.pop("settings"), value.pop("honesty", {})
    inputs = inputs_digest(value["round"], value["digests"], value["base"], value["dtypes"], settings)
    rounding = {name: {"equal": equal, "entropy": entropy} for name, (equal, entropy) in leakage.items()}
    return {**value, "perturbation": settings, "inputs": inputs, "rounding": rounding, "format": 2}


@dataclass(frozen=True)
class _Header:
    """STATE/state.json."""

    run: str
    format: int = 1


class ServerState:
    """The state in one directory, created with its first round.

    Args:
        path: the directory; it need not exist.

    Raises:
        StateError: the directory exists but is not a valid state, or others may open it.
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
                    f"{self.path}: others may open the state (mode bits {mode:03o}); run chmod 700 {self.path}"
                )
            self.secret = Secret.load(self.path / "secret.key")
            for number, file in enumerate(sorted(self.path.glob("round-*.json")), start=1):
                record = read(RoundRecord, file, _upgrade)
                if record.round != number:
                    raise StateError(f"{file}: holds the record of round {record.round}, expected round {number}")
                self.rounds.append(record)
        except (FileError, SchemaError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self.path}: not the state of a run: {error}") from None

    @property
    def open_round(self) -> RoundRecord | None:
        """The round that has been published but not aggregated."""
        return self.rounds[-1] if self.rounds and not self.rounds[-1].closed else None

    @property
    def next_round(self) -> int:
        """The open round, or else the one after the last."""
        return self.open_round.round if self.open_round else len(self.rounds) + 1

    @contextmanager
    def opened(self, record: RoundRecord, out: Path) -> Iterator[RoundRecord]:
        """Pins a round while its copies are published in `out`, and gives the record to publish from.

        A round that is open already is published again from its own record. If the block raises before `out` exists, a newly
        pinned round is forgotten: its noise serves no other inputs anyway.

        Raises:
            StateError: a round is open with other inputs.
        """
        pinned = self.open_round
        if pinned is not None:
            names = {"digests": "another checkpoint", "base": "another base", "perturbation": "other options"}
            changed = [what for key, what in names.items() if getattr(pinned, key) != getattr(record, key)]
            if changed:
                raise StateError(
                    f"{self.path}: round {pinned.round} is open with {' and '.join(changed)}; finish it with "
                    "`postprocess`, repeat `preprocess` with the same inputs, or start with another --state"
                )
            yield pinned
            return
        was_new = self._new
        if was_new:
            with new_directory(self.path, mode=0o700) as folder:
                self.secret.save(folder / "secret.key")
                write(folder / "state.json", _Header(self.run))
            self._new = False
        self._store(record)
        try:
            yield record
        except BaseException:
            if out.exists():
                raise
            self.rounds.pop()
            self._file(record).unlink()
            if was_new:
                shutil.rmtree(self.path)
            raise

    def measured(self, rounding: dict[str, RoundingLeakage]) -> None:
        """Keeps what was measured while the last round was published."""
        self._store(dataclasses.replace(self.rounds[-1], rounding=rounding))

    def close(self) -> None:
        """Marks the last round as aggregated, so that the next `preprocess` begins another."""
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
    """Keeps other processes from working on a directory at the same time; one that does not exist yet is not locked.

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
            raise StateError(f"{folder}: another process is working on it; wait for it, or stop it") from None
        yield
    finally:
        os.close(descriptor)
