"""What a model forgot, without candidates: samples from the model before unlearning, ranked by what changed.

Sources: Carlini et al., Extracting Training Data from Large Language Models (arXiv 2012.07805), sample from a model and
rank the samples by a membership score. Here the score is *diffing*: how much less likely the model finds its own sample
after unlearning. With *guidance*, samples are drawn from p_θ^(1 + g) / p_θ'^g, which prefers what the unlearned model θ'
no longer says: contrastive decoding between a model before and after unlearning (arXiv 2505.24379), restricted to tokens
that θ finds plausible (Li et al., arXiv 2210.15097).
Threat model: whoever has both models, as the server does. No update and no candidate text is needed.

Not covered: a search for good prompts. Samples begin like given texts, so a model that was trained on answers only gives
answers to those.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mpunlearn.progress import progress

BATCH = 128
PLAUSIBLE = 0.05
"""With guidance, tokens below this share of the most likely token's probability are not drawn."""


@torch.no_grad()
def sample(
    theta: Any, unlearned: Any, prompts: Sequence[list[int]], length: int, guidance: float, seed: int
) -> list[list[int]]:
    """Draws one sample for each prompt, token by token, at temperature 1.

    Args:
        theta: the model before unlearning.
        unlearned: the model after it; not used with a guidance of 0.
        prompts: token ids that the samples begin with, all of the same length.
        length: largest number of tokens to draw.
        guidance: g; 0 samples from θ alone.
        seed: random seed.

    Returns:
        The token ids of each sample with its prompt, up to the first end token.
    """
    random = torch.Generator().manual_seed(seed)
    end = theta.config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    samples: list[list[int]] = []
    for start in progress(range(0, len(prompts), BATCH), "sampling"):
        tokens = torch.tensor(prompts[start : start + BATCH])
        step, caches = tokens, [None, None]
        for _ in range(length):
            outputs = []
            for number, model in enumerate((theta, unlearned) if guidance else (theta,)):
                output = model(input_ids=step.to(model.device), past_key_values=caches[number], use_cache=True)
                caches[number] = output.past_key_values
                outputs.append(output.logits[:, -1].cpu().double().log_softmax(dim=1))
            scores = outputs[0]
            if guidance:
                least = scores.max(dim=1, keepdim=True).values + math.log(PLAUSIBLE)
                guided = (1 + guidance) * scores - guidance * outputs[1]
                scores = guided.masked_fill(scores < least, -torch.inf)
            step = torch.multinomial(scores.softmax(dim=1), 1, generator=random)
            tokens = torch.cat([tokens, step], dim=1)
        samples += [_until(row, ends, len(prompts[0])) for row in tokens.tolist()]
    return samples


def _until(tokens: list[int], ends: set[Any], prompt: int) -> list[int]:
    """The tokens before the first end token after the prompt."""
    return next((tokens[:at] for at in range(prompt, len(tokens)) if tokens[at] in ends), tokens)
