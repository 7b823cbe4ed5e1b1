"""Whether the forgetting lasts: curves under relearning and under quantization, to compare with a retrained model's.

- Relearning: the model is fine-tuned on a few examples, and the probability of forget answers that are not among them is
  measured along the way. A model that has truly forgotten relearns them no faster than one that never knew them. The examples
  are some of the forget set, or, out of domain, some of the retain set: fine-tuning on other texts can bring knowledge back,
  too, and methods that withstand the one need not withstand the other (Fan et al., arXiv 2510.07626).
- Quantization: every weight matrix is rounded to 8 and to 4 bits, since rounding can undo small updates (Zhang et al.,
  arXiv 2410.16454).

Both work on an in-memory copy of the model. Relearning also needs gradients and AdamW's two moments, so it takes five
times the memory of the model in total. Not covered: quantization methods that use calibration data.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpunlearn.errors import DataError
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.probe import batch_of, probe
from mpunlearn.evaluation.sets import Questions
from mpunlearn.evaluation.tofu import PerExample, measure, summarize
from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward
from mpunlearn.lm.sources import Data

RELEARN_STEPS = (0, 1, 2, 4, 8, 16, 32)
"""Relearning is measured after these numbers of optimizer steps."""
BITS = (8, 4)
"""Weights are rounded to these numbers of bits."""


def curves(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Questions],
    per_example: PerExample,
    *,
    learning_rate: float = 1e-4,
    max_new_tokens: int = 200,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> dict[str, dict[str, float]]:
    """All curves, by title.

    Args:
        model: the model, which is not modified.
        tokenizer: its tokenizer.
        sets: the question sets by name; the holdout set is left out.
        per_example: what `tofu.measure` returned for the model.
        learning_rate: learning rate of relearning.
        max_new_tokens: maximum length of generated answers, in tokens.
        batch_size: maximum number of sequences in a batch of the measurements.
        definitions: which definitions of the metrics.
        data: the system prompt and the values for the chat template.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "definitions": definitions, "data": data}
    relearned = relearning(model, tokenizer, sets["forget"], learning_rate=learning_rate, **how)
    found = {"forget_Q_A_Prob by relearning steps": relearned}
    if "retain" in sets:
        relearned = relearning(model, tokenizer, sets["forget"], on=sets["retain"], learning_rate=learning_rate, **how)
        found["forget_Q_A_Prob by relearning steps on the retain set"] = relearned
    without_holdout = {name: questions for name, questions in sets.items() if name != "holdout"}
    rounded = quantized(model, tokenizer, without_holdout, max_new_tokens=max_new_tokens, **how)
    full_precision = summarize(per_example, definitions=definitions)
    for metric in ("forget_Q_A_Prob", "model_utility"):
        if metric in full_precision:
            points = {bits: values[metric] for bits, values in rounded.items()}
            found[f"{metric} by bits"] = {"float32": full_precision[metric], **points}
    return found


def relearning(
    model: Any,
    tokenizer: Any,
    forget: Questions,
    *,
    on: Questions | None = None,
    shown: int = 4,
    steps: Sequence[int] = RELEARN_STEPS,
    learning_rate: float = 1e-4,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> dict[str, float]:
    """Fine-tunes on a few examples, and measures the mean probability of the forget answers that are not among them.

    Args:
        model: the model, which is not modified.
        tokenizer: its tokenizer.
        forget: the forget set.
        on: the set to train on (default: the forget set).
        shown: number of examples to train on, the first ones of that set; every step uses all of them as its batch.
        steps: numbers of steps after which to measure.
        learning_rate: learning rate of AdamW, which trains all weights.
        batch_size: maximum number of sequences in a batch of the measurement.
        definitions: which definitions of the metrics.
        data: the system prompt and the values for the chat template.

    Returns:
        Number of steps → mean probability.

    Raises:
        DataError: the forget set has no examples beyond those that are trained on.
    """
    if on is None and len(forget) <= shown:
        raise DataError(f"--robustness: relearning needs more than {shown} forget questions, found {len(forget)}")
    student = copy.deepcopy(model)
    measured, mask_pad = forget.encoded(tokenizer, definitions, data).answers, definitions.mask_pad
    if on is None:
        examples, measured = measured[:shown], measured[shown:]
    else:
        examples = on.encoded(tokenizer, definitions, data).answers[:shown]
    batch = batch_of(examples, tokenizer, mask_pad)
    batch = {key: tensor.to(student.device) for key, tensor in batch.items()}
    optimizer = torch.optim.AdamW(student.requires_grad_(True).parameters(), lr=learning_rate, weight_decay=0.0)
    curve = {}
    for step in range(max(steps) + 1):
        if step in steps:
            answers = probe(student, tokenizer, measured, batch_size, mask_pad)
            curve[str(step)] = float(np.mean([answer.probability for answer in answers]))
        student.train()
        output = forward(student, batch)
        optimizer.zero_grad()
        tokens = (output["targets"] != IGNORED).sum()
        torch.autograd.backward(token_nll(output["logits"], output["targets"]).sum() / tokens)
        optimizer.step()
    return curve


def quantized(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Questions],
    *,
    max_new_tokens: int = 200,
    bits: Sequence[int] = BITS,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
    data: Data | None = None,
) -> dict[str, dict[str, float]]:
    """The benchmark's metrics, by the number of bits that weights are rounded to. The model is not modified."""
    curve = {}
    for width in bits:
        rounded = copy.deepcopy(model)
        round_weights(rounded, width)
        per_example = measure(
            rounded,
            tokenizer,
            sets,
            max_new_tokens=max_new_tokens,
            membership=False,
            batch_size=batch_size,
            definitions=definitions,
            data=data,
        )
        curve[str(width)] = summarize(per_example, definitions=definitions)
    return curve


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Rounds every matrix in place to the nearest of 2^bits - 1 levels, symmetric about zero and scaled per row."""
    top = 2 ** (bits - 1) - 1
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            scale = parameter.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / top
            parameter.copy_((parameter / scale).round() * scale)
