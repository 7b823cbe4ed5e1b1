"""Which FFN neurons a text switches on.

The gradient of an FFN weight is a sum over positions in which each neuron's row or column is weighted by what the neuron
does there. If nearly all of a neuron's activation is at one position, its row and column of the update are the gradient of
that position alone, and Adam's rescaling makes it as large as any other. *Privacy Backdoors* (Feng and Tramèr, arXiv
2404.00473) and tags with a neuron each work this way. In a trained model, nearly every neuron does something nearly
everywhere.

Not covered: the experts of MoE layers, whose weights transformers fuses, and attention heads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.client.plausibility.report import Measured
from mpunlearn.lm.examples import Example, collate

ALONE = 0.9
"""A position switches a neuron on alone if it has at least this share of the neuron's squared activations."""
SILENT = 1e-6
"""A neuron is idle if its squared activations are below this share of the layer's mean."""
BATCH = 8
"""Texts per forward pass."""


class _Layer:
    """Squared activations of a layer's neurons, over all positions."""

    def __init__(self, neurons: int) -> None:
        self.total, self.largest = torch.zeros(neurons), torch.zeros(neurons)

    def add(self, activations: torch.Tensor) -> None:
        """Adds positions, shape (positions, neurons)."""
        squares = activations.float().square().cpu()
        self.total += squares.sum(dim=0)
        self.largest = torch.maximum(self.largest, squares.max(dim=0).values)

    def shares(self) -> tuple[float, float]:
        """The shares of idle neurons and of those that one position switches on alone."""
        idle = self.total <= SILENT * self.total.mean()
        single = (self.largest >= ALONE * self.total) & ~idle
        return float(idle.float().mean()), float(single.float().mean())


@torch.no_grad()
def measure(
    model: Any, architecture: Architecture, texts: Sequence[Example], what: str, pad: int
) -> Iterator[tuple[Measured, Measured]]:
    """Measures the neurons of every layer on some texts: the idle ones and the single ones.

    Args:
        model: the copy.
        architecture: its architecture.
        texts: the texts; at least one.
        what: what they are, for messages.
        pad: the padding token.
    """
    outputs = dict(_outputs(model, architecture))
    layers = {name: _Layer(module.weight.shape[1]) for name, module in outputs.items()}
    real = torch.tensor([])

    def keep(name: str, arguments: tuple[Any, ...]) -> None:
        layers[name].add(arguments[0].flatten(0, -2)[real])

    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: keep(name, arguments))
        for name, module in outputs.items()
    ]
    try:
        for start in range(0, len(texts), BATCH):
            batch = collate(texts[start : start + BATCH], pad)
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            real = inputs["attention_mask"].flatten().bool()
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        idle, single = layer.shares()
        where = f"{name} on {what}"
        yield Measured("idle", idle, where), Measured("single", single, where)


def _outputs(model: Any, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """The linear layers that read the neurons, by the name of their weight."""
    for name, module in model.named_modules():
        role = architecture.role_of(f"{name}.weight") if isinstance(module, torch.nn.Linear) else None
        if role is not None and role.axes in ((("residual",), ("ffn",)), (("residual",), ("gate",))):
            yield f"{name}.weight", module
