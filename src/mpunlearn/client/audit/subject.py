"""What the attacks look at: a published copy with the update that was trained from it, and hidden states of the copy.

The attacks run on the copy as published. Reparameterizations are orthogonal, so inner products, ranks and row spaces
are the same there as in the server's own coordinates, and the audit needs none of the server's secrets.

Weights are grouped by what they read: the query, key and value projections of a layer have one input, the projections
into its FFN another. A group's Δ is its weights' updates stacked along the outputs.

Not covered: the experts of MoE layers, whose weights transformers fuses. Their attention is covered.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import UpdateError
from mpunlearn.lm.model import load_model, load_tokenizer, pad_id, quiet
from mpunlearn.protocol.adapter import CONFIG, Adapter
from mpunlearn.protocol.exchange import FACTORS, Card, ReceivedUpdate, UpdateManifest
from mpunlearn.schema import read

BATCH_TOKENS = 4096
"""Tokens per forward pass, including padding."""
FLOAT32_ROUNDING = 2.0**-25
"""Half a unit in the last place of float32, relative to the number, at worst."""


@dataclass(frozen=True)
class Group:
    """Weights of one layer that read the same input."""

    label: str
    layer: int
    names: list[str]
    """Names of the weights."""
    module: str
    """Name of a module that has this input."""
    token_local: bool
    """Whether the input depends on the current token alone."""


@dataclass(frozen=True)
class Spectrum:
    """The row space of a group's Δ."""

    vectors: torch.Tensor
    """Eigenvectors of ΔᵀΔ as rows, by descending eigenvalue, shape (inputs, inputs), float64."""
    values: torch.Tensor
    """Eigenvalues of ΔᵀΔ, descending, shape (inputs,), float64."""
    rank: int
    """How many of Δ's singular values exceed what rounding alone leads to."""


