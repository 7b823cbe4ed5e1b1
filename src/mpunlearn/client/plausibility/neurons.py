"""Which neurons a text switches on.

The gradient of an FFN weight is a sum over positions, weighted by what the neuron does at each of them. If one position
has nearly all of a neuron's activation, the neuron's row and column of the update are the gradient of this position
alone, which names it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.lm.examples import Example, collate

SINGLE = 0.9
"""A neuron belongs to a single position if that has at least this share of its squared activations."""
IDLE = 1e-6
"""A neuron is idle if its squared activations are below this share of the layer's mean."""


class Activations:
    """Sums over positions of a layer's squared activations, for each neuron."""

    def __init__(self, neurons: int) -> None:
        self.total, self.largest = torch.zeros(neurons), torch.zeros(neurons)

    def add(self, activations: torch.Tensor) -> None:
        """Adds positions, shape (positions, neurons)."""
        squares = activations.detach().float().square().cpu()
        self.total += squares.sum(dim=0)
        self.largest = torch.maximum(self.largest, squares.max(dim=0).values)

    def idle(self) -> torch.Tensor:
        return self.total <= IDLE * self.total.mean()

    def single(self) -> torch.Tensor:
        return (self.largest >= SINGLE * self.total) & ~self.idle()


@torch.no_grad()
def activations(model: Any, architecture: Architecture, names: Sequence[str], texts: Sequence[Example]) -> dict[str, Activations]:
    modules = {}
    for name in names:
        role = architecture.role_of(name)
        if role is not None and role.expert is None and role.axes in ((("residual",), ("ffn",)), (("residual",), ("gate",))):
            modules[name] = model.get_submodule(name.removesuffix(".weight"))
    found = {name: Activations(m.weight.shape[1]) for name, m in modules.items()}
    mask = {}
    def keep(name, arguments):
        x = arguments[0]
        found[name].add(x.reshape(-1, x.shape[-1])[mask["now"]])
    handles = [m.register_forward_pre_hook(lambda module, a, name=name: keep(name, a)) for name, m in modules.items()]
    for start in range(0, len(texts), 8):
        batch = collate(texts[start:start+8], 0)
        mask["now"] = batch["attention_mask"].flatten().bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for h in handles: h.remove()
    return found
