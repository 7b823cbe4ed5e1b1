"""UDS, the unlearning depth score: how much knowledge is gone from a model's hidden states (arXiv 2605.24614).

A model can stop saying what its hidden states still contain. UDS therefore patches: the original model, which has the
knowledge, computes an answer's log-likelihood while the output of one of its layers is replaced by that of another model. If
the likelihood drops with the states of the retrained model, the layer carries the knowledge. If it drops as much with those of
the unlearned model, the knowledge is gone from there.

`likelihood_drops` measures one model. `unlearning_depth` compares the drops of the unlearned and of the retrained model, so
the latter are measured once for any number of unlearned models. The last layer is patched before the final normalization.

As in the paper, only the positions that predict the entity are patched, and only its tokens are scored. Rows name it in
the column entity. Where the column is missing or its text does not occur in the tokens with loss, all of these take its place,
which is our choice: it also counts tokens that say nothing about the fact, so the two kinds of values cannot be compared.

Layers are found by their number, so every decoder of transformers works. All models need the architecture and tokenizer of
the original. Not covered: patching of attention or FFN alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpunlearn.errors import PlanError
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.probe import batch_of, batches_of
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import IGNORED, Example
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward
from mpunlearn.lm.sources import Data
from mpunlearn.progress import progress

THRESHOLD = 0.05
"""A layer carries the knowledge if the retrained model's states lower the log-likelihood by more (nats per token)."""


def unlearning_depth(retrained: np.ndarray, model: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """`UDS` of every example: Σ s1 · clip(s2 / s1, 0, 1) / Σ s1 over the layers with s1 > threshold (section 3).

    It is 1 if the knowledge is gone as from the retrained model, and 0 if all of it is left.

    Args:
        retrained: s1, the drops with the retrained model's states, shape (N, layers), in nats per token.
        model: s2, the drops with the unlearned model's states, likewise.
        threshold: see `THRESHOLD`.

    Returns:
        Shape (N,); NaN for an example without such a layer, which the paper leaves out, too.
    """
    weights = np.where(retrained > threshold, retrained, 0.0)
    erased = np.minimum(np.maximum(model, 0.0), weights)
    total = weights.sum(axis=1)
    return np.where(total > 0, erased.sum(axis=1) / np.where(total > 0, total, 1), np.nan)


@torch.no_grad()
def likelihood_drops(
    original: Any,
    model: Any,
    tokenizer: Any,
    forget: Questions,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> np.ndarray:
    """How much the mean log-likelihood of each entity drops when a layer's output is patched.

    Args:
        original: the model before unlearning, which is patched.
        model: the model whose hidden states replace those of the original.
        tokenizer: their tokenizer.
        forget: the forget set.
        batch_size: maximum number of sequences in a batch (default: only `BATCH_TOKENS` limits a batch).
        definitions: where a prompt ends, and what attention is masked.
        data: the system prompt and the values for the chat template.

    Returns:
        Drops in nats per token, shape (N, layers), float64.

    Raises:
        PlanError: the models differ in the number or size of their layers.
    """
    targets, sources = layers_of(original), layers_of(model)
    sizes = [
        (len(layers), m.config.get_text_config().hidden_size) for layers, m in ((targets, original), (sources, model))
    ]
    if sizes[0] != sizes[1]:
        raise PlanError(
            f"--depth: expected models of one architecture, found {sizes[0][0]} layers of size {sizes[0][1]} in the "
            f"original model and {sizes[1][0]} of size {sizes[1][1]}"
        )
    original.eval()
    model.eval()
    examples = entities(forget, tokenizer, definitions, data)
    drops = np.zeros((len(examples), len(targets)))
    for indices in progress(batches_of([len(example.input_ids) for example in examples], batch_size), "patching"):
        batch = batch_of([examples[i] for i in indices], tokenizer, definitions.mask_pad)
        batch = {key: tensor.to(original.device) for key, tensor in batch.items()}
        predicting = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1)).unsqueeze(-1)
        states = _outputs(model, sources, batch)
        whole = _log_likelihoods(original, batch)
        for number, (layer, state) in enumerate(zip(targets, states, strict=True)):
            with _patched(layer, state, predicting):
                drops[indices, number] = (whole - _log_likelihoods(original, batch)).cpu().numpy()
    return drops


def layers_of(model: Any) -> Sequence[torch.nn.Module]:
    """The decoder layers of a model: the outermost list of modules with as many entries as the config says.

    Raises:
        PlanError: there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise PlanError(f"--depth: found no list of {count} layers in {type(model).__name__}; leave --depth out")
    return list(min(lists, key=lambda entry: entry[0])[1])


def entities(
    forget: Questions, tokenizer: Any, definitions: Definitions = OPENUNLEARNING, data: Data | None = None
) -> list[Example]:
    """The answers, tokenized, with labels only on the tokens of their entities."""
    answers = forget.encoded(tokenizer, definitions, data).answers
    names = forget.entities or [""] * len(answers)
    return [_only(example, name, tokenizer) for example, name in zip(answers, names, strict=True)]


def _only(example: Example, entity: str, tokenizer: Any) -> Example:
    """An example with labels only on its entity; on its whole answer without the end token if the entity is not found."""
    counted = [i for i, label in enumerate(example.labels) if i and label != IGNORED]
    end = next((at for at, i in enumerate(counted) if example.labels[i] == tokenizer.eos_token_id), len(counted))
    counted = counted[: max(1, end)]  # without what a template writes after the end token, too
    ids = [example.input_ids[i] for i in counted]
    start = tokenizer.decode(ids).find(entity) if entity else -1
    if start >= 0:
        ends = [len(tokenizer.decode(ids[: number + 1])) for number in range(len(ids))]  # in characters
        spans = zip(counted, [0, *ends[:-1]], ends, strict=True)
        counted = [i for i, begin, end in spans if end > start and begin < start + len(entity)]
    kept = set(counted)
    return replace(example, labels=[label if i in kept else IGNORED for i, label in enumerate(example.labels)])


def _outputs(model: Any, layers: Sequence[torch.nn.Module], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The output of every layer, each of shape (B, L, H)."""
    states: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda module, inputs, output: states.append(_hidden(output)))
            stack.callback(handle.remove)
        forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
    return states


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns, which is a tensor or a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _patched(layer: torch.nn.Module, state: torch.Tensor, where: torch.Tensor) -> Iterator[None]:
    """Replaces the output of a layer at the given positions, shape (B, L, 1), for a while."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden = _hidden(output)
        mixed = torch.where(where, state.to(hidden), hidden)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _log_likelihoods(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean log-likelihood of the labeled tokens of each example, in nats, shape (B,), float64."""
    output = forward(model, batch)
    counted = (output["targets"] != IGNORED).sum(dim=1)
    return -token_nll(output["logits"], output["targets"]).double().sum(dim=1) / counted
