"""Membership: can the server tell, for a text that it has, whether the text was in the forget set?

Two kinds of scores, larger for members:

- *Drop*: by how much the text becomes less likely, in nats per answer token. It needs only the two models, so every
  model that forgot the text gives it away, however it was made: this is the floor.
- *Surplus*: the update is compared with the gradients that the candidate texts would have caused. Ridge regression
  explains Δ by all candidates' normalized gradients at once, min_a ‖Δ - Σ aᵢ gᵢ‖² + λ‖a‖², which separates texts whose
  gradients are alike; the cosine of Δ and gᵢ does not. One weight matrix suffices, the projection out of the last FFN.

A gradient of a linear weight is Σ δ xᵀ over the positions. If the matrix is large, δ and x are each projected to a few
random dimensions first, and Δ likewise, which keeps inner products approximately (Johnson-Lindenstrauss).

Not covered: scores that need several rounds, or a model of how the client trains.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mpunlearn.client.audit.subject import Subject
from mpunlearn.errors import UpdateError
from mpunlearn.lm.examples import Example, collate
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.model import forward, nll, pad_id

RIDGE = 0.01
"""λ, for gradients of norm 1."""
SIDE = 128
"""δ and x are projected to at most this many dimensions."""
BATCH = 16
"""Texts per forward or backward pass."""


def mean_nll(model: Any, tokenizer: Any, texts: Sequence[Example]) -> torch.Tensor:
    """NLL per answer token of each text, in nats, shape (N,), float64."""
    tokens = torch.tensor([max(1, text.tokens) for text in texts], dtype=torch.float64)
    return torch.tensor(nll(model, list(texts), BATCH, tokenizer), dtype=torch.float64).div(tokens)


def surplus(subject: Subject, texts: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ridge coefficient of each candidate text, and the cosine of its gradient with Δ.

    Args:
        subject: the copy and its update.
        texts: N candidates, members and non-members alike; the coefficients depend on all of them.

    Returns:
        Two tensors of shape (N,), float64. Both are the same for every size of Δ, so that copies can be averaged.

    Raises:
        UpdateError: the update changes no linear weight of a transformer layer.
    """
    name = _weight(subject)
    outputs, inputs = subject.copy.tensors[name].shape
    left, right = _projection(outputs, 1), _projection(inputs, 2)
    delta = (left @ subject.delta(name).double() @ right.T).flatten()
    delta /= delta.norm().clamp(min=1e-300)
    gradients = _gradients(subject, name, texts, left, right)
    gradients /= gradients.norm(dim=1, keepdim=True).clamp(min=1e-300)
    cosine: torch.Tensor = gradients @ delta
    gram = gradients @ gradients.T + RIDGE * torch.eye(len(texts), dtype=torch.float64)
    coefficients: torch.Tensor = torch.linalg.solve(gram, cosine)
    return coefficients, cosine


def _weight(subject: Subject) -> str:
    """The projection out of the last FFN, or the updated linear weight that is most like it."""

    def preference(name: str) -> tuple[bool, int, str]:
        role = subject.architecture.role_of(name)
        assert role is not None
        assert role.layer is not None
        return role.axes[0] == ("residual",) and role.axes[1] != ("attended",), role.layer, name

    roles = {name: subject.architecture.role_of(name) for name in subject.names}
    in_layers = [
        name
        for name, role in roles.items()
        if role is not None and role.layer is not None and len(role.axes) == 2 and subject.linear(name) is not None
    ]
    if not in_layers:
        raise UpdateError(
            f"{subject.path}: changes no linear weight of a transformer layer, so candidates cannot be compared with it"
        )
    return max(in_layers, key=preference)


def _projection(dimensions: int, seed: int) -> torch.Tensor:
    """A matrix that keeps inner products: the identity, or random normals if there are more than `SIDE` dimensions."""
    if dimensions <= SIDE:
        return torch.eye(dimensions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(SIDE, dimensions, generator=generator, dtype=torch.float64)
    return normals.div(SIDE**0.5)


def _gradients(
    subject: Subject, name: str, texts: Sequence[Example], left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """The projected gradient of each text's NLL with respect to one weight, shape (N, left rows x right rows), float64.

    One backward pass serves a whole batch: texts do not influence one another, so the gradient of the summed loss at a
    text's outputs is that of its own loss.
    """
    module = subject.linear(name)
    assert module is not None
    seen: dict[str, torch.Tensor] = {}

    def keep(_: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["inputs"] = arguments[0].detach()
        output.register_hook(lambda gradient: seen.update(gradient=gradient))  # type: ignore[no-untyped-call]

    for parameter in subject.model.parameters():
        parameter.requires_grad_(parameter is module.weight)
    handle = module.register_forward_hook(keep)
    rows = []
    try:
        for start in range(0, len(texts), BATCH):
            batch = collate(texts[start : start + BATCH], pad_id(subject.tokenizer))
            outputs = forward(subject.model, {key: value.to(subject.model.device) for key, value in batch.items()})
            subject.model.zero_grad()
            torch.autograd.backward(answer_nll(outputs["logits"], outputs["targets"]).sum())
            delta, inputs = seen["gradient"].cpu().double() @ left.T, seen["inputs"].cpu().double() @ right.T
            rows.append(torch.einsum("bto,bti->boi", delta, inputs).flatten(1))
    finally:
        handle.remove()
        subject.model.zero_grad()
    return torch.cat(rows)
