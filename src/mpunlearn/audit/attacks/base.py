"""Aligns a copy to the public model that θ was fine-tuned from.

Source: MPU's task vector presumes a public base (arXiv 2602.23798), and obfuscated weights keep the directions of the
public ones, which ArrowMatch matches (Wang et al., USENIX Security 2025). Alignment matches directions, too, and finds
rotations besides.
Threat model: a client holds one copy, or an estimate of θ from several, and the public base.

Not covered: scaled weights, which MPU does not publish.
"""

from mpunlearn.audit.alignment import align
from mpunlearn.audit.weights import Model


def base(estimate: Model, public: Model) -> Model:
    """The estimate in the coordinates of the public model, which are those of θ.

    Args:
        estimate: a published copy, or a combination of copies.
        public: the model that θ was fine-tuned from.
    """
    return align(public, estimate).aligned(estimate)
