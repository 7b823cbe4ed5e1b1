"""The weights that train: selected, adapted with LoRA, sharded over processes, and written as an update.

With several processes (`torchrun`, `accelerate launch`) every parameter is sharded over them by FSDP2's `fully_shard`, one
transformer layer after another: the same mechanism for a small model on two processors and a large one on eight GPUs. It is
applied here because accelerate does not shard without a GPU.
"""

import atexit
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.files import new_directory
from mpunlearn.lm.processes import full_tensor, is_main, processes
from mpunlearn.protocol.exchange import FACTORS, Card, UpdateManifest

LAYER = r"\.(layers|h|blocks)\.\d+\."
"""Matches the names of parameters inside transformer layers."""


def select(model: Any, train: str) -> set[str]:
    """Makes the selected weights of a model trainable, and no others; returns their names.

    Args:
        model: a transformers model.
        train: "blocks" (the transformer layers), "all", or a regular expression over the model's parameter names.

    Raises:
        PlanError: no parameter matches.
    """
    pattern = {"all": "", "blocks": LAYER}.get(train, train)
    names = [name for name, _ in model.named_parameters()]
    selected = {name for name in names if re.search(pattern, name)}
    if not selected:
        raise PlanError(f"--train: no parameter matches {train!r}; the first parameter is {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    return selected


def check_layer(path: Path, layer: int) -> None:
    """Refuses a layer whose hidden states a model does not return.

    Raises:
        PlanError: the model has too few layers. The last one does not count, since the final norm follows it.
    """
    layers = Checkpoint(path).config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layer < layers - 1:
        raise PlanError(f"--layer: expected 0 to {layers - 2} for the {layers} layers of {path}, found {layer}")


def adapt(model: Any, rank: int, alpha: float, selected: Collection[str], seed: int) -> Any:
    """The model with LoRA adapters on its selected linear weights (Hu et al., arXiv 2106.09685); only they train.

    Args:
        model: a transformers model.
        rank: of the adapters.
        alpha: the product of an adapter's factors is scaled by alpha / rank.
        selected: names of parameters.
        seed: of the adapters' initial values, the same for all copies.

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
        raise PlanError("--train: selects no weight of a linear layer, and only those take LoRA adapters")
    transformers.set_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft asks transformers by deprecated names
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def shard(model: Any) -> None:
    """Shards a model's parameters over all processes, in place; does nothing with one process."""
    if processes() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        PartialState(cpu=not gpu)
        atexit.register(torch.distributed.destroy_process_group)  # its threads must end before the interpreter does
    mesh = init_device_mesh("cuda" if gpu else "cpu", (processes(),))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What trained, under the names and in the shapes of the checkpoint on disk, float32 on the CPU.

    LoRA factors are called NAME.lora_A (rank x inputs) and NAME.lora_B (outputs x rank, with the scale multiplied in), where
    NAME is the weight's. A few tensors at a time are gathered from all processes, which must all iterate.
    """
    return _trained(model, lambda parameter: full_tensor(parameter.detach()).cpu().float())


def trained_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `trained` yields, without gathering anything."""
    light = _trained(model, lambda parameter: torch.empty(parameter.shape, device="meta"))
    return {name: tuple(value.shape) for name, value in light}


def _trained(model: Any, gather: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if hasattr(model, "peft_config"):
        scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
        for name, parameter in parameters.items():
            weight, factor = name.removeprefix("base_model.model.").split(".lora_")
            value = gather(parameter)
            yield f"{weight}.weight.lora_{factor[0]}", value * scaling if factor[0] == "B" else value
        return
    groups: dict[str, list[str]] = {}
    for name in parameters:  # transformers keeps the experts of a layer as one tensor, so they belong together
        groups.setdefault(name.split(".mlp.")[0] if ".experts." in name else name, []).append(name)
    for group in groups.values():
        yield from on_disk(model, {name: gather(parameters[name]) for name in group}).items()


def on_disk(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's parameters under the names and in the shapes that its checkpoint has on disk.

    The two differ where transformers merges several of a checkpoint's tensors, such as the experts of a mixture.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, parameters)
    return converted


def write_update(source: Checkpoint, model: Any, card: Card | None, dtype: torch.dtype, out: Path) -> None:
    """Writes what trained minus what was published, a few tensors at a time. All processes must call this.

    Args:
        source: the published copy.
        model: after training.
        card: of the copy.
        dtype: storage dtype of the update.
        out: a new directory.

    Raises:
        FileError: `out` cannot be written.
        CheckpointError: the update holds NaN or leaves the range of the dtype.
    """
    if not is_main():
        for _ in trained(model):
            pass
        return
    shapes = trained_shapes(model)
    for name in shapes:
        weight = name.rsplit(".lora_", 1)[0] if name.endswith(FACTORS) else name
        if weight not in source.tensors:
            raise CheckpointError(f"{source.path}: has no tensor {weight}, which its model trained; is it damaged?")
    with new_directory(out) as folder:
        with TensorWriter(folder, {name: (dtype, shape) for name, shape in shapes.items()}, stem="update") as writer:
            for name, value in trained(model):
                if not name.endswith(FACTORS):
                    value = value - source.read(name).float()
                cast = value.to(dtype)
                if not bool(cast.isfinite().all()):
                    raise CheckpointError(
                        f"{out}: the update of {name} holds NaN or leaves the range of {dtype}; train with a smaller "
                        "learning rate, or take --update-dtype float32"
                    )
                writer.write(name, cast)
        UpdateManifest(card).save(folder)
