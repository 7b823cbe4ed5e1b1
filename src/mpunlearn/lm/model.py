"""Loading checkpoints with transformers, and forward passes that compute only the logits that are needed.

A checkpoint may come from the other party, so loading it must neither run third-party code, nor open a connection, nor
open files elsewhere. Remote code is disabled, only the entries of its JSON files that `allowed` lists reach transformers,
implementations that transformers would download from the Hugging Face Hub are rejected, and a path that does not exist is
an error, not a model name on the Hub. Any exception that transformers raises for an invalid checkpoint becomes an
`UnloadableError`.

This module imports transformers at the top, which takes seconds, so import it only where the work begins.

Not covered: sharding over several processes (see `client.sharding`), which begins with a model without values; and
generation_config.json, whose entries, such as a repetition penalty, are transformers' defaults when text is generated.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError, UnloadableError
from mpunlearn.lm.allowed import allowed_config, link_tokenizer
from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.processes import compute_device

logger = logging.getLogger(__name__)
_BUILT_IN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""The implementations of attention and experts within transformers; any other would be downloaded from the Hub."""


def load(path: Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads the model and the tokenizer of a checkpoint directory; see `load_model` for the arguments.

    Raises:
        CheckpointError: it is not a checkpoint directory, or transformers cannot load it.
    """
    return load_model(path, device, dtype), load_tokenizer(path)


def model_device(name: str | None) -> torch.device:
    """The device that `--device` names; without a name, this process's GPU if it has one, else the CPU.

    Raises:
        PlanError: it is not available on this machine, or models do not run on it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PlanError(f"--device {name}: not available on this machine ({reason}); use cpu") from None
    if device.type == "meta":
        raise PlanError("--device: expected a device that computes, such as cpu or cuda, found meta")
    return device


def load_model(path: Path, device: str | None = None, dtype: torch.dtype = torch.float32, kind: Any = None) -> Any:
    """Loads the model of a checkpoint directory.

    Args:
        path: the checkpoint directory.
        device: name of the device (default: this process's GPU if it has one).
        dtype: dtype of the weights.
        kind: one of transformers' Auto classes (default: AutoModelForCausalLM).

    Raises:
        CheckpointError: it is not a checkpoint directory, or transformers cannot load it.
        PlanError: the device is not available.
    """
    target, config = model_device(device), _checked_config(path)
    begun = time.monotonic()
    with quiet(), _as_unloadable(path, "model"):
        model = (kind or transformers.AutoModelForCausalLM).from_pretrained(
            path,
            config=allowed_config(config),
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
        )
    model = model.to(target)
    millions, seconds = sum(parameter.numel() for parameter in model.parameters()) / 1e6, time.monotonic() - begun
    logger.debug("%s: %.1f M parameters on %s in %s, loaded in %.1f s", path, millions, model.device, dtype, seconds)
    return model


def empty_model(path: Path) -> Any:
    """The model of a checkpoint directory in float32, without values: its tensors are on the meta device.

    Raises:
        CheckpointError: it is not a checkpoint directory, or transformers does not know its model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    config = _checked_config(path)
    with quiet(), _as_unloadable(path, "model"), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(allowed_config(config), dtype=torch.float32)
    # How names on disk differ is looked up by the model's class, whose name FSDP2 changes: look it up before.
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [change for change in conversions if not isinstance(change, PrefixChange)]
    return model.eval()


def _checked_config(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        CheckpointError: it is not a checkpoint directory, or its config asks for external code.
    """
    config = Checkpoint(path).config
    if (code := _remote_code(config)) is not None:
        raise UnloadableError(
            f"{path}: config.json requests external code ({code}); remove that entry to use transformers' own code"
        )
    return config


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: it is not a checkpoint directory, or transformers cannot load its tokenizer.
    """
    Checkpoint(path)  # raises if the path does not exist, which transformers would treat as a model name on the Hub
    with quiet(), _as_unloadable(path, "tokenizer"), TemporaryDirectory() as folder:
        link_tokenizer(path, Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.name_or_path = str(path)
        return tokenizer


def _remote_code(config: Mapping[str, Any]) -> str | None:
    """A config entry that makes transformers load external code, such as a kernel from the Hub, or None."""
    for key, value in config.items():
        if "implementation" in key and value not in _BUILT_IN:
            return f"{key} = {value!r:.80}"
        if isinstance(value, Mapping) and (code := _remote_code(value)) is not None:
            return code
    return None


@contextmanager
def _as_unloadable(path: Path, what: str) -> Iterator[None]:
    """Turns any exception from transformers into an `UnloadableError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # caused by this machine, not by the checkpoint
        raise
    except Exception as error:
        raise UnloadableError(f"{path}: transformers cannot load its {what}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars for loading and saving within the block, but not its warnings and errors."""
    previous = transformers.utils.logging.set_tqdm_hook(
        lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True})
    )
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(previous)


def forward(model: Any, batch: dict[str, torch.Tensor], layer: int | None = None) -> dict[str, torch.Tensor]:
    """One forward pass, with logits only at the positions that predict a token with loss.

    The logits of all positions would be B · L · V numbers, more than anything else in a small batch. Hidden states are
    therefore gathered before they reach the output layer, whatever the model does with logits after it.

    Args:
        model: a causal language model from transformers.
        batch: input_ids, attention_mask and labels, each of shape (B, L).
        layer: also return the hidden states after this layer, counted from 0.

    Returns:
        logits, shape (B, T, V), and targets, shape (B, T), with T the largest number of tokens with loss in an example.
        The t-th logits of an example predict its t-th token with loss, which is targets[:, t]; `IGNORED` follows after
        its last one. If `layer` is given, also hidden, shape (B, T, H): hidden states at the same positions.
    """
    positions, targets = predicting(batch["labels"])
    with _only_at(model, positions):
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=layer is not None,
            use_cache=False,
        )
    result = {"logits": output.logits, "targets": targets}
    if layer is not None:
        result["hidden"] = _at(output.hidden_states[layer + 1], positions)
    return result


def predicting(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that predict tokens with loss.

    Args:
        labels: shape (B, L).

    Returns:
        Positions and targets, both of shape (B, T); see `forward`. Positions without a target are any others.
    """
    following = labels[:, 1:]
    counted = following != IGNORED
    longest = int(counted.sum(dim=1).max())
    positions = counted.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return positions, following.gather(1, positions)


@contextmanager
def _only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Lets the output layer see only some positions of the hidden states."""

    def select(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at(arguments[0], positions), *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states of shape (B, L, H) at positions of shape (B, T)."""
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1) * hidden.shape[1] + positions
    return hidden.flatten(0, 1).index_select(0, rows.flatten()).reshape(*positions.shape, hidden.shape[-1])


@torch.no_grad()
def nll(model: Any, examples: list[Example], batch_size: int, tokenizer: Any) -> list[float]:
    """NLL(y|x) of each example under the model, in nats: the sum over its tokens with loss, without dropout."""
    training = model.training
    model.eval()
    device = compute_device(next(model.parameters()))
    values: list[float] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        output = forward(model, {key: tensor.to(device) for key, tensor in batch.items()})
        values += answer_nll(output["logits"], output["targets"]).tolist()
    model.train(training)
    return values


def pad_id(tokenizer: Any) -> int:
    """The padding token. Any token works, since padding is masked and carries no loss."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
