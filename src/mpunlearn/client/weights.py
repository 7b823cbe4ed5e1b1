"""The weights that train."""

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
from mpunlearn.files import new_directory, write_json
from mpunlearn.lm.processes import is_main, processes
from mpunlearn.protocol.exchange import FACTORS, Card

LAYER = r"\.(layers|h|blocks)\.\d+\."
"""Matches the names of parameters inside transformer layers."""


def shard(model: Any) -> None:
    """Spreads a model's parameters over all processes, in place; nothing with one process."""
    if processes() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gpu = torch.cuda.is_available()
    PartialState(cpu=not gpu)
    mesh = init_device_mesh("cuda" if gpu else "cpu", (processes(),))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def adapt(model: Any, rank: int, scale: float, selected: Collection[str], seed: int) -> Any:
    """The model with LoRA adapters on its selected linear weights (Hu et al., arXiv 2106.09685), which alone train.

    Args:
        scale: the adapters' product is multiplied by scale / rank.
        selected: names of parameters.
        seed: of the adapters' beginning, the same for all copies.

    Raises:
        PlanError: no linear weight is selected.
    """
    import peft

    linear = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in selected
    ]
    if not linear:
        raise PlanError("--train: selects no weight of a linear layer, and only those take LoRA adapters")
    transformers.set_seed(seed)
    targets = [name.removesuffix(".weight") for name in linear]
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft still asks transformers by old names
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def trained_names(model: Any) -> list[str]:
    """Names of the parameters that train, as the model knows them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `trained` gives, without gathering anything."""
    light = trained(model, lambda parameter: torch.empty(parameter.shape, device="meta"))
    return {name: tuple(value.shape) for name, value in light}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu().float()


def trained(model: Any, gather: Callable[[torch.Tensor], torch.Tensor] = _whole) -> Iterator[tuple[str, torch.Tensor]]:
    """What trained, under the names and in the shapes of the checkpoint on disk, float32 on the processor.

    LoRA factors come as NAME.lora_A (rank x inputs) and NAME.lora_B (outputs x rank, the scale multiplied in), NAME being the
    weight's. A few tensors at a time are gathered from all processes, which must all iterate.
    """
    parameters = dict(model.named_parameters())
    names = trained_names(model)
    if hasattr(model, "peft_config"):
        scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
        for name in names:
            weight, factor = name.removeprefix("base_model.model.").split(".lora_")
            value = gather(parameters[name])
            yield f"{weight}.weight.lora_{factor[0]}", value * scaling if factor[0] == "B" else value
        return
    groups: dict[str, list[str]] = {}
    for name in names:  # experts of a layer belong together: transformers keeps them as one tensor
        groups.setdefault(name.split(".mlp.")[0] if ".experts." in name else name, []).append(name)
    for group in groups.values():
        yield from on_disk(model, {name: gather(parameters[name]) for name in group}).items()


def on_disk(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's parameters under the names and in the shapes that its checkpoint has on disk.

    They differ where transformers keeps several of a checkpoint's tensors as one, such as the experts of a mixture.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, parameters)
    return found


def check_layer(path: Path, layer: int) -> None:
    """Refuses a layer whose hidden states a checkpoint's model does not give.

    Raises:
        PlanError: the model has too few layers; after the last one comes the final norm.
    """
    layers = Checkpoint(path).config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layer < layers - 1:
        raise PlanError(f"--layer: expected 0 to {layers - 2} for the {layers} layers of {path}, found {layer}")


def _write(source: Checkpoint, model: Any, card: Card | None, dtype: Any, out: Path) -> None:
    """Writes what trained minus what was published, a few tensors at a time; all processes take part in gathering."""
    if not is_main():
        for _ in trained(model):
            pass
        return
    shapes = _shapes(source, model)
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
        write_json(folder / "update.json", {"format": 1, **(card.entry() if card else {})})


def _shapes(source: Checkpoint, model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an update's tensors."""
    shapes = trained_shapes(model)
    for name in shapes:
        weight = name.rsplit(".lora_", 1)[0] if name.endswith(FACTORS) else name
        if weight not in source.tensors:
            raise CheckpointError(f"{source.path}: has no tensor {weight}, which its model trained; is it damaged?")
    return shapes


def select(model: Any, train: str) -> set[str]:
    """Lets the selected weights of a model train, and no others; returns their names.

    Args:
        train: "blocks" (the transformer layers'), "all", or a regular expression over the model's parameter names.

    Raises:
        PlanError: no parameter matches.
    """
    pattern = {"all": "", "blocks": LAYER}.get(train, train)
    names = [name for name, _ in model.named_parameters()]
    selected = {name for name in names if re.search(pattern, name)}
    if not selected:
        raise PlanError(f"--train: no parameter matches {train!r}; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    return selected
