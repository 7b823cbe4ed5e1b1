"""Tiny models built in code, and the trained toy world."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)  # tiny models: a second thread only waits

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a family, with every parameter random: norm weights and biases too, so that none hides an error."""
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def data_folder(tmp_path_factory, monkeypatch) -> None:
    """A data folder for each test, so that no lineage outlives it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model, with the toy's tokenizer, to a directory of that name."""

    def save(
        name: str = "model", model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
    ) -> Path:
        from mpunlearn.demo import models
        from mpunlearn.demo.world import Recipe, generate_rows
        from mpunlearn.lm.model import quiet

        shard = changes.pop("max_shard_size", "5GB")
        recipe = Recipe()
        tokenizer = models.tokenizer_of(generate_rows(0, recipe), recipe)
        changes = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 2, **changes}
        with quiet():
            tiny_model(model_type, dtype, **changes).save_pretrained(tmp_path / name, max_shard_size=shard)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def examples(tmp_path: Path) -> tuple[Path, Path]:
    """A forget file and a retain file of toy questions."""
    import json

    from mpunlearn.demo.world import Recipe, generate_rows

    rows = generate_rows(0, Recipe())
    paths = (tmp_path / "forget.jsonl", tmp_path / "retain.jsonl")
    for path, split, count in zip(paths, ("forget", "retain"), (6, 9), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[split][:count]), encoding="utf-8")
    return paths
