"""A published copy as a model: loading, sharding, forward passes, and its weights under their names on disk.

With several processes (`torchrun`, `accelerate launch`) every parameter is sharded over them (FSDP2's `fully_shard`), one
transformer layer after another: one mechanism for a small model on two processors and a large one on eight GPUs. It is
applied here rather than by accelerate, which knows no sharding without a GPU.

This module imports transformers at the top; import it where work begins.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.dataset import IGNORED, Example, collate
from mpunlearn.client.objectives import answer_nll
from mpunlearn.client.resources import processes
from mpunlearn.errors import PlanError, UnloadableError

LAYER = r"\.(layers|h|blocks)\.\d+\."
"""Matches the names of parameters inside transformer layers."""
_BUILT_IN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""Implementations of attention and experts that are part of transformers; others may be fetched from the hub."""


def load(path: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: transformers cannot load them.
    """
    return load_model(path), load_tokenizer(path)


def load_model(path: Path) -> Any:
    """The model of a checkpoint directory in float32, on this process's GPU where there is one.

    Raises:
        UnloadableError: transformers cannot load it.
    """
    quiet()
    if (code := _code(Checkpoint(path).config)) is not None:
        raise UnloadableError(f"{path}: its config.json names code of others, {code}; remove that")
    with _as_unloadable(path, "model"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    return model if processes() > 1 else model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        UnloadableError: transformers cannot load it.
    """
    quiet()
    with _as_unloadable(path, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _code(config: Mapping[str, Any]) -> str | None:
    """What in a configuration would make transformers load code from elsewhere: an attention kernel of the hub, say."""
    for key, value in config.items():
        if "implementation" in key and value not in _BUILT_IN:
            return f"{key} = {value!r:.80}"
        if isinstance(value, Mapping) and (found := _code(value)) is not None:
            return found
    return None


@contextmanager
def _as_unloadable(path: Path, what: str) -> Iterator[None]:
    """Whatever transformers raises where a config.json or a tokenizer makes no sense, as one error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # this machine's fault, not the checkpoint's
        raise
    except Exception as error:
        raise UnloadableError(f"{path}: transformers cannot load its {what}: {error}") from error


def quiet() -> None:
    """Silences transformers' bars for loading and saving; errors and warnings stay."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


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


def forward(model: Any, batch: dict[str, torch.Tensor], layer: int | None = None) -> dict[str, torch.Tensor]:
    """One forward pass, at the positions that predict a counted token of any example; logits elsewhere are never computed.

    Args:
        batch: input_ids, attention_mask and labels, each (B, L).
        layer: after which layer hidden states are wanted, counted from 0.

    Returns:
        logits (B, T, V) and targets (B, T): logits at position t predict targets[:, t]; with a layer also hidden (B, T, H).
    """
    following = batch["labels"][:, 1:]
    positions = (following != IGNORED).any(dim=0).nonzero().flatten()
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=positions,
        output_hidden_states=layer is not None,
        use_cache=False,
    )
    found = {"logits": output.logits, "targets": following[:, positions]}
    return found if layer is None else {**found, "hidden": output.hidden_states[layer + 1][:, positions]}


def check_layer(path: Path, layer: int) -> None:
    """Refuses a layer whose hidden states a checkpoint's model does not give.

    Raises:
        PlanError: the model has too few layers; after the last one comes the final norm.
    """
    layers = Checkpoint(path).config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layer < layers - 1:
        raise PlanError(f"--layer: expected 0 to {layers - 2} for the {layers} layers of {path}, found {layer}")


@torch.no_grad()
def nll(model: Any, examples: list[Example], batch_size: int, tokenizer: Any) -> list[float]:
    """NLL(y|x) of each example under the model, in nats."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    values: list[float] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        found = forward(model, {key: tensor.to(device) for key, tensor in batch.items()})
        values += answer_nll(found["logits"], found["targets"]).tolist()
    model.train(training)
    return values


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding is masked and carries no loss."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
