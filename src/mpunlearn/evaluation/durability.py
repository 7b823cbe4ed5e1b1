"""Relearning and quantization as single numbers, as the meta-evaluation of unlearning metrics scores them.

The curves of `robustness` show how knowledge comes back; these scores say how much of it does. Both compare a measure of
forgetting, m = 1 - forget_Q_A_Prob, before and after (arXiv 2506.12618, section 4.2, as in the code of arXiv 2605.24614):

- Relearning: one epoch on the forget set with a learning rate of 2e-5. R = min(Δ_retrained / Δ_unlearned, 1).
- Quantization: weights in 4 bits (NF4). Q = min(m_after / m_before, 1).

They are 1 if the model loses no more than the retrained model does, and nothing at all. The papers score metrics with them,
averaged over many models; here they score one model. They leave the batch size and the schedule open: here batches have 32
examples, in the order of the file, and the learning rate is constant. Not covered: other metrics than the probability.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.metrics import harmonic_mean
from mpunlearn.evaluation.probe import batch_of, probe
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import IGNORED, Example
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward
from mpunlearn.lm.sources import Data

LEARNING_RATE = 2e-5
BATCH = 32
BLOCK = 64
"""Weights that share one scale in NF4 (arXiv 2305.14314)."""
RELEARNED = "forget_Q_A_Prob by epochs of relearning"
QUANTIZED = "forget_Q_A_Prob in NF4"
Points = dict[str, float]
"""Point → forget_Q_A_Prob. The first point is before, the last one after."""


def relearning_score(model: tuple[float, float], retrained: tuple[float, float]) -> float:
    """`relearning_score`: R = min(Δ_retrained / Δ_unlearned, 1), with Δ = forget_Q_A_Prob after - before.

    It is 1 if relearning raises the probability no more than that of the retrained model, or not at all.

    Args:
        model: the probability before and after relearning.
        retrained: the same of the model that never saw the forget set.
    """
    gained, expected = model[1] - model[0], retrained[1] - retrained[0]
    return 1.0 if gained <= max(expected, 0.0) else max(expected, 0.0) / gained


def quantization_score(model: tuple[float, float]) -> float:
    """`quantization_score`: Q = min((1 - p_after) / (1 - p_before), 1).

    Args:
        model: the probability p before and after quantization.
    """
    before, after = 1 - model[0], 1 - model[1]
    return 1.0 if after >= before else after / before


def scores(model: dict[str, Points], retrained: dict[str, Points] | None) -> dict[str, float]:
    """The scores and their harmonic mean, as far as the curves were measured.

    Args:
        model: the curves of the model, by title.
        retrained: those of the model that never saw the forget set, which R needs.
    """
    result = {}
    if retrained is not None and RELEARNED in model and RELEARNED in retrained:
        result["relearning_score"] = relearning_score(_ends(model[RELEARNED]), _ends(retrained[RELEARNED]))
    if QUANTIZED in model:
        result["quantization_score"] = quantization_score(_ends(model[QUANTIZED]))
    if len(result) == 2:
        result["robustness_score"] = float(harmonic_mean(list(result.values())))
    return result


def _ends(points: Points) -> tuple[float, float]:
    first, *_, last = points.values()
    return first, last


def curves(
    model: Any,
    tokenizer: Any,
    forget: Questions,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> dict[str, Points]:
    """The probability of the forget answers before and after relearning and quantization. The model is not modified.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        forget: the forget set.
        batch_size: maximum number of sequences in a batch of the measurement.
        definitions: where a prompt ends, and what attention is masked, also while relearning.
        data: the system prompt and the values for the chat template.
    """
    examples, mask_pad = forget.encoded(tokenizer, definitions, data).answers, definitions.mask_pad

    def probability(of: Any) -> float:
        answers = probe(of, tokenizer, examples, batch_size, mask_pad)
        return float(np.mean([answer.probability for answer in answers]))

    def after(change: Callable[[Any], None]) -> float:
        student = copy.deepcopy(model)
        change(student)
        return probability(student)

    before = probability(model)
    relearned = after(lambda student: _relearn(student, tokenizer, examples, mask_pad))
    return {RELEARNED: {"0": before, "1": relearned}, QUANTIZED: {"float32": before, "nf4": after(round_nf4)}}


def _relearn(model: Any, tokenizer: Any, examples: list[Example], mask_pad: bool) -> None:
    """Trains all weights for one epoch, in place."""
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for start in range(0, len(examples), BATCH):
        batch = batch_of(examples[start : start + BATCH], tokenizer, mask_pad)
        output = forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        optimizer.zero_grad()
        tokens = (output["targets"] != IGNORED).sum()
        torch.autograd.backward(token_nll(output["logits"], output["targets"]).sum() / tokens)
        optimizer.step()


def nf4_levels() -> torch.Tensor:
    """The 16 levels of NF4 in [-1, 1]: quantiles of the normal distribution (arXiv 2305.14314, section 3), float32.

    The outermost quantile, 0.9677083, is that of the paper's implementation.
    """
    from scipy import stats

    outermost = 0.9677083
    positive = stats.norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate((negative, [0.0], positive)))
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


@torch.no_grad()
def round_nf4(model: Any) -> None:
    """Rounds all weights but embeddings, LM head and vectors to NF4 in place, in blocks of `BLOCK` with their own scale.

    The experts of MoE models are parameters of three axes and no linear layers; they are rounded, too, and so are routers.
    """
    kept = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    levels = nf4_levels().to(next(model.parameters()))
    middles = (levels[1:] + levels[:-1]) / 2
    for weight in model.parameters():
        if weight.dim() >= 2 and id(weight) not in kept:
            flat = weight.flatten()
            padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
            scale = padded.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
            rounded = levels[torch.bucketize(padded / scale, middles)] * scale
            weight.copy_(rounded.flatten()[: len(flat)].reshape(weight.shape))
