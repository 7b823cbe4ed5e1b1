"""The trained weights: selecting them, adding LoRA adapters, sharding over processes, and writing the update.

By default, the weights of the transformer layers are trained, except the token-local ones: the row space of their
update would list the tokens of the forget set (see `disclosure`). With LoRA, only the outer factor B is
trained. The gradient of the inner factor A is (Bᵀ δ) xᵀ, so a trained A would show the inputs x as well. A is fixed at
random values that depend on the copy: a different small subspace for every copy and round, so that all of them together
can change the weights in more directions than one could.

With several processes (`torchrun`, `accelerate launch`), FSDP2's `fully_shard` shards every parameter over them, one
transformer layer at a time. The same code serves a small model on two CPU processes and a large one on eight GPUs. It
calls `fully_shard` itself because accelerate does not shard without a GPU.
"""

import atexit
import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.files import new_directory
from mpunlearn.lm.processes import full_tensor, is_main, processes
from mpunlearn.protocol.exchange import FACTORS, Card, UpdateManifest

LAYER = r"\.(layers|h|blocks)\.\d+\."
"""Matches the names of parameters inside transformer layers."""


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
    copy = f"{card.run} {card.round} {card.copy}" if card is not None else ""
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{seed} {copy} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data.copy_(values / parameter.shape[1] ** 0.5)
            parameter.requires_grad_(False)
    return adapted


def shard(model: Any) -> None:
    """Shards a model's parameters over all processes, in place; does nothing with one process."""
    if processes() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        PartialState(cpu=not gpu)
        atexit.register(torch.distributed.destroy_process_group)  # its threads must stop before the interpreter exits
    mesh = init_device_mesh("cuda" if gpu else "cpu", (processes(),))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained tensors, with the names and shapes that they have in the checkpoint on disk, float32 on the CPU.

    LoRA factors are called NAME.lora_A (rank x inputs, not trained but part of the update) and NAME.lora_B (outputs x
    rank, multiplied by the scale), where NAME is the name of the weight. Only a few tensors at a time are gathered from
    all processes. All processes must iterate.
    """
    return _trained(model, lambda parameter: full_tensor(parameter.detach()).cpu().float())


def trained_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `trained` yields, without gathering anything."""
    tensors = _trained(model, lambda parameter: torch.empty(parameter.shape, device="meta"))
    return {name: tuple(value.shape) for name, value in tensors}


def _trained(model: Any, gather: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(model, "peft_config"):
        scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                continue
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            (weight,) = on_disk(model.get_base_model(), {f"{module}.weight": torch.empty(0)})
            value = gather(parameter)
            yield f"{weight}.lora_{factor[0]}", value * scaling if factor[0] == "B" else value
        return
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[str, list[str]] = {}
    for name in parameters:  # transformers fuses the experts of a layer, so they are converted together
        groups.setdefault(name.split(".mlp.")[0] if ".experts." in name else name, []).append(name)
    for group in groups.values():
        yield from on_disk(model, {name: gather(parameters[name]) for name in group}).items()


def on_disk(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts a model's parameters to the names and shapes that they have in its checkpoint on disk.

    These differ where transformers merges several tensors of a checkpoint, such as the experts of an MoE layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, parameters)
    return converted


def write_update(source: Checkpoint, model: Any, card: Card | None, dtype: torch.dtype, out: Path) -> None:
    """Writes the trained minus the published weights, or the LoRA factors. All processes must call this.

    Args:
        source: the published copy.
        model: the trained model.
        card: the copy's card, or None for an ordinary checkpoint.
        dtype: storage dtype of the update.
        out: a new directory.

    Raises:
        FileError: `out` cannot be written.
        CheckpointError: the update contains NaN or exceeds the range of the dtype.
    """
    if not is_main():
        for _ in trained(model):
            pass
        return
    shapes = trained_shapes(model)
    for name in shapes:
        weight = name.rsplit(".lora_", 1)[0] if name.endswith(FACTORS) else name
        if weight not in source.tensors:
            raise CheckpointError(
                f"{source.path}: damaged: the trained tensor {weight} is missing; copy the directory again"
            )
    with new_directory(out) as folder:
        with TensorWriter(folder, {name: (dtype, shape) for name, shape in shapes.items()}, stem="update") as writer:
            for name, value in trained(model):
                if not name.endswith(FACTORS):
                    value = value - source.read(name).float()
                cast = value.to(dtype)
                if not bool(cast.isfinite().all()):
                    raise CheckpointError(
                        f"{out}: the update of {name} contains NaN or exceeds the range of {dtype}; use a smaller "
                        "--learning-rate, or --update-dtype float32"
                    )
                writer.write(name, cast)
        UpdateManifest(card).save(folder)
