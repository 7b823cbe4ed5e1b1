"""Spaces: the vector spaces inside a network whose basis can change without changing its function.

The idea: every axis of every weight lives in one such space or in none, so a family of models is a table from parameter
names to the roles of their axes, and everything else (reparameterising a weight, inverting an update, checking shapes,
attacking) is one small generic function over that table. Git Re-Basin's permutation specifications (arXiv 2209.04836) are
the same idea for permutations alone.

The roles an axis can have, and the exact maps its space admits:

========== ============================================================ =================================================
role       axis                                                         maps
========== ============================================================ =================================================
vocabulary rows of the embedding and of the LM head                     none
residual   columns of the embedding, of q/k/v/gate/up and of the LM      one permutation and one vector of signs,
           head; rows and biases of o and down                          model-wide
norm       a norm weight on the residual stream: a diagonal             follows the permutation, not the signs
gate       FFN hidden axis before the non-linearity                     one permutation per layer
ffn        FFN hidden axis behind or beside it: rows of up, columns     the same permutation, and signs
           of down
query      rows and biases of q: heads x head_dim                       per KV group one rotation of the RoPE planes;
                                                                        heads permuted within groups, and groups
key        rows and biases of k: groups x head_dim                      the same rotation; groups permuted alike
value      rows and biases of v: groups x head_dim                      per KV group any orthogonal matrix; groups alike
attended   columns of o: heads x head_dim                               the value matrix of the head's group; heads alike
========== ============================================================ =================================================

RoPE is the half-split pairing (planes (i, i + head_dim/2)) that Hugging Face checkpoints use.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint, TensorInfo, tensor_digest
from mpunlearn.errors import CheckpointError, UnsupportedModelError

ROLES = ("vocabulary", "residual", "norm", "gate", "ffn", "query", "key", "value", "attended")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """One model family as a table.

    Raises:
        ValueError: a role in the table is not one of `ROLES`.
    """

    tensors: Mapping[str, str]
    """Name template on disk (`{layer}` stands for the layer's number) → the roles of its axes, separated by blanks."""
    constants: tuple[str, ...] = ()
    """Templates of tensors some checkpoints carry that are functions of the config: neither published nor updated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's code assumes where config.json is silent and the usual rule does not hold."""

    def __post_init__(self) -> None:
        unknown = {role for roles in self.tensors.values() for role in roles.split()} - set(ROLES)
        if unknown:
            raise ValueError(f"unknown roles {sorted(unknown)}; expected some of {ROLES}")


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer: `count` query heads in `groups` groups that share one key and value head."""

    count: int
    groups: int
    dim: int
    """Entries of one head."""

    @property
    def per_group(self) -> int:
        return self.count // self.groups


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the network."""

    roles: tuple[str, ...]
    """One role per axis."""
    layer: int | None
    """Number of the transformer layer, or None outside the layers."""


class Architecture:
    """A family together with the sizes that one config gives it.

    Args:
        family: the table.
        config: the content of config.json.

    Raises:
        UnsupportedModelError: the config is quantised or lacks a size.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                "the checkpoint is quantised (config.json has a quantization_config): noise and exact maps need the "
                "original weights; use the checkpoint in bfloat16, float16 or float32"
            )
        self.family = family
        self.config = {**family.defaults, **config}
        self.layers = self._size("num_hidden_layers")
        self.residual = self._size("hidden_size")
        self.ffn = self._size("intermediate_size")
        count = self._size("num_attention_heads")
        groups = self.config.get("num_key_value_heads") or count
        self.heads = Heads(count, groups, self.config.get("head_dim") or self.residual // count)
        if count % groups:
            raise UnsupportedModelError(f"config.json: {count} attention heads do not divide into {groups} KV groups")
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        self.sizes = {
            "vocabulary": self._size("vocab_size"),
            "residual": self.residual,
            "norm": self.residual,
            "gate": self.ffn,
            "ffn": self.ffn,
            "query": self.heads.count * self.heads.dim,
            "key": self.heads.groups * self.heads.dim,
            "value": self.heads.groups * self.heads.dim,
            "attended": self.heads.count * self.heads.dim,
        }

    def _size(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"config.json: expected a positive integer {key}, found {value!r}")
        return value

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
        return [(_pattern(template), tuple(roles.split())) for template, roles in self.family.tensors.items()]

    def place(self, name: str) -> Place | None:
        """Where the tensor of that name stands; None if the family has no such tensor."""
        for pattern, roles in self._patterns:
            if match := pattern.fullmatch(name):
                layer = int(match["layer"]) if "layer" in pattern.groupindex else None
                return Place(roles, layer) if layer is None or layer < self.layers else None
        return None

    def shape(self, place: Place) -> tuple[int, ...]:
        return tuple(self.sizes[role] for role in place.roles)

    def required(self) -> set[str]:
        """Names a complete checkpoint must have: everything but biases and a tied LM head."""
        names: set[str] = set()
        for template in self.family.tensors:
            if not template.endswith(".bias") and not (template == HEAD and self.tied):
                names.update(template.format(layer=layer) for layer in range(self.layers))
        return names

    def places(self, checkpoint: Checkpoint) -> dict[str, Place]:
        """The place of every parameter of a checkpoint, sorted by name.

        Constants, and an LM head that only repeats a tied embedding, are left out: they are not parameters.

        Raises:
            UnsupportedModelError: a tensor the table does not know, or a shape or dtype other than expected.
            CheckpointError: a tensor is missing, or a tied LM head differs from the embedding.
        """
        constants = [_pattern(template) for template in self.family.constants]
        places: dict[str, Place] = {}
        unknown: list[str] = []
        for name, info in sorted(checkpoint.tensors.items()):
            place = self.place(name)
            if place is not None:
                self._check(checkpoint, name, info, self.shape(place))
                places[name] = place
            elif not any(pattern.fullmatch(name) for pattern in constants):
                unknown.append(f"{name} {list(info.shape)}")
        if unknown:
            raise UnsupportedModelError(
                f"{checkpoint.path}: tensors that the table of {self.config.get('model_type')} does not know: "
                f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; nothing is published without its "
                "reparameterisation, so add them to the family's table (architecture/families.py) or remove them"
            )
        if missing := sorted(self.required() - places.keys()):
            raise CheckpointError(
                f"{checkpoint.path}: {len(missing)} tensors are missing, the first is {missing[0]}; config.json "
                f"announces {self.layers} layers"
            )
        if self.tied and HEAD in places:
            if tensor_digest(checkpoint.read(HEAD)) != tensor_digest(checkpoint.read(EMBEDDING)):
                raise CheckpointError(
                    f"{checkpoint.path}: config.json ties {HEAD} to {EMBEDDING}, but the stored tensors differ; set "
                    "tie_word_embeddings to false or remove one"
                )
            del places[HEAD]
        return places

    def _check(self, checkpoint: Checkpoint, name: str, info: TensorInfo, expected: tuple[int, ...]) -> None:
        if info.shape != expected:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} has shape {list(info.shape)}, expected {list(expected)} from config.json"
            )
        if not info.dtype.is_floating_point:
            raise UnsupportedModelError(f"{checkpoint.path}: {name} has dtype {info.dtype}, expected floating point")


def architecture_of(checkpoint: Checkpoint, families: Mapping[str, Family]) -> Architecture:
    """The architecture of a checkpoint, by its config's model_type.

    Raises:
        UnsupportedModelError: the family has no table, or the config does not describe a model of it.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise UnsupportedModelError(
            f"{checkpoint.path}: model_type {model_type!r} has no table; known families: {', '.join(sorted(families))}. "
            "A new family is a table in architecture/families.py"
        )
    return Architecture(families[model_type], checkpoint.config)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d*)"))


def is_matrix_of_vocabulary(place: Place) -> bool:
    """Whether a tensor is an embedding or an LM head."""
    return "vocabulary" in place.roles


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on weights stored in `dtype`: float32, or float64 for float64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32
