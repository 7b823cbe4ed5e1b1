"""The server's 256-bit secret key, and the pseudo-random streams derived from it.

The idea: the noise and the reparameterizations of the published copies must be unpredictable to the client, but the
server must be able to regenerate them after a restart, in any order and starting at any position. All of them are
therefore derived from one key, which comes from the operating system's entropy. Each random quantity has its own
stream, named by labels such as round, copy, tensor and purpose: HKDF-SHA256 (RFC 5869) of the key, with the labels as
`info`, yields an AES-256 key, and AES in counter mode (NIST SP 800-38A) yields the bytes. Counter mode is seekable, so
the noise of a tensor can be generated in slices of any size. With AES instructions, the keystream is also faster than
torch's random number generator.

Normals are computed with the Box-Muller transform: in each block of `BLOCK` 32-bit words, the first half determines the
radii and the second half the angles. A radius is at most sqrt(2 ln 2^32) = 6.66; about 3 in 10^11 true normals exceed
that.

Not covered: secrecy against an attacker who can read the server's memory or disk.
"""

import math
import os
import secrets as system_entropy
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpunlearn.errors import StateError
from mpunlearn.server.workspace import Workspace

KEY_BYTES = 32
BLOCK = 1 << 14
"""Normals per Box-Muller block. If a range begins or ends inside a block, the whole block is generated."""
CPU_BLOCKS, DEVICE_BLOCKS = 4, 1 << 8
"""Number of blocks that are computed at once on the CPU, so that they fit into the cache of one core, and on a GPU."""


class Streams(Protocol):
    """Where streams come from: a `Secret`, or the keys of some of its streams (see `keys`)."""

    def stream(self, *labels: str | int) -> "Stream":
        """The stream with this name."""
        ...


class Secret:
    """The key of a run. It never appears in `repr`, in an error message, or in a pickle."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise StateError(f"the secret has {len(key)} bytes, expected {KEY_BYTES}; restore the key file")
        self._key = key

    @classmethod
    def generate(cls) -> "Secret":
        """Generates a secret from the operating system's entropy."""
        return cls(system_entropy.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> "Secret":
        """Reads a key file.

        Raises:
            StateError: the file is missing or damaged, or users other than its owner can read it.
        """
        try:
            mode = path.stat().st_mode & 0o777
            key = path.read_bytes()
        except OSError as error:
            raise StateError(f"{path}: cannot read the secret: {error.strerror}") from None
        if mode & 0o077:
            raise StateError(
                f"{path}: mode {mode:04o} lets other users read the secret, expected 0600; run `chmod 600 {path}`"
            )
        return cls(key)

    def save(self, path: Path) -> None:
        """Writes a new key file with mode 0600 and syncs it to disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, self._key)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def stream(self, *labels: str | int) -> "Stream":
        """The stream with this name. Different labels give independent streams; 1 and "1" are different labels."""
        return Stream(self.key(*labels))

    def key(self, *labels: str | int) -> bytes:
        """The key of a stream, from which neither the run's key nor that of another stream can be computed."""
        info = b"".join(_encode(label) for label in labels)
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._key)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> "str":
        raise TypeError("a Secret cannot be pickled; pass the path of the server's state instead")


