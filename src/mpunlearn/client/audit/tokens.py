"""Naming: which tokens of the vocabulary occur in the forget set?

An update of the embedding or of the LM head has a row for every token, and the rows of tokens that were trained on
differ from the mean row. The row space of any other weight's Δ = Σ δ xᵀ holds its inputs x. In the token-local weights,
x is the same wherever a token occurs, so the server can compute it for every token and test whether it lies in the row
space. In the other weights of the first two layers, x also depends on the tokens before, and the state of the token on
its own is a guess. The test is the share of the centered x within the row space, weighted smoothly by ridge regression,
because Adam's updates have full rank.

Tokens that only the forget set has are told from tokens that only known text of the same kind has. Both are equally rare,
so an update that says nothing leads to an AUC of 0.5. Without known text, they are told from the rest of the
vocabulary; the AUC is then too large, because tokens that are rare in any text look different without any update.

Not covered: the norm weights and biases, whose updates are sums over all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpunlearn.client.audit.subject import Subject, last_states
from mpunlearn.lm.examples import Example

RIDGE = 0.01
"""Relative to the mean eigenvalue of ΔᵀΔ."""
LAYERS = 2
"""The weights of the first layers are tested."""
MAX_OTHERS = 4096
"""At most this many other tokens are drawn from the vocabulary, if there is no known text."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens to tell apart."""

    used: list[int]
    """Tokens that only the forget set has."""
    others: list[int]
    """Tokens that were not trained on."""


def vocabulary(
    size: int, forget: Sequence[Example], trained: Sequence[Example], known: Sequence[Example]
) -> Vocabulary:
    """Tokens that only the forget set has, and others to compare them with.

    Args:
        size: size of the model's vocabulary.
        forget: the forget set.
        trained: all other texts that the client trained on.
        known: texts that it did not train on; empty: others are drawn from the whole vocabulary.
    """
    forgotten, also, of_known = _tokens(forget), _tokens(trained), _tokens(known)
    candidates = sorted((of_known or set(range(size))) - forgotten - also)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).tolist()
    return Vocabulary(sorted(forgotten - also - of_known), [candidates[index] for index in order[:MAX_OTHERS]])


def token_scores(subject: Subject, tokens: Vocabulary) -> dict[str, tuple[list[float], list[float]]]:
    """Scores of the tokens by each part of the update that may name them, larger for tokens that were trained on.

    Returns:
        Part of the update → the scores of the used tokens, and of the others, standardized over both. Empty if there is
        nothing to tell apart.
    """
    if not tokens.used or not tokens.others:
        return {}
    both = [*tokens.used, *tokens.others]
    scores: dict[str, torch.Tensor] = {}
    family = subject.architecture.family
    for label, name in (("embedding", family.embedding), ("LM head", family.head)):
        if name in subject.names:
            rows = subject.delta(name).double()
            scores[label] = (rows[both] - rows.mean(dim=0)).norm(dim=1)
    groups = [group for group in subject.groups if group.layer < LAYERS]
    if groups:
        states = last_states(subject, [[token] for token in both], [group.module for group in groups])
        for group in groups:
            label = group.label + (" (token-local)" if group.token_local else "")
            spectrum = subject.spectrum(group)
            weights = spectrum.values / (spectrum.values + RIDGE * spectrum.values.mean()).clamp(min=1e-300)
            centered = states[group.module] - states[group.module].mean(dim=0)
            within = (centered @ spectrum.vectors.T).square() @ weights
            scores[label] = within / centered.square().sum(dim=1).clamp(min=1e-300)
    count = len(tokens.used)
    result = {}
    for label, values in scores.items():
        standard = (values - values.mean()) / values.std().clamp(min=1e-300)
        result[label] = (standard[:count].tolist(), standard[count:].tolist())
    return result


def _tokens(texts: Sequence[Example]) -> set[int]:
    return {token for text in texts for token in text.input_ids}
