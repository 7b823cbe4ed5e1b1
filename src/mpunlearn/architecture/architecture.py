"""A family together with the sizes of one config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpunlearn.architecture.families import FAMILIES
from mpunlearn.architecture.spaces import Axis, Family, _axes
from mpunlearn.checkpoint import Checkpoint, TensorInfo, tensor_digest
from mpunlearn.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer: `count` query heads in `groups` groups that share one key and value head."""

    count: int
    groups: int
    dim: int
    """Entries of one head."""
    rotary: int
    """How many of them, from the first on, RoPE rotates."""

    @property
    def per_group(self) -> int:
        return self.count // self.groups


@dataclass(frozen=True)
class TensorRole:
    """Where a tensor stands in the network."""

    template: str
    axes: tuple[Axis, ...]
    layer: int | None
    """Number of the transformer layer, or None outside the layers."""
    expert: int | None
    """Number of the expert whose weight it is, or None."""


class Architecture:
    """A family together with the sizes that one config gives it.

    Args:
        family: the table.
        config: the content of config.json.

    Raises:
        UnsupportedModelError: the config is quantized or lacks a size.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                "the checkpoint is quantized (config.json has a quantization_config): noise and exact maps need the "
                "original weights; use the checkpoint in bfloat16, float16 or float32"
            )
        self.family = family
        self.config = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
        self.layers = self._size("num_hidden_layers")
        self.residual = self._size("hidden_size")
        self.heads = self._heads()
        self.experts = self._size("num_local_experts", "num_experts") if self._mixture else 0
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        heads = self.heads
        self._sizes = {
            "vocabulary": self._size("vocab_size"),
            "residual": self.residual,
            "norm": self.residual,
            "query": heads.count * heads.dim,
            "query norm": heads.count * heads.dim,
            "key": heads.groups * heads.dim,
            "key norm": heads.groups * heads.dim,
            "value": heads.groups * heads.dim,
            "attended": heads.count * heads.dim,
            "qkv": 3 * heads.count * heads.dim,
            "head norm": heads.dim,
            "experts": self.experts,
        }

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Architecture":
        """The architecture of a checkpoint, by its config's model_type.

        Raises:
            UnsupportedModelError: the family has no table, or the config does not describe a model of it.
        """
        model_type = checkpoint.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"{checkpoint.path}: model_type {model_type!r} has no table; known families: {', '.join(sorted(FAMILIES))}. "
                "A new family is a table in architecture/families.py"
            )
        return cls(FAMILIES[model_type], checkpoint.config)

    def _size(self, *keys: str) -> int:
        value = next((self.config[key] for key in keys if key in self.config), None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"config.json: expected a positive integer {keys[0]}, found {value!r}")
        return value

    def _heads(self) -> Heads:
        count = self._size("num_attention_heads")
        grouped = "num_key_value_heads" in self.config and "qkv" not in self.axis_roles
        groups = self._size("num_key_value_heads") if grouped else count
        dim = self._size("head_dim") if "head_dim" in self.config else self.residual // count
        share = 1.0
        if self.family.partial_rotary is not None:
            rope = self.config.get("rope_parameters") or {}
            named = (rope.get("partial_rotary_factor"), *map(self.config.get, ("partial_rotary_factor", "rotary_pct")))
            share = next((float(value) for value in named if value is not None), self.family.partial_rotary)
        heads = Heads(count, groups, dim, int(dim * share))
        if count % groups or heads.rotary % 2 or not 0 < heads.rotary <= dim:
            raise UnsupportedModelError(f"config.json: {heads} is not a shape of attention that the tables describe")
        return heads

    @cached_property
    def _mixture(self) -> bool:
        return any("{expert}" in template for template in self.family.tensors)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str, tuple[Axis, ...]]]:
        return [(_pattern(template), template, _axes(text)) for template, text in self.family.tensors.items()]

    @cached_property
    def axis_roles(self) -> set[str]:
        """Every role that occurs in the family."""
        return {role for _, _, axes in self._patterns for axis in axes for role in axis}

    def role_of(self, name: str) -> TensorRole | None:
        """Where the tensor of that name stands; None if a model of this config has no such tensor."""
        for pattern, template, axes in self._patterns:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                place = TensorRole(template, axes, numbers.get("layer"), numbers.get("expert"))
                return place if self._exists(place) else None
        return None

    def _exists(self, place: TensorRole) -> bool:
        if place.layer is None:
            return True
        if place.layer >= self.layers or (place.expert is not None and place.expert >= self.experts):
            return False
        if not self._mixture:
            return True
        roles = {role for axis in place.axes for role in axis}
        if place.expert is not None or "experts" in roles:
            return self.sparse(place.layer)
        return not self.sparse(place.layer) if roles & {"gate", "ffn"} else True

    def sparse(self, layer: int) -> bool:
        """Whether a layer of a mixture of experts has experts, rather than one FFN (Qwen3-MoE has both kinds)."""
        step = self.config.get("decoder_sparse_step", 1)
        return layer not in self.config.get("mlp_only_layers", ()) and (layer + 1) % step == 0

    def ffn(self, expert: bool) -> int:
        """Size of the FFN's hidden axis, of an expert or of a layer."""
        return self._size("moe_intermediate_size", "intermediate_size") if expert else self._size("intermediate_size")

    def size(self, axis: Axis, expert: bool) -> int:
        """Length of an axis."""
        return sum(self.ffn(expert) if role in ("gate", "ffn") else self._sizes[role] for role in axis)

    def shape(self, place: TensorRole) -> tuple[int, ...]:
        """The shape that config.json implies for a tensor."""
        return tuple(self.size(axis, place.expert is not None) for axis in place.axes)

    def required(self) -> set[str]:
        """Names a complete checkpoint must have: everything but biases and a tied LM head."""
        names: set[str] = set()
        for _, template, axes in self._patterns:
            if template.endswith(".bias") or (template == self.family.head and self.tied):
                continue
            for layer in range(self.layers) if "{layer}" in template else [None]:
                for expert in range(self.experts) if "{expert}" in template else [None]:
                    if self._exists(TensorRole(template, axes, layer, expert)):
                        names.add(template.format(layer=layer, expert=expert))
        return names

    def tensor_roles(self, checkpoint: Checkpoint) -> dict[str, TensorRole]:
        """The place of every parameter of a checkpoint, sorted by name.

        Constants, and an LM head that only repeats a tied embedding, are left out: they are not parameters.

        Raises:
            UnsupportedModelError: a tensor the table does not know, or a shape or dtype other than expected.
            CheckpointError: a tensor is missing, or a tied LM head differs from the embedding.
        """
        constants = [_pattern(template) for template in self.family.constants]
        places: dict[str, TensorRole] = {}
        unknown: list[str] = []
        for name, info in sorted(checkpoint.tensors.items()):
            place = self.role_of(name)
            if place is not None:
                self._check(checkpoint, name, info, self.shape(place))
                places[name] = place
            elif not any(pattern.fullmatch(name) for pattern in constants):
                unknown.append(f"{name} {list(info.shape)}")
        if unknown:
            raise UnsupportedModelError(
                f"{checkpoint.path}: tensors that the table of {self.config.get('model_type')} does not know: "
                f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; nothing is published without its "
                "reparameterization, so add them to the family's table (architecture/families.py) or remove them"
            )
        if missing := sorted(self.required() - places.keys()):
            raise CheckpointError(
                f"{checkpoint.path}: {len(missing)} tensors are missing, the first is {missing[0]}; config.json "
                f"announces {self.layers} layers"
            )
        head, embedding = self.family.head, self.family.embedding
        if self.tied and head in places:
            if tensor_digest(checkpoint.read(head)) != tensor_digest(checkpoint.read(embedding)):
                raise CheckpointError(
                    f"{checkpoint.path}: config.json ties {head} to {embedding}, but the stored tensors differ; set "
                    "tie_word_embeddings to false or remove one"
                )
            del places[head]
        return places

    def _check(self, checkpoint: Checkpoint, name: str, info: TensorInfo, expected: tuple[int, ...]) -> None:
        if info.shape != expected:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} has shape {list(info.shape)}, expected {list(expected)} from config.json"
            )
        if not info.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} has dtype {info.dtype}, expected floating point; a quantized checkpoint is "
                "not supported, use the original in bfloat16, float16 or float32"
            )


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>0|[1-9]\\d*)", re.escape(template)))