class Stream:
    """A seekable, practically endless stream of pseudo-random bytes from one AES-256 key.

    A stream has no position: every method reads from its beginning (or from `start`). Use each stream for one quantity
    only.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def read(self, count: int, start: int = 0) -> bytearray:
        """Returns `count` bytes, starting at byte `start` (a multiple of 16)."""
        out = bytearray(count)
        self._keystream(start).update_into(out, out)
        return out

    def _keystream(self, start: int) -> CipherContext:
        """The cipher, positioned at byte `start`; whatever it encrypts is combined with the keystream by XOR."""
        if start % 16:
            raise ValueError(f"start {start} is not a multiple of the cipher's 16-byte block")
        counter = (start // 16).to_bytes(16, "big")
        return Cipher(algorithms.AES(self._key), modes.CTR(counter)).encryptor()

    def normals(
        self, count: int, start: int = 0, out: torch.Tensor | None = None, workspace: Workspace | None = None
    ) -> torch.Tensor:
        """Standard normals `start` … `start + count - 1` of the stream, shape (count,), float32.

        Args:
            count: number of normals.
            start: index of the first one.
            out: output tensor, shape (count,), float32 or float64 (default: a new tensor). The transform runs on its
                device.
            workspace: memory for intermediate results (default: newly allocated).
        """
        out = torch.empty(count, dtype=torch.float32) if out is None else out
        if not count:
            return out
        transform = (workspace or Workspace()).kept(f"Box-Muller on {out.device}", lambda: _BoxMuller(out.device))
        stop, begin = start + count, start // BLOCK * BLOCK
        keystream = self._keystream(4 * begin)
        while begin < stop:
            blocks = min(transform.blocks, -(-(stop - begin) // BLOCK))
            low, high = max(begin, start), min(begin + blocks * BLOCK, stop)
            target = out[low - start : high - start]
            if high - low == blocks * BLOCK and out.dtype == torch.float32 and out.is_contiguous():
                transform.draw(keystream, target.view(blocks, 2, -1))
            else:
                whole = transform.draw(keystream, transform.whole[:blocks])
                target.copy_(whole.view(-1)[low - begin : high - begin])
            begin += blocks * BLOCK
        return out

    def uniforms(self, count: int) -> np.ndarray:
        """Uniforms in [0, 1), shape (count,), float64 with 53 random bits each."""
        words = np.frombuffer(self.read(8 * count), dtype="<u8")
        return (words >> np.uint64(11)) * 2.0**-53

    def permutation(self, count: int) -> torch.Tensor:
        """A random permutation of 0 … count-1, shape (count,), int64.

        It sorts random 64-bit keys, which is exactly uniform unless two keys collide (probability below count² / 2^65).
        """
        return torch.from_numpy(np.argsort(np.frombuffer(self.read(8 * count), dtype="<u8"), kind="stable"))

    def signs(self, count: int) -> torch.Tensor:
        """Independent random signs ±1, shape (count,), float64."""
        bits = np.frombuffer(self.read(count), dtype=np.uint8) & 1
        return torch.from_numpy(1.0 - 2.0 * bits)

    def angles(self, count: int) -> torch.Tensor:
        """Uniform angles in [0, 2π) radians, shape (count,), float64."""
        return torch.from_numpy(self.uniforms(count) * 2 * math.pi)

    def orthogonal(self, count: int, dim: int) -> torch.Tensor:
        """Haar-distributed orthogonal matrices, shape (count, dim, dim), float64.

        QR decomposition of normal matrices, with the signs of the diagonal of R moved into Q (Mezzadri 2007, arXiv
        math-ph/0609050).
        """
        normals = self.normals(count * dim * dim).double().view(count, dim, dim)
        q, r = torch.linalg.qr(normals)
        matrices: torch.Tensor = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
        return matrices


def _encode(label: str | int) -> bytes:
    """A prefix-free encoding, so that different sequences of labels never have the same encoding."""
    text = str(label).encode()
    kind = b"s" if isinstance(label, str) else b"i"
    return kind + len(text).to_bytes(4, "big") + text


class _BoxMuller:
    """The Box-Muller transform, with memory for all of its intermediate results.

    On the CPU, it computes so few blocks at a time that everything stays in the cache of one core. The views are made
    only once, since for so little data, making them takes as long as the arithmetic.

    Args:
        device: the device of the transform; the keystream always comes from the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = CPU_BLOCKS if device.type == "cpu" else DEVICE_BLOCKS
        self.whole = torch.empty((self.blocks, 2, BLOCK // 2), device=device)
        """Room for normals that a caller needs only a part of, shape (blocks, 2, BLOCK / 2), float32."""
        self._encrypted = torch.empty((self.blocks, 2, BLOCK // 2), dtype=torch.int32)
        self._bytes = self._encrypted.view(-1).numpy().data.cast("B")
        self._zeros = memoryview(bytes(len(self._bytes)))
        self._words = self._encrypted if device.type == "cpu" else torch.empty_like(self._encrypted, device=device)
        radius, angle, sine = (torch.empty((self.blocks, BLOCK // 2), device=device) for _ in range(3))
        self._all = (self._words[:, 0], self._words[:, 1], radius, angle, sine)

    def draw(self, keystream: CipherContext, out: torch.Tensor) -> torch.Tensor:
        """Fills `out`, shape (n, 2, BLOCK / 2) with n at most `blocks`, float32, from the next words of the keystream.

        The radius uses the lower 31 bits of a word as a number in (0, 1]. Numbers near zero, which produce the tail of
        the distribution, are where float32 has its finest resolution.
        """
        blocks, size = len(out), 4 * out.numel()
        keystream.update_into(self._zeros[:size], self._bytes[:size])
        if self._words is not self._encrypted:
            self._words[:blocks].copy_(self._encrypted[:blocks])
        first, second, radius, angle, sine = (
            self._all if blocks == self.blocks else [part[:blocks] for part in self._all]
        )
        radius.copy_(first.bitwise_and_(0x7FFFFFFF))
        radius.add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
        angle.copy_(second).mul_(2.0 * math.pi * 2.0**-32)
        torch.sin(angle, out=sine)
        torch.mul(sine, radius, out=out[:, 1])
        torch.mul(angle.cos_(), radius, out=out[:, 0])
        return out
