"""What an update will reveal to the server, judged from the plan before anything is trained.

Two things can be told without training. First, *naming*: an update of an embedding, of the LM head, or of a token-local
weight (see `Architecture.token_local`) names the tokens of the examples. Second, *spelling*: the gradient of a linear weight is
Σ δ xᵀ over the positions of a step, so if there are fewer positions than x has dimensions, its row space contains
exactly the hidden states x of the examples. Layer by layer, the server can test which token comes next (DAGER, Petrov
et al., arXiv 2405.15586), without any candidates. Adam with a small ε rescales every entry on its own, which gives the
update full rank. SGD, TensorAdam, Adafactor and Muon do not, and neither does Adam with an ε above the entries of the
gradient.

An update is the sum of a round's steps. The check is on the longest step: if even that one has too few positions, each
step can be spelled out, although their sum may be harder to take apart. `client audit` measures what is left.

Not covered: membership, which no choice of weights or optimizer hides, and copies that a dishonest server prepared.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from mpunlearn.client.batches import Pick
from mpunlearn.client.weights import naming
from mpunlearn.errors import DisclosureWarning
from mpunlearn.lm.examples import Example
from mpunlearn.protocol.plan import Training

ENTRYWISE = ("adam", "paged_adam", "ademamix", "paged_ademamix", "lion", "paged_lion", "rmsprop", "adagrad")
"""Prefixes of the names of optimizers that rescale every entry of a gradient on its own, or take its sign."""
LARGE_EPSILON = 1e-5
"""From this value on, Adam's ε is not negligible against the entries of a clipped gradient."""


def warn_of_names(model: Any, selected: Iterable[str]) -> None:
    """Issues a `DisclosureWarning` if one of the selected parameters names tokens in its update."""
    if named := sorted(naming(model, selected)):
        warnings.warn(
            f"--train selects {len(named)} weights whose update names the tokens of your examples, such as {named[0]}; "
            "train without them (--train blocks)",
            DisclosureWarning,
            stacklevel=4,
        )


def warn_of_spelling(training: Training, positions: int, width: int) -> None:
    """Issues a `DisclosureWarning` if the server can spell out the examples of an optimizer step from the update.

    Args:
        training: optimizer and ε.
        positions: the number of tokens in the longest optimizer step.
        width: the number of dimensions in which inputs are seen: the hidden size, or the rank of LoRA adapters.
    """
    entrywise = training.optimizer.startswith(ENTRYWISE)
    if positions >= width or (entrywise and training.adam_epsilon < LARGE_EPSILON):
        return
    what = f"--adam-epsilon {training.adam_epsilon:g}" if entrywise else f"--optimizer {training.optimizer}"
    warnings.warn(
        f"{what} keeps the rank of the gradients, and no optimizer step has more than {positions} tokens, fewer than the "
        f"{width} dimensions of their hidden states: the server can spell out your examples from the update; use "
        f"adamw_torch with an --adam-epsilon below {LARGE_EPSILON:g}, or a larger --batch-size",
        DisclosureWarning,
        stacklevel=4,
    )


def longest_step(
    steps: Sequence[Sequence[Pick]],
    forget: Sequence[Example],
    retain: Sequence[Example],
    alternates: Sequence[Sequence[Example]] = (),
) -> int:
    """The number of tokens in the longest optimizer step, over all its examples, without padding.

    Args:
        steps: the optimizer steps of a round.
        forget: the forget set.
        retain: the retain set; empty without a retain term.
        alternates: the alternate answers to each forget example; empty for objectives without them.
    """

    def tokens(pick: Pick) -> int:
        examples = [forget[pick.forget]]
        if pick.retain is not None:
            examples.append(retain[pick.retain])
        if alternates:
            answers = alternates[pick.forget]
            examples.append(answers[pick.alternate % len(answers)])
        return sum(len(example.input_ids) for example in examples)

    return max(sum(map(tokens, step)) for step in steps)
