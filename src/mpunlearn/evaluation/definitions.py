"""How metrics are defined where OpenUnlearning (arXiv 2506.12618) and what we consider better differ.

`openunlearning`, the default, gives the numbers that OpenUnlearning's own evaluation gives, so that they can be compared
with published ones. `strict` is what the papers of the metrics describe, without its conventions. Each field of
`Definitions` is one difference; docs/definitions.md says which metrics it changes. Not covered: differences that depend
on a model's configuration there, such as the system prompt, which are options of their own.
"""

from dataclasses import dataclass
from typing import Literal

Name = Literal["openunlearning", "strict"]
"""The names of `DEFINITIONS`."""


@dataclass(frozen=True)
class Definitions:
    """One choice for each difference."""

    epsilon: float
    """Added to the denominators of normalized probabilities, truth ratios and PrivLeak. If it is 0, PrivLeak is NaN
    where the retrained model's AUC is 1."""
    drop_last: bool
    """Whether the memorization metrics, min-k, min-k++ and gradnorm leave out the last token with loss, which usually is
    the end token. Otherwise only the memorization metrics do, and only if it is the end token."""
    unmatched_strength: bool
    """Whether extraction strength is 1/n, and not 0, if the last of n tokens is not ranked first."""
    prompt_alone: bool
    """Whether the prompt is tokenized by itself. Then the first tokens carry no loss, as many as the prompt alone has,
    even if one of them also holds the beginning of the answer; answers are generated after the prompt's own tokens; an
    end token is added to whatever does not end in one; and the text of zlib is decoded from the tokens with loss.
    Otherwise the tokens of the answer are those that the answer's characters belong to."""
    answer_mark: str
    """What a prompt without a chat template ends in, also that of MUSE's knowledge memorization."""
    mask_pad: bool
    """Whether attention is masked wherever the padding token stands, also within a text. Without a padding token that is
    the end token, which a chat template may write after every message."""


OPENUNLEARNING = Definitions(
    epsilon=1e-10, drop_last=True, unmatched_strength=True, prompt_alone=True, answer_mark="Answer: ", mask_pad=True
)
STRICT = Definitions(
    epsilon=0.0, drop_last=False, unmatched_strength=False, prompt_alone=False, answer_mark="Answer:", mask_pad=False
)
DEFINITIONS: dict[Name, Definitions] = {"openunlearning": OPENUNLEARNING, "strict": STRICT}
