"""The architecture of one model: which tensors it has, their shapes, and the role of every axis.

The table of a model family (`spaces`, `families`) lists tensors and the roles of their axes, and config.json gives the
sizes. An `Architecture` combines the two. It also checks that a checkpoint has exactly the expected tensors: one
without a known role cannot be reparameterized, so it must not be published.

Not covered: quantized checkpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpunlearn.architecture.families import FAMILIES
from mpunlearn.architecture.spaces import Axis, Family, parse_axes
from mpunlearn.checkpoint import Checkpoint, TensorInfo, tensor_digest
from mpunlearn.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Heads:
    """Number and sizes of the heads in an attention layer."""

    count: int
    """Number of query heads."""
    groups: int
    """Number of key-value heads, each shared by one group of query heads."""
    dim: int
    """Dimensions of one head."""
    rotary: int
    """How many of these dimensions RoPE rotates; they come first."""

    @property
    def per_group(self) -> int:
        """Query heads per key-value head."""
        return self.count // self.groups


@dataclass(frozen=True)
class TensorRole:
    """Where a tensor is in the network, and what its axes mean."""

    template: str
    """Its name in the family's table, with the placeholders `{layer}` and `{expert}`."""
    axes: tuple[Axis, ...]
    """The roles of its axes, explained in `spaces`."""
    layer: int | None
    """Index of the transformer layer, or None for a tensor outside the layers."""
    expert: int | None
    """Index of the expert that the tensor belongs to, or None."""


