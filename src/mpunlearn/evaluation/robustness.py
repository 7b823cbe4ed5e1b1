"""Does the forgetting last? Curves under relearning and under quantization, to be read against a retrained model's.

*Relearning*: the model is fine-tuned on a few forget examples, and what it says of the *other* forget examples is measured on
the way. A model that has forgotten regains no more than one that never knew. *Quantisation*: every weight matrix is rounded
to 8 and 4 bits, since rounding can undo small updates (Zhang et al., arXiv 2410.16454).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpunlearn.client.objectives import nll
from mpunlearn.evaluation.probe import probe
from mpunlearn.evaluation.sets import Questions
from mpunlearn.evaluation.tofu import measure, summarize
from mpunlearn.lm.examples import IGNORED, collate
from mpunlearn.lm.model import forward, pad_id

RELEARN_STEPS = (0, 1, 2, 4, 8, 16, 32)
BITS = (8, 4)


def relearning(
    model: Any,
    tokenizer: Any,
    forget: Questions,
    *,
    shown: int = 4,
    steps: Sequence[int] = RELEARN_STEPS,
    learning_rate: float = 1e-4,
) -> dict[str, float]:
    """Mean probability of the forget answers that were not shown, after each number of steps on those that were.

    Args:
        shown: how many examples, the first of the set, make up every step's batch.
        learning_rate: of AdamW, on all weights. The model is left as it was.
    """
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
        given = forward(student, batch)
        optimizer.zero_grad()
        counted = (given["targets"] != IGNORED).sum()
        torch.autograd.backward(nll(given["logits"], given["targets"]).sum() / counted)
        optimizer.step()
    return curve


def quantized(
    model: Any, tokenizer: Any, sets: Mapping[str, Questions], *, max_new_tokens: int = 200, bits: Sequence[int] = BITS
) -> dict[str, dict[str, float]]:
    """The benchmark's metrics with weights rounded to so many bits. The model is left as it was."""
    curve = {}
    for width in bits:
        rounded = copy.deepcopy(model)
        round_weights(rounded, width)
        found = measure(rounded, tokenizer, sets, max_new_tokens=max_new_tokens, membership=False)
        curve[str(width)] = summarize(found)
    return curve


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Rounds every matrix to the nearest of 2^bits - 1 levels, symmetric about zero, scaled row by row; in place."""
    top = 2 ** (bits - 1) - 1
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            scale = parameter.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / top
            parameter.copy_((parameter / scale).round() * scale)
