"""Spelling: can the server read the texts off an update, token by token, without any candidates?

The row space of Δ = Σ δ xᵀ holds the hidden states x of all positions. If it has fewer dimensions than x, it holds
hardly anything else. A server that has the beginning of a text can then try every token of the vocabulary as the next
one, and the right one is the one whose hidden state lies in the row space (DAGER, Petrov et al., arXiv 2405.15586). Two
figures per layer:

- *exact*: the share of positions whose state lies in the row space, if that has a rank below the number of dimensions,
  minus the share of states with a wrong last token that do. A state counts as inside if its distance is a tenth of what
  a random vector's would be.
- *next token*: the share of positions that are closer to the row space than 99 % of states of the same beginnings with
  a wrong next token. Here the row space is cut to half the dimensions, so it also works where Adam's rescaling gives Δ
  full rank: not letter by letter, but as evidence for a search. Chance is 1 %, and words that every text of a kind
  contains raise it, so it is also measured for known text that was not trained on, as a control.

Only the first layers are tested: the states of later layers are of use only once the earlier ones are known.

Not covered: the search itself, and inputs that a dishonest server prepared to be read.
"""

from collections.abc import Sequence

import torch

from mpunlearn import roc
from mpunlearn.client.audit.report import LayerSpelling
from mpunlearn.client.audit.subject import Group, Spectrum, Subject, last_states
from mpunlearn.lm.examples import Example

LAYERS = 4
"""The first layers are tested."""
POSITIONS = 128
"""At most this many positions are tested."""
WRONG = 4
"""Wrong next tokens per position."""
INSIDE = 0.1
"""Relative to the distance of a random vector."""


def spelling(subject: Subject, forget: Sequence[Example], known: Sequence[Example]) -> list[LayerSpelling]:
    """Measures spelling for each group of weights in the first layers.

    Args:
        subject: the copy and its update.
        forget: the forget set.
        known: texts that the client did not train on, for the control; may be empty.
    """
    groups = [group for group in subject.groups if group.layer < LAYERS and group.label.split(", ")[1] != "FFN output"]
    if not groups:
        return []
    pool = sorted({token for text in [*forget, *known] for token in text.input_ids})
    right, wrong = _prefixes(forget, pool)
    sequences = [right, wrong, *(_prefixes(known, pool) if known else ())]
    states = [last_states(subject, part, [group.module for group in groups]) for part in sequences]
    return [_of_group(group, subject.spectrum(group), [part[group.module] for part in states]) for group in groups]


def _of_group(group: Group, spectrum: Spectrum, states: list[torch.Tensor]) -> LayerSpelling:
    dimensions, rank = len(spectrum.vectors), spectrum.rank
    exact = 0.0
    if 0 < rank < dimensions:
        limit = INSIDE * (1 - rank / dimensions) ** 0.5
        inside = [float((_distance(part, spectrum.vectors[:rank]) < limit).double().mean()) for part in states[:2]]
        exact = max(0.0, inside[0] - inside[1])
    basis = spectrum.vectors[: min(rank, dimensions // 2)]
    right, wrong, *known = ((-_distance(part, basis)).numpy() for part in states)
    control = roc.true_positive_rate(known[0], known[1]) if known else None
    return LayerSpelling(group.label, rank, dimensions, exact, roc.true_positive_rate(right, wrong), control)


def _distance(states: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The distance of each state from the span of an orthonormal basis, relative to its norm, shape (N,)."""
    outside = states - (states @ basis.T) @ basis
    distance: torch.Tensor = outside.norm(dim=1) / states.norm(dim=1).clamp(min=1e-300)
    return distance


def _prefixes(texts: Sequence[Example], pool: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Beginnings of texts at random positions, and `WRONG` variants of each whose last token is random."""
    generator = torch.Generator().manual_seed(0)
    ends = [(text, end) for text in texts for end in range(2, len(text.input_ids) + 1)]
    chosen = torch.randperm(len(ends), generator=generator)[:POSITIONS].sort().values.tolist()
    right = [ends[index][0].input_ids[: ends[index][1]] for index in chosen]
    drawn = torch.randint(len(pool), (len(right), WRONG), generator=generator).tolist()
    wrong = [
        [*sequence[:-1], pool[number]]
        for sequence, row in zip(right, drawn, strict=True)
        for number in row
        if pool[number] != sequence[-1]
    ]
    return right, wrong
