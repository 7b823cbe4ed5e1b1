"""Random checkpoints with the shapes of real models, and matching synthetic updates, for the other benchmarks."""

from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import CARD

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-3.1-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "llama-3.1-405b": {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
ROWS = 4096
"""Number of rows that are generated at a time."""


def build(out: Path, config: dict[str, Any]) -> Path:
    """Writes a random bfloat16 checkpoint with the shapes of a config, a few rows at a time."""
    architecture = Architecture(FAMILIES[config["model_type"]], config)
    names = architecture.required()
    if config["model_type"] == "qwen2":
        layers = range(architecture.layers)
        names |= {f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in layers for part in "qkv"}
    specs = {}
    for name in sorted(names):
        role = architecture.role_of(name)
        assert role is not None
        specs[name] = (torch.bfloat16, architecture.shape(role))
    with new_directory(out) as folder:
        write_json(folder / "config.json", {**config, "dtype": "bfloat16"})
        with TensorWriter(folder, specs) as writer:
            for name, (dtype, shape) in specs.items():
                for start in range(0, shape[0], ROWS):
                    rows = torch.randn(min(ROWS, shape[0] - start), *shape[1:]).mul_(0.02).to(dtype)
                    writer.write_rows(name, start, rows)
    return out


def synthetic_update(copy: Path, out: Path) -> Path:
    """Writes a bfloat16 update of every tensor of a copy, equal to the tensor divided by 1000, a few rows at a time."""
    source = Checkpoint(copy)
    specs = {name: (torch.bfloat16, info.shape) for name, info in source.tensors.items()}
    with new_directory(out) as folder:
        write_json(folder / "update.json", {CARD: source.config[CARD]})
        with TensorWriter(folder, specs, stem="update") as writer:
            for name, (_, shape) in specs.items():
                for start in range(0, shape[0], ROWS):
                    rows = source.read_rows(name, start, min(start + ROWS, shape[0]))
                    writer.write_rows(name, start, rows * 0.001)
    return out


def size(folder: Path) -> int:
    """The total size of the files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
