"""Repairs a noisy copy by training it on text.

Source: fine-tuning restores the function of pruned or noisy weights in few steps, which is also why unlearned knowledge
comes back under relearning.
Threat model: a client holds one copy, or an estimate of θ from several, and text of its own or from the public. It wants
a working model, not the parameters.

Not covered: distillation from the server's model, to which the client has no access.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import progress

BATCH = 8
SEED = 0


def repair(model: Any, tokenizer: Any, text: Sequence[Example], epochs: int, learning_rate: float) -> None:
    """Trains a copy in place with AdamW, clipping gradients at 1.

    Args:
        model: a copy as a loaded transformers model.
        tokenizer: its tokenizer.
        text: tokenized examples.
        epochs: passes over them.
        learning_rate: learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(len(text), generator=random).tolist() for _ in range(epochs)]
    steps = [order[start : start + BATCH] for order in orders for start in range(0, len(text), BATCH)]
    model.train()
    for step in progress(steps, "repairing a copy"):
        batch = collate([text[index] for index in step], pad_id(tokenizer))
        output = forward(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        loss = token_nll(output["logits"], output["targets"]).sum() / (output["targets"] != IGNORED).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
