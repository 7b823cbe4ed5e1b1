"""Averages the updates that several clients trained on the same copy.

The average is taken in the basis of the copy, before the server inverts its reparameterization; since both operations
are linear, the order does not matter. LoRA factors are averaged without multiplying them out, by concatenation:
Σ v_c B_c A_c = [v_1 B_1 | v_2 B_2 | …] [A_1; A_2; …], where v_c is the weight of client c.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from mpunlearn.checkpoint import TensorWriter
from mpunlearn.errors import UpdateError
from mpunlearn.files import new_directory
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate, UpdateManifest


def average(updates: Sequence[Path], weights: Sequence[float], out: Path) -> Path:
    """Computes the weighted mean of several clients' updates of one copy, one tensor at a time, in float32.

    Args:
        updates: directories of the updates, which `examine` must have accepted.
        weights: weights of the clients; only their ratios matter.
        out: a new directory for the result.

    Raises:
        UpdateError: the updates do not change the same tensors.
        FileError: `out` cannot be written.
    """
    received = [ReceivedUpdate.open(path) for path in updates]
    shares = [weight / sum(weights) for weight in weights]
    first = received[0].tensors.tensors
    for update in received[1:]:
        if difference := sorted(set(first) ^ set(update.tensors.tensors)):
            raise UpdateError(
                f"{update.tensors.path} and {updates[0]} update different tensors, first {difference[0]}; all clients "
                "must train with the same plan"
            )

    def parts(name: str) -> list[torch.Tensor]:
        return [update.tensors.read(name).float() for update in received]

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, info in first.items():
        if not name.endswith(FACTORS):
            specs[name] = (torch.float32, info.shape)
        elif name.endswith(FACTORS[0]):
            weight, inputs = name.removesuffix(FACTORS[0]), info.shape[1]
            outputs = first[weight + FACTORS[1]].shape[0]
            rank = sum(update.tensors.tensors[name].shape[0] for update in received)
            if rank <= min(inputs, outputs):
                specs |= {name: (torch.float32, (rank, inputs)), weight + FACTORS[1]: (torch.float32, (outputs, rank))}
            else:
                specs[weight] = (torch.float32, (outputs, inputs))
    with new_directory(out, mode=0o700) as folder:
        with TensorWriter(folder, specs, stem="update") as writer:
            for name in specs:
                if name.endswith(FACTORS[0]):
                    writer.write(name, torch.cat(parts(name)))
                elif name.endswith(FACTORS[1]):
                    scaled = [share * part for share, part in zip(shares, parts(name), strict=True)]
                    writer.write(name, torch.cat(scaled, dim=1))
                elif name in first:
                    writer.write(name, _mean(shares, parts(name)))
                else:
                    a, b = parts(name + FACTORS[0]), parts(name + FACTORS[1])
                    writer.write(name, _mean(shares, [y @ x for x, y in zip(a, b, strict=True)]))
        UpdateManifest(received[0].card).save(folder)
    return out


def _mean(shares: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(values[0])
    for share, value in zip(shares, values, strict=True):
        total.add_(value, alpha=share)
    return total
