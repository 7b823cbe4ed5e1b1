"""Hidden spaces: the vector spaces inside a network whose basis can change without changing the network's function.

Permute the hidden channels of an FFN, in the rows of `up_proj` and in the columns of `down_proj` alike, and the network
computes the same function. The residual stream, queries and keys, values, and experts admit such maps, too:
permutations, signs or rotations. The server applies secret ones to every published copy and calls that a
reparameterization.

The idea: every axis of every weight belongs to one such space, or to none. So a model family is a table from tensor
names to the roles of their axes, and everything else (reparameterizing a weight, inverting that for an update, checking
shapes, attacking) is one generic function over the table. The permutation specifications of Git Re-Basin
(arXiv 2209.04836) are the same idea for permutations alone.

An *axis role* is one of the words in the table below, with the maps under which the function stays the same:

========== ======================================================= =====================================================
axis role  axis                                                    maps
========== ======================================================= =====================================================
vocabulary rows of the embedding and of the LM head                none
residual   columns of the embedding, of q/k/v/gate/up and of the   one permutation, model-wide; with RMSNorm also signs
           LM head; rows and biases of o and down
norm       a norm weight on the residual stream: a diagonal        follows the permutation, not the signs
gate       FFN hidden axis with a non-linearity: rows of gate      one permutation per layer (and expert)
ffn        FFN hidden axis that is linear on both sides: rows of   the same permutation, and signs
           up beside a gate, columns of down
query      rows and biases of q: heads x head_dim                  per KV group one map that commutes with RoPE; groups
                                                                   permuted, and heads within their group
key        rows and biases of k: groups x head_dim                 the same map; groups permuted as for query
value      rows and biases of v: groups x head_dim                 per KV group any orthogonal matrix; groups as above
attended   columns of o: heads x head_dim                          the matrix of the head's group; heads as for query
qkv        rows and biases of q, k and v interleaved by head:      as for query, key and value
           heads x 3 x head_dim (GPT-NeoX)
query norm a norm weight on all query heads at once                follows the permutation, not the map within heads
key norm   the same on all key heads                               as for query norm
head norm  a norm weight on one head, shared by all                none
experts    rows of a router, and the expert number in a name       one permutation per layer
========== ======================================================= =====================================================

An axis of a fused weight is a concatenation of roles, written with `+`. The map that commutes with RoPE rotates each
plane (i, i + r/2) of a head's r rotary entries, which is how Hugging Face checkpoints pair them, and is any orthogonal
matrix on the other entries. Where queries and keys are normalized, only signs of whole planes are left of it.

Not covered: scalings, such as c · up_proj with down_proj / c. They preserve the function, but a gradient step does not
commute with them as it does with the orthogonal maps here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = tuple[str, ...]
"""The roles along one axis of a weight, in order; more than one if the weight is fused."""


@dataclass(frozen=True)
class Family:
    """One model family as a table.

    Raises:
        ValueError: the table holds a role that does not exist.
    """

    tensors: Mapping[str, str]
    """Template of a tensor's name on disk → the roles of its axes, separated by commas. `{layer}` and `{expert}` stand
    for numbers."""
    embedding: str = "model.embed_tokens.weight"
    """Name of the embedding."""
    head: str = "lm_head.weight"
    """Name of the LM head, which repeats the embedding if the config ties them."""
    signs: bool = True
    """Whether the residual stream admits signs: yes with RMSNorm, no with LayerNorm, which subtracts the mean."""
    query_key: Literal["rotations", "signs"] = "rotations"
    """The maps of queries and keys within a head: rotations that commute with RoPE, or signs if they are normalized."""
    partial_rotary: float | None = None
    """Share of a head that is rotary if the config does not say; None if it is always the whole head."""
    constants: tuple[str, ...] = ()
    """Templates of tensors that some checkpoints hold although the config determines them, such as RoPE frequencies.
    They are neither published nor updated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the family's code uses for entries that config.json lacks."""

    def __post_init__(self) -> None:
        roles = {role for text in self.tensors.values() for axis in parse_axes(text) for role in axis}
        if unknown := sorted(roles - set(_AXIS_ROLES)):
            raise ValueError(f"unknown roles {unknown}; expected some of {_AXIS_ROLES}")


_AXIS_ROLES = (
    "vocabulary", "residual", "norm", "gate", "ffn", "query", "key", "value", "attended", "qkv",
    "query norm", "key norm", "head norm", "experts",
)  # fmt: skip


def parse_axes(text: str) -> tuple[Axis, ...]:
    """The axes in an entry of a family's table: "gate + ffn, residual" gives (("gate", "ffn"), ("residual",))."""
    return tuple(tuple(role.strip() for role in axis.split("+")) for axis in text.split(","))