class Subject:
    """A copy and its update.

    Args:
        copy: directory of the published copy.
        update: directory of the update, of the checkpoint that was trained from the copy, or of a PEFT adapter.

    Raises:
        FileError: either cannot be read.
        UpdateError: the update does not belong to the copy.
        UnsupportedModelError: the copy is not of a supported family.
    """

    def __init__(self, copy: Path, update: Path) -> None:
        self.copy, self.path = Checkpoint(copy), update
        self.architecture = Architecture.of(self.copy)
        if (update / "update.json").is_file():
            card = read(UpdateManifest, update / "update.json").mpunlearn
            self._tensors: TensorDirectory = TensorDirectory(update, stem="update")
        elif (update / CONFIG).is_file():
            received = ReceivedUpdate.open(update)
            self._tensors, card = received.tensors, received.card
        else:
            self._tensors = Checkpoint(update)
            card = Card.of(self._tensors.config)
        if card != (expected := Card.of(self.copy.config)):
            raise UpdateError(f"{update}: belongs to {card or 'no copy'}; expected {expected or 'no copy'}, as {copy}")
        if wrong := sorted(name for name in self.names if name not in self.copy.tensors):
            raise UpdateError(f"{update}: changes {wrong[0]}, which {copy} does not have; expected its tensor names")
        self.model = load_model(copy).eval()
        self.tokenizer = load_tokenizer(copy)

    @cached_property
    def names(self) -> set[str]:
        """Names of the tensors that the update changes."""
        names = {name[: -len(FACTORS[0])] if name.endswith(FACTORS) else name for name in self._tensors.tensors}
        if not isinstance(self._tensors, Checkpoint):
            return names
        known = {name for name in names if self.architecture.role_of(name) is not None}
        return {name for name in known if bool(self.delta(name).any())}

    def delta(self, name: str) -> torch.Tensor:
        """The update of one tensor, float32."""
        if name not in self._tensors.tensors:
            a, b = (self._tensors.read(name + factor).float() for factor in FACTORS)
            return b @ a
        value = self._tensors.read(name).float()
        return value - self.copy.read(name).float() if isinstance(self._tensors, Checkpoint | Adapter) else value

    def updated_model(self) -> Any:
        """The model after the update, float32."""
        state = {name: self.copy.read(name).float() for name in self.copy.tensors}
        for name in self.names:
            state[name] += self.delta(name)
        with quiet():
            model = type(self.model).from_pretrained(
                None, config=self.model.config, state_dict=state, dtype=torch.float32
            )
        return model.to(self.model.device).eval()

    def linear(self, name: str) -> torch.nn.Linear | None:
        """The linear layer with this weight; None if the model has no such layer."""
        module = self._modules.get(name.removesuffix(".weight"))
        return module if isinstance(module, torch.nn.Linear) else None

    @cached_property
    def _modules(self) -> dict[str, Any]:
        return dict(self.model.named_modules())

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of updated weights that read the residual stream or are token-local, by layer."""
        found: dict[tuple[int, str], list[str]] = {}
        for name in sorted(self.names):
            role = self.architecture.role_of(name)
            if role is None or role.layer is None or len(role.axes) != 2 or self.linear(name) is None:
                continue
            local = self.architecture.token_local(role)
            if role.axes[1] == ("residual",):
                attention = {"query", "key", "value", "qkv"} & set(role.axes[0])
                found.setdefault((role.layer, "attention" if attention else "FFN"), []).append(name)
            elif local:
                found.setdefault((role.layer, "FFN output"), []).append(name)
        groups = []
        for (layer, what), names in sorted(found.items()):
            local = all(self._token_local(name) for name in names)
            groups.append(Group(f"layer {layer}, {what}", layer, names, names[0].removesuffix(".weight"), local))
        return groups

    def _token_local(self, name: str) -> bool:
        role = self.architecture.role_of(name)
        return role is not None and self.architecture.token_local(role)

    def spectrum(self, group: Group) -> Spectrum:
        """The row space of a group's Δ.

        Rounding errors act like a matrix of independent entries. By the Marchenko-Pastur law its largest singular value
        is their standard deviation times √rows + √columns; three times that counts as signal.
        """
        inputs = self.copy.tensors[group.names[0]].shape[1]
        gram, noise, rows = torch.zeros(inputs, inputs, dtype=torch.float64), 0.0, 0
        for name in group.names:
            delta = self.delta(name).double()
            gram += delta.T @ delta
            noise += float(self._rounding(name, delta).square().sum())
            rows += len(delta)
        values, vectors = torch.linalg.eigh(gram)
        floor = 3 * (noise / (rows * inputs)) ** 0.5 * (rows**0.5 + inputs**0.5)
        values = values.flip(0).clamp(min=0)
        return Spectrum(vectors.T.flip(0), values, int((values.sqrt() > floor).sum()))

    def _rounding(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        """A bound on the rounding errors of Δ's entries: of the trained weights, and of the stored update."""
        weight = self.copy.read(name).double().abs() * FLOAT32_ROUNDING
        stored = self._tensors.tensors.get(name, self._tensors.tensors.get(name + FACTORS[0]))
        assert stored is not None
        of = weight / FLOAT32_ROUNDING if isinstance(self._tensors, Checkpoint) else delta.abs()
        return weight + of * torch.finfo(stored.dtype).eps / 2


class _StopForward(Exception):
    """Ends a forward pass once all states are known."""


@torch.no_grad()
def last_states(subject: Subject, sequences: Sequence[list[int]], modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """The inputs of some modules at the last token of each sequence.

    Args:
        subject: the copy.
        sequences: N token sequences.
        modules: names of the modules.

    Returns:
        For each module, its inputs, shape (N, inputs), float64 on the CPU.
    """
    seen: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def keep(name: str, arguments: tuple[Any, ...]) -> None:
        seen[name] = arguments[0]
        if len(seen) == len(modules):
            raise _StopForward

    handles = [
        subject.model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: keep(name, arguments)
        )
        for name in modules
    ]
    try:
        for batch in _batches(sequences, pad_id(subject.tokenizer)):
            seen.clear()
            on_device = {key: value.to(subject.model.device) for key, value in batch.items()}
            with suppress(_StopForward):
                subject.model(**on_device, use_cache=False)
            last = batch["attention_mask"].sum(dim=1) - 1
            for name, states in seen.items():
                of_batch = states.reshape(len(last), -1, states.shape[-1])
                parts[name].append(of_batch[torch.arange(len(last)), last].cpu().double())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(states) for name, states in parts.items()}


def _batches(sequences: Sequence[list[int]], pad: int) -> list[dict[str, torch.Tensor]]:
    """Token sequences in order, padded on the right, in batches of at most `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // max(map(len, sequences)))
    batches = []
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in part])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in part])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
