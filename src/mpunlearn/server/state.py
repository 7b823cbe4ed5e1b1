"""The server's state: the secret, and one record per round, in a directory of mode 0700.

The idea: noise must never serve two different models, since the difference of the two publications would then be free of it.
So every stream of a round is named by the digest of all that the round hides (the model, the base, the settings): other inputs
have other noise, whatever was killed or run twice. The record of a round is on disk before the first byte of its copies is,
and a round that is open is only ever published again from the same inputs. Records are small; copies are recomputed from the
checkpoint and the secret.

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

from mpunlearn.errors import CheckpointError, StateError
from mpunlearn.files import new_directory, read_json, write_json
from mpunlearn.server.secret import Secret

FORMAT = 1


@dataclass(frozen=True)
class RoundRecord:
    """What the server must remember of one round."""

    round: int
    """Counted from 1."""
    checkpoint: str
    """Path of θ."""
    digests: dict[str, list[str]]
    """SHA-256 of each piece of each of θ's tensors."""
    base: str | None
    """SHA-256 over the base's tensors."""
    dtypes: dict[str, str]
    """Storage dtype of each tensor in the run's first checkpoint. Between rounds θ may be kept wider."""
    settings: dict[str, Any]
    """The `Perturbation`."""
    alphas: list[float]
    """α_k or x_k of the copies; empty where the design has none. Secret."""
    sigma: dict[str, float]
    """Noise level per block, in units of the weights."""
    honesty: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Per tensor what rounding left of the noise: `preprocess.RoundingLeakage`."""
    closed: bool = False
    """Whether the round's updates have been aggregated."""

    @property
    def inputs(self) -> str:
        """SHA-256 over everything that the round's noise hides: the name of all its streams."""
        hidden = [self.round, self.digests, self.base, self.dtypes, self.settings]
        return hashlib.sha256(json.dumps(hidden, sort_keys=True).encode()).hexdigest()


class ServerState:
    """The state in one directory, created with its first round.

    Args:
        path: the directory; it need not exist.

    Raises:
        StateError: the directory is there but is not a sound state of this program, or lets others read it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rounds: list[RoundRecord] = []
        self._new = not self.path.exists()
        if self._new:
            self.secret, self.run = Secret.generate(), system_entropy.token_hex(16)
            return
        header = self._read(self.path / "state.json")
        if header.get("format") != FORMAT or not isinstance(header.get("run"), str):
            raise StateError(f"{self.path}: state of format {header.get('format')!r}, this program knows {FORMAT}")
        if mode := self.path.stat().st_mode & 0o077:
            raise StateError(f"{self.path}: others may open the state (mode bits {mode:03o}); chmod 700 {self.path}")
        self.run = header["run"]
        self.secret = Secret.load(self.path / "secret.key")
        for number, file in enumerate(sorted(self.path.glob("round-*.json")), start=1):
            try:
                record = RoundRecord(**self._read(file))
            except TypeError as error:
                raise StateError(f"{file}: not the record of a round ({error}); restore it from a backup") from None
            if record.round != number:
                raise StateError(f"{file}: found the record of round {record.round}, expected round {number}")
            self.rounds.append(record)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except CheckpointError as error:
            raise StateError(f"not the state of a run: {error}") from None

    @property
    def next_round(self) -> int:
        """The open round, or else the one after the last."""
        if self.rounds and not self.rounds[-1].closed:
            return self.rounds[-1].round
        return len(self.rounds) + 1

    @contextmanager
    def opened(self, record: RoundRecord, out: Path) -> Iterator[RoundRecord]:
        """Pins a round, in the block that publishes its copies in `out`, and gives the record to publish from.

        A round that is open already is published again from its own record. If the block raises before `out` is there, a newly
        pinned round is forgotten: its noise serves no other inputs anyway.

        Raises:
            StateError: a round is open with other inputs.
        """
        pinned = self.rounds[-1] if self.rounds and not self.rounds[-1].closed else None
        if pinned is not None:
            if pinned.inputs != record.inputs:
                changed = [
                    key for key in ("digests", "base", "settings") if getattr(pinned, key) != getattr(record, key)
                ]
                names = {"digests": "another checkpoint", "base": "another base", "settings": "other options"}
                raise StateError(
                    f"{self.path}: round {pinned.round} is open with {' and '.join(names[key] for key in changed)}; finish "
                    "it with `postprocess`, repeat `preprocess` with the same inputs, or start another state"
                )
            yield pinned
            return
        was_new = self._new
        if was_new:
            with new_directory(self.path, mode=0o700) as folder:
                self.secret.save(folder / "secret.key")
                write_json(folder / "state.json", {"format": FORMAT, "run": self.run}, mode=0o600)
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

    def measured(self, honesty: dict[str, tuple[float, float]]) -> None:
        """Keeps what was measured while the last round was published."""
        self._store(dataclasses.replace(self.rounds[-1], honesty=honesty))

    def close(self) -> None:
        """Marks the last round as aggregated, so that the next `preprocess` begins another."""
        self._store(dataclasses.replace(self.rounds[-1], closed=True))

    def _file(self, record: RoundRecord) -> Path:
        return self.path / f"round-{record.round:03d}.json"

    def _store(self, record: RoundRecord) -> None:
        try:
            write_json(self._file(record), dataclasses.asdict(record), mode=0o600)
        except OSError as error:
            raise StateError(
                f"{self.path}: cannot be written: {error.strerror}; free the cause and run again"
            ) from error
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
