"""A short training, and the update that it leads to, for tests to compare."""

from pathlib import Path

import torch

from mpunlearn.checkpoint import TensorDirectory
from mpunlearn.client.resources import Resources
from mpunlearn.client.unlearn import unlearn
from mpunlearn.client.weights import trained
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.plan import Training

QUICK = Training(objective="npo", epochs=2, batch_size=4, learning_rate=1e-3, max_length=64)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    directory = TensorDirectory(path, stem="update")
    return {name: directory.read(name) for name in directory.tensors}


def trained_shapes(model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the update."""
    return {name: shape for part in trained(model) for name, shape in part.shapes.items()}


def with_options(**options) -> Training:
    return Training(**{**QUICK.__dict__, **options})


def update_of(path: Path, examples, out: Path, resources: Resources | None = None, **options) -> dict:
    """The update that training with those options gives."""
    if options.get("objective") == "rmu":
        options["parameters"] = {"layer": 0}
    data = Data(alternate_key="perturbed_answer")
    training, (forget, retain) = with_options(**options), examples
    return read_all(
        unlearn(path, forget=forget, retain=retain, out=out, training=training, data=data, resources=resources)
    )


def distance(one: dict, other: dict) -> float:
    """Relative Frobenius distance."""
    assert set(one) == set(other)
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (apart / sum(float(tensor.square().sum()) for tensor in one.values())) ** 0.5
