"""Average."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mpunlearn.checkpoint import TensorWriter
from mpunlearn.errors import UpdateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import FACTORS, ReceivedUpdate


def average(updates: Sequence[Path], weights: Sequence[float], out: Path) -> Path:
    """The weighted mean of several clients' updates of one copy, one tensor at a time, in float32.

    Args:
        updates: directories that `examine` let pass.
        weights: of the clients; only their ratios count.
        out: a new directory.

    Raises:
        UpdateError: they do not update the same tensors.
    """
    arrivals = [ReceivedUpdate.open(path) for path in updates]
    shares = [weight / sum(weights) for weight in weights]
    first = arrivals[0].tensors.tensors
    for arrival in arrivals[1:]:
        if difference := sorted(set(first) ^ set(arrival.tensors.tensors)):
            raise UpdateError(
                f"{arrival.tensors.path} and {updates[0]} update different tensors, the first is {difference[0]}; every "
                "client must train alike"
            )

    def parts(name: str) -> list[torch.Tensor]:
        return [arrival.tensors.read(name).float() for arrival in arrivals]

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, info in first.items():
        if not name.endswith(FACTORS):
            specs[name] = (torch.float32, info.shape)
        elif name.endswith(FACTORS[0]):
            weight, inputs = name.removesuffix(FACTORS[0]), info.shape[1]
            outputs = first[weight + FACTORS[1]].shape[0]
            rank = sum(arrival.tensors.tensors[name].shape[0] for arrival in arrivals)
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
        write_json(folder / "update.json", {"format": 1, **arrivals[0].card.entry()})
    return out


def _mean(shares: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(values[0])
    for share, value in zip(shares, values, strict=True):
        total.add_(value, alpha=share)
    return total
