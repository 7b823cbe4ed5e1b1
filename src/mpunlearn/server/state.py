"""The server's state: the secret, and one record per round, in a directory of mode 0700.

The idea: noise must never be drawn twice for two different models, since the difference of the two publications would
then be free of it. So a round's record (which checkpoint, which settings) is on disk before its copies have their name,
and a round that is still open is only ever published again from the same inputs. Records are small; the copies themselves
are recomputed from the checkpoint and the secret.

    STATE/secret.key        32 bytes, mode 0600
    STATE/state.json        the run's public identifier
    STATE/round-001.json    one per round, replaced atomically
"""

import dataclasses
import secrets as system_entropy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import new_directory, read_json, write_json
from mpunlearn.errors import CheckpointError, StateError
from mpunlearn.server.secret import Secret

FORMAT = 1


@dataclass(frozen=True)
class RoundRecord:
    """What the server must remember of one round."""

    round: int
    """Counted from 1."""
    checkpoint: str
    """Path of θ."""
    digests: dict[str, str]
    """SHA-256 of each of θ's tensors."""
    dtypes: dict[str, str]
    """Storage dtype of each tensor in the run's first checkpoint. Between rounds θ may be kept wider."""
    settings: dict[str, Any]
    """The `Perturbation`."""
    alphas: list[float]
    """α_k or x_k of the copies; empty where the design has none. Secret."""
    sigma: dict[str, float]
    """Noise level per block, in units of the weights."""
    closed: bool = False
    """Whether the round's updates have been aggregated."""


class ServerState:
    """The state in one directory, created with its first round.

    Args:
        path: the directory; it need not exist.

    Raises:
        StateError: the directory is there but is not a state of this program, or lets others read it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rounds: list[RoundRecord] = []
        self._new = not self.path.exists()
        if self._new:
            self.secret, self.run = Secret.generate(), system_entropy.token_hex(16)
            return
        header = self._read(self.path / "state.json")
        if header.get("format") != FORMAT:
            raise StateError(f"{self.path}: state of format {header.get('format')!r}, this program knows {FORMAT}")
        if mode := self.path.stat().st_mode & 0o077:
            raise StateError(f"{self.path}: others may open the state (mode bits {mode:03o}); chmod 700 {self.path}")
        self.run = str(header["run"])
        self.secret = Secret.load(self.path / "secret.key")
        for number, file in enumerate(sorted(self.path.glob("round-*.json")), start=1):
            record = RoundRecord(**self._read(file))
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

    def open(self, record: RoundRecord) -> None:
        """Pins a round before its copies are published. An open round may be pinned again with the same inputs.

        Raises:
            StateError: a round is open with other inputs.
        """
        if self.rounds and not self.rounds[-1].closed:
            pinned = self.rounds[-1]
            if dataclasses.replace(record, checkpoint=pinned.checkpoint) != pinned:
                raise StateError(
                    f"{self.path}: round {pinned.round} is open for {pinned.checkpoint} with {pinned.settings}, and its "
                    "noise must not be used for anything else; finish it with `postprocess`, repeat `preprocess` with the "
                    "same inputs, or start another state"
                )
        if self._new:
            with new_directory(self.path, mode=0o700) as folder:
                self.secret.save(folder / "secret.key")
                write_json(folder / "state.json", {"format": FORMAT, "run": self.run}, mode=0o600)
            self._new = False
        self._store(record)

    def close(self) -> None:
        """Marks the last round as aggregated, so that the next `preprocess` begins another."""
        self._store(dataclasses.replace(self.rounds[-1], closed=True))

    def _store(self, record: RoundRecord) -> None:
        write_json(self.path / f"round-{record.round:03d}.json", dataclasses.asdict(record), mode=0o600)
        self.rounds[record.round - 1 :] = [record]
