"""Spaces: the vector spaces inside a network whose basis can change without changing its function.

The idea: every axis of every weight lives in one such space or in none, so a family of models is a table from parameter
names to the roles of their axes, and everything else (reparameterizing a weight, inverting an update, checking shapes,
attacking) is one small generic function over that table. Git Re-Basin's permutation specifications (arXiv 2209.04836) are
the same idea for permutations alone.

The roles an axis can have, and the exact maps its space admits:

========== ======================================================= =====================================================
role       axis                                                    maps
========== ======================================================= =====================================================
vocabulary rows of the embedding and of the LM head                none
residual   columns of the embedding, of q/k/v/gate/up and of the   one permutation, model-wide; with RMSNorm also signs
           LM head; rows and biases of o and down
norm       a norm weight on the residual stream: a diagonal        follows the permutation, not the signs
gate       FFN hidden axis around a non-linearity: rows of gate    one permutation per layer (and expert)
ffn        FFN hidden axis that is linear on both sides: rows of   the same permutation, and signs
           up beside a gate, columns of down
query      rows and biases of q: heads x head_dim                  per KV group one map that commutes with RoPE; heads
                                                                   permuted within groups, and groups
key        rows and biases of k: groups x head_dim                 the same map; groups permuted alike
value      rows and biases of v: groups x head_dim                 per KV group any orthogonal matrix; groups alike
attended   columns of o: heads x head_dim                          the value matrix of the head's group; heads alike
qkv        rows and biases of a q, k, v interleaved by head:       as query, key and value
           heads x 3 x head_dim (GPT-NeoX)
query norm a norm weight on all query heads at once                follows the permutation, not the map within heads
key norm   the same on all key heads                               alike
head norm  a norm weight on one head, shared by all                none
experts    rows of a router, and the expert number in a name       one permutation per layer
========== ======================================================= =====================================================

A fused weight's axis is a concatenation of roles, written with `+`. The map that commutes with RoPE rotates the planes
(i, i + r/2) of the r rotary entries, in the half-split pairing of Hugging Face checkpoints, and is any orthogonal matrix on
the others; where queries and keys are normed, only signs of whole planes are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = tuple[str, ...]
"""The roles along one axis of a weight, in order; more than one where the weight is fused."""


@dataclass(frozen=True)
class Family:
    """One model family as a table.

    Raises:
        ValueError: a role in the table is not one that `spaces` knows.
    """

    tensors: Mapping[str, str]
    """Name template on disk → the roles of its axes, separated by commas. `{layer}` and `{expert}` stand for numbers."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    """The LM head, which repeats the embedding where the config ties them."""
    signs: bool = True
    """Whether the residual stream admits signs: with RMSNorm, not with LayerNorm, which subtracts the mean."""
    query_key: Literal["rotations", "signs"] = "rotations"
    """What a norm on queries and keys leaves of the map that commutes with RoPE."""
    partial_rotary: float | None = None
    """Share of a head that is rotary where the config is silent; None: always the whole head."""
    constants: tuple[str, ...] = ()
    """Templates of tensors some checkpoints carry that are functions of the config: neither published nor updated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's code assumes where config.json is silent and the usual rule does not hold."""

    def __post_init__(self) -> None:
        unknown = {role for text in self.tensors.values() for axis in _axes(text) for role in axis} - set(_ROLES)
        if unknown:
            raise ValueError(f"unknown roles {sorted(unknown)}; expected some of {_ROLES}")


_ROLES = (
    "vocabulary", "residual", "norm", "gate", "ffn", "query", "key", "value", "attended", "qkv",
    "query norm", "key norm", "head norm", "experts",
)  # fmt: skip


def _axes(text: str) -> tuple[Axis, ...]:
    return tuple(tuple(role.strip() for role in axis.split("+")) for axis in text.split(","))
