"""A smaller model of the same family, whose steps and passes can be timed when the model itself is too large for that.

It has fewer layers and tokens, and, if a single layer is too large, smaller widths: the sizes of heads stay. Its weights
are random, since no time depends on them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.files import new_directory, write_json
from mpunlearn.planning.sizes import Shapes

ENTRIES = 24_000_000
"""A model of at most this size is timed itself; a cut has about as many entries."""
VOCABULARY = 4096
LAYERS = 2
"""Layers of a cut: enough that what only the first or the last layer does is not counted for all of them."""
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
_EXPERTS = ("num_local_experts", "num_experts")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_INITIAL = 0.02
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Cut:
    """What is timed instead of a model."""

    path: Path
    shapes: Shapes
    what: str
    """How it differs from the model; empty if it is the model itself."""


def cut(checkpoint: Checkpoint, shapes: Shapes, folder: Path) -> Cut:
    """The model itself if it is small enough, otherwise a smaller one in FOLDER/model.

    Raises:
        FileError: the folder cannot be written.
    """
    if shapes.parameters <= ENTRIES:
        return Cut(checkpoint.path, shapes, "")
    config, what = cut_config(checkpoint.config, shapes)
    architecture = Architecture(shapes.architecture.family, config)
    specs = {}
    for name, stored in shapes.item_bytes.items():
        role = architecture.role_of(name)
        if role is not None:
            specs[name] = (_DTYPES[stored], architecture.shape(role))
    generator = torch.Generator().manual_seed(0)
    path = folder / "model"
    with new_directory(path) as partial:
        write_json(partial / "config.json", config)
        with TensorWriter(partial, specs) as writer:
            for name, (dtype, shape) in specs.items():
                writer.write(name, torch.randn(shape, generator=generator).mul_(_INITIAL).to(dtype))
    return Cut(path, Shapes.of_checkpoint(Checkpoint(path)), what)


def cut_config(config: Mapping[str, Any], shapes: Shapes) -> tuple[dict[str, Any], str]:
    """The config.json of a smaller model, and in words how it differs."""
    architecture = shapes.architecture
    layers = min(LAYERS, architecture.layers)
    smaller = {**config, "num_hidden_layers": layers, "vocab_size": min(VOCABULARY, architecture.config["vocab_size"])}
    smaller |= {key: value[:layers] for key, value in config.items() if key == "layer_types"}
    smaller |= {key: 0 for key in _TOKENS if config.get(key) is not None}
    what = [f"{layers} of {architecture.layers} layers", f"{smaller['vocab_size']} tokens"]
    if architecture.experts:
        experts = min(architecture.experts, max(4, int(architecture.config.get("num_experts_per_tok") or 1)))
        smaller |= {key: experts for key in _EXPERTS if key in config}
        what.append(f"{experts} experts")
    divisor = 1
    while _layer_entries(smaller, shapes) * layers > ENTRIES and _divisible(smaller):
        smaller |= {key: max(1, smaller[key] // 2) for key in _WIDTHS if isinstance(smaller.get(key), int)}
        smaller["head_dim"] = architecture.heads.dim
        divisor *= 2
    if divisor > 1:
        what.append(f"widths divided by {divisor}")
    return smaller, ", ".join(what)


def _divisible(config: Mapping[str, Any]) -> bool:
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    return bool(heads % 2 == 0 and (groups % 2 == 0 or groups == 1) and config["hidden_size"] % 2 == 0)


def _layer_entries(config: Mapping[str, Any], shapes: Shapes) -> int:
    """The number of entries of one layer of a model with this config."""
    architecture = Architecture(shapes.architecture.family, config)
    roles = (architecture.role_of(name) for name, role in shapes.roles.items() if role.layer == 0)
    return sum(math.prod(architecture.shape(role)) for role in roles if role is not None)
