"""What several processes need, from shapes. benchmarks/sharded.py compares it with what is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.planning.test_sizes import LLAMA_70B

from mpunlearn import Resources, Training
from mpunlearn.errors import PlanError
from mpunlearn.planning.plan import plan
from mpunlearn.planning.sharded import several_processes
from mpunlearn.planning.sizes import Shapes

SHAPES = Shapes.of_config(LLAMA_70B)
SIZES = {"examples": 1, "tokens": 80, "answer_tokens": 60, "precision": "bfloat16", "checkpointing": True}


def needs(count: int, training: Training | None = None, offload: bool = False, micro_batches: int = 1):
    training = training or Training()
    return several_processes(
        SHAPES,
        training,
        SHAPES.training_bytes(training, **SIZES),
        processes=count,
        micro_batches=micro_batches,
        precision="bfloat16",
        cpu_offload=offload,
    )


def test_memory_is_a_share_and_a_constant() -> None:
    eight, sixteen = needs(8), needs(16)
    assert eight.shard == pytest.approx(2 * sixteen.shard)
    assert eight.gpu - eight.shard == pytest.approx(sixteen.gpu - sixteen.shard)
    assert (
        15.5 * SHAPES.parameters < 8 * eight.shard < 16 * SHAPES.parameters
    )  # float32: weights, gradients, two moments
    assert eight.gpu - eight.shard > 2 * 2 * SHAPES.parameters / 80  # two layers in bfloat16
    assert eight.host == sixteen.host < 2e9


def test_offloading_moves_the_shard_to_the_host() -> None:
    kept, moved = needs(8), needs(8, offload=True)
    assert kept.gpu + kept.host == moved.gpu + moved.host
    assert moved.host - kept.host == moved.shard


def test_traffic() -> None:
    """Forget and retain, each: the weights of the layers in bfloat16 twice, and their gradients in float32."""
    layers = sum(1 for role in SHAPES.roles.values() if role.layer is not None)
    assert layers == 80 * 9
    received = needs(1024).step_traffic
    assert received == pytest.approx(2 * (2 * 2 + 4) * SHAPES.parameters, rel=0.1)
    assert needs(1).step_traffic == 0
    assert needs(8, micro_batches=3).step_traffic == pytest.approx(3 * needs(8).step_traffic)
    sharp = needs(8, Training(sam_radius=0.01))
    assert sharp.step_traffic == pytest.approx(1.5 * needs(8).step_traffic)  # the forget gradient is taken twice
    lora = Training(lora_rank=16)
    assert needs(8, lora).step_traffic < 0.6 * needs(8).step_traffic
    assert needs(8, lora).gpu < needs(8).gpu


def test_plan_says_what_several_processes_need(save_tiny, examples, tmp_path: Path) -> None:
    given = {"forget": examples[0], "retain": examples[1], "seconds": 0}
    one = plan(save_tiny(), **given, out=tmp_path / "1.yaml")
    assert one.several is None
    assert "processes" not in one.text()
    resources = Resources(micro_batch_size=1, cpu_offload=True)
    four = plan(tmp_path / "model", **given, out=tmp_path / "4.yaml", processes=4, resources=resources)
    assert four.several is not None
    assert four.several.processes == 4
    assert "training on 4 processes, each: GPU" in four.text()
    assert replace(four, several=None, config="", training_parts=one.training_parts).text().count("processes") == 0
    received = {}
    for objective in ("npo", "jensun", "dpo"):  # only dpo has a forward pass for alternate answers
        options = {"processes": 2, "recommended": False, "training": Training(objective, retain_loss="nll")}
        several = plan(tmp_path / "model", **given, out=tmp_path / f"{objective}.yaml", **options).several
        received[objective] = several.step_traffic
    assert received["jensun"] == received["npo"] < received["dpo"]
    with pytest.raises(PlanError, match="--processes: expected at least 1, found 0"):
        plan(tmp_path / "model", **given, out=tmp_path / "0.yaml", processes=0)
