"""A published copy as a model: loading, sharding, forward passes, and its weights under their names on disk.

With several processes (`torchrun`, `accelerate launch`) every parameter is sharded over them (FSDP2's `fully_shard`), one
transformer layer after another: one mechanism for a small model on two processors and a large one on eight GPUs. It is
applied here rather than by accelerate, which knows no sharding without a GPU.

This module imports transformers at the top; import it where work begins.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import UnloadableError
from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.losses import answer_nll
from mpunlearn.lm.processes import processes

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
