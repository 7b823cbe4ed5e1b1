"""Hidden spaces: the vector spaces inside a network whose basis can change without changing the network's function.

For example, if the hidden channels of an FFN are permuted in the rows of `up_proj` and in the columns of `down_proj`,
the network still computes the same function. The residual stream, queries and keys, values, and experts have such
freedom, too: permutations, sign flips or rotations. In MPU (Multiple Perturbed Copies Unlearning, arXiv 2602.23798) the
server sends the client several noisy copies of its model, and applies secret maps of this kind to each of them. That is
called the copy's reparameterization.

Every axis of every weight belongs to one such space, or to none. A model family is therefore a table from tensor names
to the roles of their axes, and everything else (reparameterizing a weight, inverting that for an update, checking
shapes, attacking) is one generic function over the table. The permutation specifications of Git Re-Basin (arXiv
2209.04836) do the same for permutations alone.

An *axis role* says what an axis is, and with that, which maps it allows:

========== ======================================================= =====================================================
axis role  axis                                                    maps that preserve the function
========== ======================================================= =====================================================
vocabulary rows of the embedding and the LM head                   none
residual   columns of the embedding, q/k/v/gate/up and the LM      one permutation for the whole model; with RMSNorm
           head; rows and biases of o and down                     also signs
norm       a norm weight on the residual stream (a diagonal)       follows the permutation, ignores the signs
gate       FFN hidden axis with a nonlinearity: rows of gate, or   one permutation per layer (and expert)
           the hidden axis of an FFN without a gate
ffn        FFN hidden axis that is linear on both sides: rows of   the same permutation, and signs
           up next to a gate, columns of down
query      rows and biases of q: heads x head_dim                  one map per KV group that commutes with RoPE; groups
                                                                   permuted, and heads permuted within their group
key        rows and biases of k: groups x head_dim                 the same map; groups permuted as for query
value      rows and biases of v: groups x head_dim                 any orthogonal matrix per KV group; groups as above
attended   columns of o: heads x head_dim                          the matrix of the head's group; heads as for query
qkv        rows and biases of q, k and v interleaved by head:      as for query, key and value
           heads x 3 x head_dim (GPT-NeoX)
query norm one norm weight over all query heads                    follows the permutation, ignores the map within heads
key norm   one norm weight over all key heads                      as for query norm
head norm  a norm weight for one head, shared by all heads         none
experts    rows of a router, and the expert index in a name        one permutation per layer
========== ======================================================= =====================================================

An axis of a fused weight is a concatenation of roles, joined by `+`. The map that commutes with RoPE rotates each plane
(i, i + r/2) of a head's r rotary dimensions, which is how Hugging Face checkpoints pair them, and applies any
orthogonal matrix to the other dimensions. If queries and keys are normalized, only sign flips of whole planes remain.

Not covered: scalings, such as c · up_proj with down_proj / c. They also preserve the function, but a gradient step does
not commute with them, as it does with orthogonal maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = tuple[str, ...]
"""The roles along one axis of a weight, in order; more than one if the weight is fused."""


@dataclass(frozen=True)
class Family:
    """The table of one model family.

    Raises:
        ValueError: the table uses a role that does not exist.
    """

    tensors: Mapping[str, str]
    """Template of a tensor's name on disk → the roles of its axes, separated by commas. `{layer}` and `{expert}` are
    placeholders for numbers."""
    embedding: str = "model.embed_tokens.weight"
    """Name of the embedding."""
    head: str = "lm_head.weight"
    """Name of the LM head, which equals the embedding if the config ties them."""
    signs: bool = True
    """Whether sign flips of the residual stream preserve the function. They do with RMSNorm, but not with LayerNorm,
    which subtracts the mean."""
    query_key: Literal["rotations", "signs"] = "rotations"
    """The maps of queries and keys within a head: rotations that commute with RoPE, or only signs if queries and keys
    are normalized."""
    partial_rotary: float | None = None
    """Default for the fraction of each head that RoPE rotates; None if it always rotates the whole head."""
    parallel: bool | str = False
    """Whether attention and FFN of a layer read the same residual stream, instead of one after the other; or the name
    of the config entry that decides it."""
    constants: tuple[str, ...] = ()
    """Templates of tensors that some checkpoints contain although the config determines them, such as RoPE frequencies.
    They are neither published nor updated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the family's config class for entries that config.json may lack."""

    def __post_init__(self) -> None:
        roles = {role for text in self.tensors.values() for axis in parse_axes(text) for role in axis}
        if unknown := sorted(roles - set(_AXIS_ROLES)):
            raise ValueError(f"unknown roles {unknown}; expected roles from {', '.join(_AXIS_ROLES)}")


_AXIS_ROLES = (
    "vocabulary", "residual", "norm", "gate", "ffn", "query", "key", "value", "attended", "qkv",
    "query norm", "key norm", "head norm", "experts",
)  # fmt: skip


def parse_axes(text: str) -> tuple[Axis, ...]:
    """Parses an entry of a family's table: "gate + ffn, residual" gives (("gate", "ffn"), ("residual",))."""
    return tuple(tuple(role.strip() for role in axis.split("+")) for axis in text.split(","))
