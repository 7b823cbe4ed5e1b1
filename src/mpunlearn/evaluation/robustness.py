"""Does the forgetting last? Curves under relearning and under quantization, to be compared with a retrained model's.

- Relearning: the model is fine-tuned on a few forget examples, and the probability of the *other* forget answers is
  measured along the way. A model that has truly forgotten relearns them no faster than one that never knew them.
- Quantization: every weight matrix is rounded to 8 and to 4 bits, since rounding can undo small updates (Zhang et al.,
  arXiv 2410.16454).

Both work on a copy of the model in memory. Relearning also needs gradients and AdamW's two moments, which makes five
times the model in all. Not covered: relearning on other texts, and quantization methods that use calibration data.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpunlearn.errors import DataError
from mpunlearn.evaluation.probe import probe
from mpunlearn.evaluation.sets import Questions
from mpunlearn.evaluation.tofu import measure, summarize
from mpunlearn.lm.examples import IGNORED, collate
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward, pad_id

RELEARN_STEPS = (0, 1, 2, 4, 8, 16, 32)
"""Numbers of optimizer steps after which relearning is measured."""
BITS = (8, 4)
"""Widths that weights are rounded to."""


def relearning(
    model: Any,
    tokenizer: Any,
    forget: Questions,
    *,
    shown: int = 4,
    steps: Sequence[int] = RELEARN_STEPS,
    learning_rate: float = 1e-4,
) -> dict[str, float]:
    """Mean probability of the forget answers that were not trained on, by the number of steps on those that were.

    Args:
        model: the model; it stays as it is.
        tokenizer: its tokenizer.
        forget: the forget set.
        shown: the first so many examples of the set are trained on; together they are the batch of every step.
        steps: after how many steps to measure.
        learning_rate: of AdamW, on all weights.

    Raises:
        DataError: the set has no examples beyond those that are trained on.
    """
    if len(forget) <= shown:
        raise DataError(f"--robustness: relearning needs more than {shown} forget questions, found {len(forget)}")
    student = copy.deepcopy(model)
    examples = forget.encoded(tokenizer).answers
    batch = collate(examples[:shown], pad_id(tokenizer))
    batch = {key: tensor.to(student.device) for key, tensor in batch.items()}
    optimizer = torch.optim.AdamW(student.requires_grad_(True).parameters(), lr=learning_rate, weight_decay=0.0)
    curve = {}
    for step in range(max(steps) + 1):
        if step in steps:
            answers = probe(student, tokenizer, examples[shown:])
            curve[str(step)] = float(np.mean([answer.probability for answer in answers]))
        student.train()
        output = forward(student, batch)
        optimizer.zero_grad()
        tokens = (output["targets"] != IGNORED).sum()
        torch.autograd.backward(token_nll(output["logits"], output["targets"]).sum() / tokens)
        optimizer.step()
    return curve


def quantized(
    model: Any, tokenizer: Any, sets: Mapping[str, Questions], *, max_new_tokens: int = 200, bits: Sequence[int] = BITS
) -> dict[str, dict[str, float]]:
    """The benchmark's metrics by the number of bits that weights are rounded to. The model stays as it is."""
    curve = {}
    for width in bits:
        rounded = copy.deepcopy(model)
        round_weights(rounded, width)
        per_example = measure(rounded, tokenizer, sets, max_new_tokens=max_new_tokens, membership=False)
        curve[str(width)] = summarize(per_example)
    return curve


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Rounds every matrix in place to the nearest of 2^bits - 1 levels, symmetric about zero and scaled row by row."""
    top = 2 ** (bits - 1) - 1
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            scale = parameter.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / top
            parameter.copy_((parameter / scale).round() * scale)
