"""The keys of some streams of a secret, for a worker on another machine that computes a part of the copies.

The idea: HKDF derives the key of each stream from the run's key, and not the other way round. A worker that gets the keys of
the streams that its shard needs can compute this shard, and learns nothing of the noise of any other. Which streams these
are is found by asking for them: `Wanted` stands for the secret while the maps are put together, notes the name of every
stream, and draws nothing.

Not covered: maps that several shards share, such as the permutation of the residual stream. Whoever computes one shard
knows them.
"""

from collections.abc import Iterable

import numpy as np
import torch

from mpunlearn.server.secret import Secret, Stream

Labels = tuple[str | int, ...]


class StreamKeys:
    """The streams of some names.

    Args:
        keys: the key of each stream, by name.
    """

    def __init__(self, keys: dict[Labels, bytes]) -> None:
        self._keys = keys

    @classmethod
    def of(cls, secret: Secret, names: Iterable[Labels]) -> "StreamKeys":
        """Derives the keys of streams from a secret."""
        return cls({labels: secret.key(*labels) for labels in names})

    def stream(self, *labels: str | int) -> Stream:
        """The stream with this name, which must be one of those."""
        return Stream(self._keys[labels])

    def __repr__(self) -> str:
        return f"StreamKeys(of {len(self._keys)} streams)"


class Wanted:
    """Stands for a secret, and notes which streams are asked for."""

    def __init__(self) -> None:
        self.names: set[Labels] = set()

    def stream(self, *labels: str | int) -> Stream:
        """A stream that draws nothing."""
        self.names.add(labels)
        return _Blank(b"")


class _Blank(Stream):
    """Draws what changes nothing: identities, without spending time on random numbers."""

    def uniforms(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.arange(count)

    def signs(self, count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.float64)

    def orthogonal(self, count: int, dim: int) -> torch.Tensor:
        return torch.eye(dim, dtype=torch.float64).repeat(count, 1, 1)