class Architecture:
    """A model family with the sizes from one config. Use `Architecture.of` to build one from a checkpoint.

    Args:
        family: the family's table.
        config: the content of config.json.

    Raises:
        UnsupportedModelError: the checkpoint is quantized, or a size in the config is missing or impossible.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                "config.json has a quantization_config, but only unquantized weights can be perturbed and "
                "reparameterized; use the original checkpoint in bfloat16, float16 or float32"
            )
        self.family = family
        """The family's table."""
        self.config = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
        """The content of config.json, with the family's defaults for missing entries."""
        self.layers = self._size("num_hidden_layers")
        """Number of transformer layers."""
        self.residual = self._size("hidden_size")
        """Width of the residual stream."""
        self.heads = self._heads()
        """Number and sizes of its attention heads."""
        self.experts = self._size("num_local_experts", "num_experts") if self._mixture else 0
        """Number of experts per MoE layer; 0 if the family has none."""
        self._dense_layers, self._sparse_step = self._which_layers_are_sparse()
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        """Whether the LM head shares the embedding's weights."""
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
        """The architecture of a checkpoint, whose family is the `model_type` in its config.

        Raises:
            UnsupportedModelError: the family is unknown, or the config does not describe a valid model of it.
        """
        model_type = checkpoint.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"{checkpoint.path}: model_type {model_type!r:.60} is not supported; known families: "
                f"{', '.join(sorted(FAMILIES))}; to add one, write its table in architecture/families.py"
            )
        try:
            architecture = cls(FAMILIES[model_type], checkpoint.config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{checkpoint.path}: {error}") from None
        tensors = len(checkpoint.tensors)  # every layer and every expert has tensors of its own
        if architecture.layers > tensors or architecture.experts * architecture.sparse_layers > tensors:
            raise UnsupportedModelError(
                f"{checkpoint.path}: config.json describes {architecture.layers} layers"
                f"{f' with {architecture.experts} experts' if architecture.experts else ''}, more than the {tensors} "
                "tensors of the checkpoint; copy the checkpoint again"
            )
        return architecture

    def _size(self, *keys: str) -> int:
        """The first of these entries that the config has, which must be a positive integer."""
        value = next((self.config[key] for key in keys if key in self.config), None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"config.json: {keys[0]}: expected a positive integer, found {value!r:.60}")
        return value

    def _heads(self) -> Heads:
        count = self._size("num_attention_heads")
        grouped = "num_key_value_heads" in self.config and "qkv" not in self.axis_roles
        groups = self._size("num_key_value_heads") if grouped else count
        dim = self._size("head_dim") if "head_dim" in self.config else self.residual // count
        share = 1.0
        if self.family.partial_rotary is not None:
            share = self._rotary_share(self.family.partial_rotary)
        heads = Heads(count, groups, dim, int(dim * share))
        if count % groups or heads.rotary % 2 or not 0 < heads.rotary <= dim:
            raise UnsupportedModelError(
                "config.json: expected num_attention_heads to be a multiple of num_key_value_heads, and an even number "
                f"of rotary dimensions up to head_dim, found {count} heads, {groups} key-value heads and "
                f"{heads.rotary} rotary dimensions of {dim}"
            )
        return heads

    def _rotary_share(self, default: float) -> float:
        """The fraction of a head that RoPE rotates, for families where it is not always the whole head."""
        rope = self.config.get("rope_parameters")
        sources = [rope if isinstance(rope, Mapping) else {}, self.config]
        candidates = (source.get(key) for source in sources for key in ("partial_rotary_factor", "rotary_pct"))
        share = next((value for value in candidates if value is not None), default)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise UnsupportedModelError(
                f"config.json: partial_rotary_factor: expected a number above 0 and at most 1, found {share!r:.60}"
            )
        return float(share)

    def _which_layers_are_sparse(self) -> tuple[frozenset[int], int]:
        """The layers that must not have experts, and the spacing of the layers that have them."""
        dense, step = self.config.get("mlp_only_layers", []), self.config.get("decoder_sparse_step", 1)
        if not isinstance(dense, list | tuple) or not isinstance(step, int) or step < 1:
            raise UnsupportedModelError(
                "config.json: expected mlp_only_layers to be a list of layers and decoder_sparse_step to be a positive "
                f"integer, found {dense!r:.60} and {step!r:.60}"
            )
        return frozenset(layer for layer in dense if isinstance(layer, int)), step

    @cached_property
    def _mixture(self) -> bool:
        """Whether the family has experts."""
        return any("{expert}" in template for template in self.family.tensors)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str, tuple[Axis, ...]]]:
        """For each entry of the table: a pattern for its names, its template, and the roles of its axes."""
        return [(_pattern(template), template, parse_axes(text)) for template, text in self.family.tensors.items()]

    @cached_property
    def axis_roles(self) -> set[str]:
        """Every axis role that occurs in the family's table."""
        return {axis_role for _, _, axes in self._patterns for axis in axes for axis_role in axis}

    def role_of(self, name: str) -> TensorRole | None:
        """The role of the tensor with this name, or None if a model with this config has no such tensor."""
        for pattern, template, axes in self._patterns:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                role = TensorRole(template, axes, numbers.get("layer"), numbers.get("expert"))
                return role if self._exists(role) else None
        return None

    def _exists(self, role: TensorRole) -> bool:
        """Whether a model with this config has a tensor with this role."""
        if role.layer is None:
            return True
        if role.layer >= self.layers or (role.expert is not None and role.expert >= self.experts):
            return False
        if not self._mixture:
            return True
        axis_roles = {axis_role for axis in role.axes for axis_role in axis}
        if role.expert is not None or "experts" in axis_roles:
            return self.sparse(role.layer)
        return not self.sparse(role.layer) if axis_roles & {"gate", "ffn"} else True

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN of a layer read the same residual stream."""
        parallel = self.family.parallel
        return bool(self.config.get(parallel)) if isinstance(parallel, str) else parallel

    def token_local(self, role: TensorRole) -> bool:
        """Whether the weight's input at a position is a function of that position's token alone.

        These are layer 0's query, key and value projections, fused or not, which read the bare embedding. If attention
        and FFN are parallel, all of layer 0's FFN is token-local, too. The gradient of such a weight is Σ δ xᵀ over the
        positions, and x is one of only as many vectors as there are tokens, so its row space names the tokens. A bias
        is not token-local: its gradient Σ δ contains no x.
        """
        if role.layer != 0 or len(role.axes) != 2:
            return False
        outputs, inputs = map(set, role.axes)
        return bool({"query", "key", "value", "qkv"} & outputs) or (self.parallel and "attended" not in inputs)

    def sparse(self, layer: int) -> bool:
        """Whether a layer of an MoE model has experts rather than a single FFN. Qwen3-MoE can have both kinds."""
        return layer not in self._dense_layers and (layer + 1) % self._sparse_step == 0

    @property
    def sparse_layers(self) -> int:
        """The number of layers with experts."""
        return sum(map(self.sparse, range(self.layers))) if self.experts else 0

    def ffn(self, expert: bool) -> int:
        """Size of the FFN hidden axis, of one expert or of a layer without experts."""
        return self._size("moe_intermediate_size", "intermediate_size") if expert else self._size("intermediate_size")

    def size(self, axis: Axis, expert: bool) -> int:
        """Length of an axis.

        Args:
            axis: the axis's roles.
            expert: whether the weight belongs to an expert.
        """
        return sum(self.ffn(expert) if axis_role in ("gate", "ffn") else self._sizes[axis_role] for axis_role in axis)

    def shape(self, role: TensorRole) -> tuple[int, ...]:
        """The shape that the config implies for a tensor with this role."""
        return tuple(self.size(axis, role.expert is not None) for axis in role.axes)

    def required(self) -> set[str]:
        """The names of all tensors that a complete checkpoint must have. Biases and a tied LM head are optional."""
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
        """The role of every parameter of a checkpoint, sorted by name.

        Constants and a tied LM head are left out, since they are not parameters of their own.

        Raises:
            UnsupportedModelError: the table does not list a tensor, or a shape or dtype is not the expected one.
            CheckpointError: a tensor is missing, or a tied LM head differs from the embedding.
        """
        constants = [_pattern(template) for template in self.family.constants]
        roles: dict[str, TensorRole] = {}
        unknown: list[str] = []
        for name, info in sorted(checkpoint.tensors.items()):
            role = self.role_of(name)
            if role is not None:
                self._check(checkpoint, name, info, self.shape(role))
                roles[name] = role
            elif not any(pattern.fullmatch(name) for pattern in constants):
                unknown.append(f"{name} {list(info.shape)}")
        if unknown:
            raise UnsupportedModelError(
                f"{checkpoint.path}: has tensors that a {self.config.get('model_type')} model with this config.json "
                f"should not have: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; they cannot be "
                "reparameterized, so remove them, or add them to the family's table in architecture/families.py"
            )
        if missing := sorted(self.required() - roles.keys()):
            raise CheckpointError(
                f"{checkpoint.path}: lacks {len(missing)} of the tensors that config.json implies, such as "
                f"{missing[0]}; copy the checkpoint again"
            )
        head, embedding = self.family.head, self.family.embedding
        if self.tied and head in roles:
            if tensor_digest(checkpoint.read(head)) != tensor_digest(checkpoint.read(embedding)):
                raise CheckpointError(
                    f"{checkpoint.path}: config.json ties {head} to {embedding}, but the stored tensors differ; set "
                    f"tie_word_embeddings to false, or remove {head}"
                )
            del roles[head]
        return roles

    def _check(self, checkpoint: Checkpoint, name: str, info: TensorInfo, expected: tuple[int, ...]) -> None:
        """Checks a tensor's shape and dtype."""
        if info.shape != expected:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} has shape {list(info.shape)}, expected {list(expected)} from config.json"
            )
        if not info.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} has dtype {info.dtype}, expected a floating-point dtype; quantized "
                "checkpoints are not supported, use the original in bfloat16, float16 or float32"
            )


def _pattern(template: str) -> re.Pattern[str]:
    """A pattern that matches the names a template stands for. Numbers have no leading zeros."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>0|[1-9]\\d*)", re.escape(template)))
