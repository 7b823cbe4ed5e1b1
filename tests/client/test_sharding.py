"""Sharded loading: every process reads its own rows only, and together they have what `from_pretrained` has."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed
from tests.architecture.test_families import TOKENS, VARIANTS
from tests.conftest import tiny_model

from mpunlearn.checkpoint import Checkpoint, TensorInfo
from mpunlearn.client.resources import Resources
from mpunlearn.client.sharding import Shard, fill, shard, stored
from mpunlearn.client.weights import adapt, select
from mpunlearn.errors import CheckpointError, PlanError, UnloadableError
from mpunlearn.lm.model import empty_model, load_model, quiet


@contextmanager
def process(rank: int, count: int) -> Iterator[None]:
    """One of several processes whose collectives do nothing; alone, it is a real group of one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend, store = ("gloo", torch.distributed.HashStore()) if count == 1 else ("fake", FakeStore())
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        with mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(count)}):
            yield
    finally:
        torch.distributed.destroy_process_group()


class Counting(Checkpoint):
    """A checkpoint that counts the bytes that are read."""

    count = 0

    def _read(self, info: TensorInfo, name: str, start: int, count: int, out: torch.Tensor | None = None):
        self.count += count
        return super()._read(info, name, start, count, out)


def save(variant: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with quiet():
        tiny_model(variant.split()[0], dtype, **VARIANTS[variant]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shards_are_the_rows_of_the_model(variant: str, tmp_path: Path) -> None:
    path = save(variant, tmp_path / "model", torch.bfloat16 if variant == "qwen2" else torch.float32)
    whole, read, shards = load_model(path, "cpu"), [], []
    for rank in range(3):
        with process(rank, 3):
            model, source = empty_model(path), Counting(path)
            shard(model, Resources())
            fill(model, source, Resources())
            shards.append({name: Shard.of(parameter).local.clone() for name, parameter in model.named_parameters()})
            buffers = dict(model.named_buffers())
            read.append(source.count)
    expected = dict(whole.named_parameters())
    assert list(shards[0]) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(torch.cat([part[name] for part in shards]), parameter), name
    assert {name for name, _ in whole.named_buffers()} == set(buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())
    assert sum(read) == sum(info.nbytes for info in source.tensors.values())
    assert max(read) < 0.6 * sum(read)


@pytest.mark.parametrize("variant", ["llama tied", "gemma2", "gpt_neox", "phi3", "mixtral", "qwen3_moe"])
def test_a_sharded_model_computes_the_same(variant: str, tmp_path: Path) -> None:
    path = save(variant, tmp_path / "model")
    with torch.no_grad():
        expected = load_model(path, "cpu")(TOKENS).logits
        with process(0, 1):
            model = empty_model(path)
            shard(model, Resources(cpu_offload=variant == "gemma2"))
            fill(model, Checkpoint(path), Resources(cpu_offload=variant == "gemma2"))
            assert torch.equal(model(TOKENS).logits, expected)


def test_adapters_are_sharded_with_the_model(tmp_path: Path) -> None:
    path, alone = save("llama", tmp_path / "model"), load_model(tmp_path / "model", "cpu")
    alone = adapt(alone, 4, 8.0, select(alone, "blocks"), 5, None)
    expected = dict(alone.named_parameters())
    parts: list[dict[str, torch.Tensor]] = []
    for rank in range(3):
        with process(rank, 3):
            model = empty_model(path)
            model = adapt(model, 4, 8.0, select(model, "blocks"), 5, None)
            shard(model, Resources())
            fill(model, Checkpoint(path), Resources(), seed=5)
            parts.append({name: Shard.of(parameter).local.clone() for name, parameter in model.named_parameters()})
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in expected.items() if parameter.requires_grad}
    assert all(torch.equal(torch.cat([part[name] for part in parts]), value) for name, value in expected.items())


def test_what_a_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    path = save("llama", tmp_path / "model")
    source = Checkpoint(path)
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with process(1, 2), pytest.raises(CheckpointError, match=r"expected a tensor model.layers.1.mlp.up_proj.weight"):
        model = empty_model(path)
        shard(model, Resources())
        fill(model, source, Resources())


def test_a_merge_that_does_not_keep_rows_together_is_refused(tmp_path: Path, monkeypatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    model = empty_model(save("mixtral", tmp_path / "model"))
    name, shape = "model.layers.0.mlp.experts.down_proj", torch.Size([5, 32, 40])
    assert [part.rows for part in stored(model, name, shape)] == [32] * 5
    for dims in ((1, 2), (0, 1)):
        turned = WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", operations=[Transpose(*dims)])
        monkeypatch.setattr(model, "_weight_conversions", [turned], raising=False)
        with pytest.raises(UnloadableError, match="not supported on several processes"):
            stored(model, name, shape)


def test_offloading_needs_several_processes(save_tiny, examples, tmp_path: Path) -> None:
    from mpunlearn import Training, unlearn

    with pytest.raises(PlanError, match="--cpu-offload: needs several processes"):
        unlearn(
            save_tiny(),
            forget=examples[0],
            out=tmp_path / "u",
            training=Training("grad-ascent"),
            resources=Resources(cpu_offload=True),
        )
