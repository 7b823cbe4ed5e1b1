"""Bytes from shapes, compared with what is really written, and operations with what torch counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpunlearn import Perturbation, Training, preprocess, unlearn
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.planning.cut import ENTRIES, cut_config
from mpunlearn.planning.sizes import Shapes, network_disk, run_disk
from mpunlearn.server.updates import planned_tensors

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SMALL = {
    "adapters": {"lora_rank": 4},
    "all": {"train": "all", "update_dtype": "bfloat16"},
    "blocks": {},
    "some": {"train": r"mlp\.up_proj"},
}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "event.json")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3", "mixtral"])
def test_a_config_says_what_a_checkpoint_has(save_tiny, family: str) -> None:
    extra = {"tie_word_embeddings": family == "gemma2"}
    checkpoint = Checkpoint(save_tiny("model", family, **extra))
    stored, implied = Shapes.of_checkpoint(checkpoint), Shapes.of_config(checkpoint.config, "float32")
    shapes = {name: shape for name, shape in stored.shapes.items() if not name.endswith(".bias")}
    assert shapes == implied.shapes
    assert implied.copy_bytes("bfloat16") < implied.copy_bytes() == implied.theta_bytes


def test_published_sizes_of_known_models() -> None:
    """Parameter counts as their authors give them (arXiv 2407.21783; arXiv 2401.04088)."""
    assert Shapes.of_config(LLAMA_70B).parameters == pytest.approx(70.6e9, rel=0.005)
    assert Shapes.of_config(MIXTRAL).parameters == pytest.approx(46.7e9, rel=0.005)


@pytest.mark.filterwarnings("ignore::mpunlearn.DisclosureWarning")
@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_what_is_written_has_the_computed_size(save_tiny, examples, tmp_path: Path, options: dict) -> None:
    model, training = save_tiny("model", dtype=torch.bfloat16), Training("grad-ascent", epochs=1, **options)
    shapes = Shapes.of_checkpoint(Checkpoint(model))
    assert shapes.trained(training) == planned_tensors(model, training)
    perturbation = Perturbation(copies=2, publish_dtype="float32" if "train" in options else None)
    copies = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    written = (copies[0] / "model.safetensors").stat().st_size
    assert shapes.copy_bytes(perturbation.publish_dtype) == pytest.approx(written, rel=0.01)
    update = unlearn(copies[0], forget=examples[0], out=tmp_path / "u", training=training)
    assert shapes.update_bytes(training) == pytest.approx(size(update), rel=0.01)


def test_what_costs_memory_and_what_saves_it() -> None:
    shapes = Shapes.of_config({**LLAMA_70B, "num_hidden_layers": 2})

    def memory(training: Training, **options):
        return shapes.training_bytes(training, **{"examples": 8, "tokens": 100, "answer_tokens": 50, **options})

    full = memory(Training())
    assert full.weights == 4 * shapes.parameters
    assert full.optimizer == 2 * full.gradients
    adapters = memory(Training(lora_rank=8))
    assert adapters.optimizer < full.optimizer / 100
    assert memory(Training(optimizer="tensor_adam")).optimizer == full.optimizer / 2
    assert memory(Training(), checkpointing=True).activations < full.activations
    assert memory(Training(), examples=4).activations == pytest.approx(full.activations / 2, rel=0.01)
    assert memory(Training(), reference_model=True).total == full.total + full.weights


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_operations_are_those_that_torch_counts(save_tiny, family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from mpunlearn.lm.model import forward, load_model

    path = save_tiny("model", family)
    batch = {"input_ids": torch.randint(3, 40, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :5] = -100
    model = load_model(path)
    with FlopCounterMode(display=False) as counter:
        forward(model, batch)
    computed = Shapes.of_checkpoint(Checkpoint(path)).forward_flops(4 * 8, 4 * 3)
    assert computed == pytest.approx(counter.get_total_flops(), rel=0.15)  # without attention between positions


def test_the_disk_holds_everything_that_exists_at_the_same_time() -> None:
    shapes, training = Shapes.of_config({**LLAMA_70B, "num_hidden_layers": 1}), Training()
    copy, update, theta = shapes.copy_bytes(), shapes.update_bytes(training), shapes.theta_bytes
    one = run_disk(shapes, training, copies=1, rounds=1, copy=copy, references=False)
    assert one == max(copy + update, update + shapes.model_bytes)
    many = run_disk(shapes, training, copies=3, rounds=5, copy=copy, references=True)
    assert many == theta + 3 * copy + max(3 * copy + update, copy + 3 * update, 3 * update + theta)
    lora = replace(training, lora_rank=8)
    assert run_disk(shapes, lora, copies=3, rounds=5, copy=copy, references=False) < many
    alone, shared = (
        network_disk(shapes, training, copies=3, rounds=5, copy=copy, clients=clients, references=False)
        for clients in (1, 2)
    )
    assert shared.server > alone.server + 3 * update
    assert shared.client == alone.client


@pytest.mark.parametrize("config", [LLAMA_70B, MIXTRAL], ids=["llama", "mixtral"])
def test_a_cut_of_a_large_model_is_small_and_of_the_same_family(config: dict) -> None:
    shapes = Shapes.of_config(config)
    smaller, what = cut_config(config, shapes)
    cut = Shapes.of_config(smaller)
    assert cut.parameters < 2 * ENTRIES
    assert cut.architecture.heads.dim == shapes.architecture.heads.dim
    assert {role.template for role in cut.roles.values()} == {role.template for role in shapes.roles.values()}
    assert "widths divided by" in what
