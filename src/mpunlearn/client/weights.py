"""The trained weights: selecting them, adding LoRA adapters, and what they are called in the update.

By default, the weights of the transformer layers are trained, except the token-local ones: the row space of their
update would list the tokens of the forget set (see `disclosure`). With LoRA, only the outer factor B is
trained. The gradient of the inner factor A is (Bᵀ δ) xᵀ, so a trained A would show the inputs x as well. A is fixed at
random values that depend on the copy: a different small subspace for every copy and round, so that all of them together
can change the weights in more directions than one could.

All of this also works on a model without values, so that a model can be sharded before it is loaded (see `sharding`).
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError
from mpunlearn.protocol.exchange import FACTORS, Card

LAYER = r"\.(layers|h|blocks)\.\d+\."
"""Matches the names of parameters inside transformer layers."""
PREFIX = "base_model.model."
"""What the names of an adapted model's parameters begin with."""
INNER = ".lora_A."
"""Part of the names of the inner factors of adapters."""


def select(model: Any, train: str, token_local: bool = False) -> set[str]:
    """Makes only the selected weights of a model trainable, and returns their names.

    Args:
        model: a transformers model.
        train: "blocks" (the transformer layers without their token-local weights), "all", or a regular expression over
            the model's parameter names.
        token_local: with "blocks", also select the token-local weights.

    Raises:
        PlanError: no parameter matches, or it is not known which ones are token-local.
    """
    pattern = {"all": "", "blocks": LAYER}.get(train, train)
    names = [name for name, _ in model.named_parameters()]
    selected = {name for name in names if re.search(pattern, name)}
    if train == "blocks" and not token_local:
        if (architecture := architecture_of(model)) is None:
            raise PlanError(
                "--train blocks: leaves out the token-local weights, which are not known for model_type "
                f"{model.config.model_type!r}; name the weights to train with a regular expression"
            )
        selected -= token_local_weights(architecture, names)
    if not selected:
        raise PlanError(f"--train: no parameter matches {train!r}; parameters have names such as {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    return selected


def architecture_of(model: Any) -> Architecture | None:
    """The architecture of a loaded model; None if its family has no table."""
    family = FAMILIES.get(model.config.model_type)
    return None if family is None else Architecture(family, model.config.to_dict())


def token_local_weights(architecture: Architecture, names: Iterable[str]) -> set[str]:
    """Those of these weights that are token-local; see `Architecture.token_local`."""
    roles = {name: architecture.role_of(name) for name in names}
    return {name for name, role in roles.items() if role is not None and architecture.token_local(role)}


def naming(model: Any, names: Iterable[str]) -> set[str]:
    """Those of these parameters whose update names the tokens of the examples: embeddings, LM head, token-local ones."""
    names = set(names)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(module.weight) for module in embeddings if module is not None}
    found = {name for name, parameter in model.named_parameters() if id(parameter) in tables} & names
    architecture = architecture_of(model)
    return found if architecture is None else found | token_local_weights(architecture, names)


def check_layer(path: Path, layer: int) -> None:
    """Rejects a layer whose hidden states the model does not return.

    Raises:
        PlanError: there is no such layer, or it is the last one, whose output is returned only after the final norm.
    """
    layers = Checkpoint(path).config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layer < layers - 1:
        raise PlanError(f"--layer: expected 0 to {layers - 2} for the {layers} layers of {path}, found {layer}")


def adapt(model: Any, rank: int, alpha: float, selected: Collection[str], seed: int, card: Card | None) -> Any:
    """Adds LoRA adapters (Hu et al., arXiv 2106.09685) to the selected linear weights.

    Only their outer factor B is trained, as in LoRA-FA (Zhang et al., arXiv 2308.03303). B begins at zero. The inner
    factor A is uniform in ± 1/√inputs, as usual, and determined by seed, card and the name of the weight.

    Args:
        model: a transformers model.
        rank: rank of the adapters.
        alpha: the product of an adapter's factors is scaled by alpha / rank.
        selected: names of the selected parameters.
        seed: seed for A.
        card: run, round and number of the copy, for which A is drawn; None for an ordinary checkpoint.

    Raises:
        PlanError: no linear weight is selected.
    """
    import peft

    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in selected
    ]
    if not linear:
        raise PlanError(
            "--train: selects no linear layer, but LoRA adapters need one; select more, or give --lora-rank 0"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft uses deprecated names of transformers
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if INNER in name:
            parameter.data.copy_(inner_factor(name, parameter.shape, seed, card))
            parameter.requires_grad_(False)
    return adapted


def inner_factor(name: str, shape: torch.Size, seed: int, card: Card | None) -> torch.Tensor:
    """The values of an adapter's inner factor A; see `adapt`.

    Args:
        name: name of the parameter in the adapted model.
        shape: its shape, (rank, inputs).
        seed: as for `adapt`.
        card: as for `adapt`.
    """
    copy = f"{card.run} {card.round} {card.copy}" if card is not None else ""
    digest = hashlib.sha256(f"{seed} {copy} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values: torch.Tensor = (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5
    return values


@dataclass(frozen=True)
class Trained:
    """A parameter that is part of the update."""

    parameter: torch.Tensor
    """The parameter, which may be sharded over processes."""
    shapes: dict[str, tuple[int, ...]]
    """Names and shapes of its tensors in the update. Transformers merges some, such as the experts of a layer."""
    convert: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    """Converts the whole parameter to these tensors."""


def trained(model: Any) -> list[Trained]:
    """The parameters that are part of the update, without gathering anything.

    LoRA factors are called NAME.lora_A (rank x inputs, not trained but part of the update) and NAME.lora_B (outputs x
    rank, multiplied by the scale), where NAME is the name of the weight.
    """
    if not hasattr(model, "peft_config"):
        return [
            Trained(parameter, shapes_on_disk(model, name, parameter.shape), partial(_named_on_disk, model, name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
    scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
    base, found = model.get_base_model(), []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module, factor = name.removeprefix(PREFIX).split(".lora_")
            (weight,) = on_disk(base, {f"{module}.weight": torch.empty(0)})
            stored, scale = (weight + FACTORS[0], 1.0) if factor.startswith("A") else (weight + FACTORS[1], scaling)
            found.append(Trained(parameter, {stored: tuple(parameter.shape)}, partial(_scaled, stored, scale)))
    return found


def _named_on_disk(model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return on_disk(model, {name: value})


def _scaled(name: str, scale: float, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value * scale}


def shapes_on_disk(model: Any, name: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that hold a parameter of that name and shape in the checkpoint on disk."""
    tensors = on_disk(model, {name: torch.empty(shape, device="meta")})
    return {stored: tuple(tensor.shape) for stored, tensor in tensors.items()}


def on_disk(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts a model's parameters to the names and shapes that they have in its checkpoint on disk.

    These differ where transformers merges several tensors of a checkpoint, such as the experts of an MoE layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, parameters)
    return converted
