"""Slices and chunks cover a model once, and results depend neither on their size nor on the number of threads."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.perturbations import without_offset

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.errors import PlanError
from mpunlearn.server import stream
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.secret import BLOCK
from mpunlearn.server.workspace import Workspace


@given(st.integers(0, 500), st.integers(1, 300_000), st.integers(1, 16))
def test_chunks_cover_every_row_once(rows: int, row: int, multiple: int) -> None:
    cut = stream.chunks(rows, row, multiple)
    assert [n for start, stop in cut for n in range(start, stop)] == list(range(rows))
    assert all(start % multiple == 0 for start, _ in cut)


@given(st.integers(0, 5000), st.sampled_from([1, 64, 896, 1000, 4864, 11008]), st.integers(0, 5000))
def test_chunks_start_at_blocks_of_the_keystream_where_rows_allow_it(rows: int, row: int, first: int) -> None:
    cut = stream.chunks(rows, row, 1, first=first, block=BLOCK)
    assert [n for start, stop in cut for n in range(start, stop)] == list(range(rows))
    assert all(row * (stop - start) <= 2 * stream.CHUNK_ENTRIES for start, stop in cut)
    if row in (1, 64, 896, 4864):  # 16,384 / gcd(16,384, row) rows are few enough
        assert all((first + start) * row % BLOCK == 0 for start, _ in cut[1:])


def test_slices_cover_every_tensor_once(save_tiny, monkeypatch) -> None:
    monkeypatch.setattr(stream, "SLICE_ENTRIES", 1000)
    checkpoint = Checkpoint(save_tiny())
    roles = Architecture.of(checkpoint).tensor_roles(checkpoint)
    slices = stream.row_slices(checkpoint, roles)
    for name in roles:
        rows = [n for part in slices if part.name == name for n in range(part.start, part.stop)]
        assert rows == list(range(checkpoint.tensors[name].shape[0]))
    assert sum(part.name == "lm_head.weight" for part in slices) > 10
    assert sum(part.name == "model.layers.0.mlp.up_proj.weight" for part in slices) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "qwen3_moe"])
def test_threads_change_no_byte_and_chunks_only_the_last_bit(save_tiny, tmp_path, monkeypatch, model_type: str) -> None:
    sizes = {"head_dim": 8, "num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
    path = save_tiny(model_type=model_type, num_key_value_heads=4, **(sizes if "moe" in model_type else {}))
    digests, published = [], []
    for number, (chunk, threads) in enumerate(((1 << 18, 2), (1 << 18, 1), (1 << 18, 3), (64, 2), (300, 1))):
        monkeypatch.setattr(stream, "CHUNK_ENTRIES", chunk)
        monkeypatch.setattr(stream, "THREADS", threads)
        published.append(preprocess(path, state=tmp_path / "s", out=tmp_path / f"c{number}").copies)
        digests.append([checkpoint_digest(copy) for copy in published[-1]])
    assert digests[0] == digests[1] == digests[2]
    for copies in published[3:]:
        for one, other in zip(published[0], copies, strict=True):
            for name in Checkpoint(one).tensors:
                assert torch.allclose(Checkpoint(one).read(name), Checkpoint(other).read(name), atol=2e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_gpu_agrees_with_the_processor_to_rounding(save_tiny, tmp_path, model_type: str) -> None:
    path = save_tiny(model_type=model_type)
    finals = []
    for device in ("cpu", "cuda"):
        state, out = tmp_path / "s", tmp_path / device
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(tmp_path / "first", state) if (tmp_path / "first").exists() else None
        copies = preprocess(path, state=state, out=out / "c", device=device).copies
        if device == "cpu":
            shutil.copytree(state, tmp_path / "first")  # the same secret for both
        finals.append([*copies, postprocess(copies, state=state, out=out / "o", device=device)])
    for one, other in zip(*finals, strict=True):
        for name in Checkpoint(one).tensors:
            assert torch.allclose(Checkpoint(one).read(name), Checkpoint(other).read(name), atol=2e-6), name


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(save_tiny, tmp_path) -> None:
    for device in ("warp", "meta", "cuda:99"):
        with pytest.raises(PlanError, match="--device"):
            preprocess(save_tiny(), state=tmp_path / "s", out=tmp_path / "c", device=device)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_goes_through_both_passes_and_generates(save_tiny, tmp_path, model_type: str) -> None:
    """Published in its own dtype, loaded by transformers, trained by hand, aggregated: exact under any orthogonal maps."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if "moe" in model_type else {}
    sizes |= {"head_dim": 8} if model_type.startswith(("gemma", "qwen3")) else {}
    sizes |= {"num_key_value_heads": 4} if model_type == "gpt_neox" else {}
    path = save_tiny(model_type=model_type, **sizes)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(kappa=0.1)).copies
    original = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.tensor([[5, 6, 7, 8]])
    for copy in copies:
        model = AutoModelForCausalLM.from_pretrained(copy)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)
        assert set(model.state_dict()) == set(original.state_dict())
        tensors = load_file(copy / "model.safetensors")
        save_file({name: 0.9 * tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    new = Checkpoint(postprocess(copies, state=tmp_path / "s", out=tmp_path / "o"))
    for name in new.tensors:
        assert torch.allclose(new.read(name), 0.9 * Checkpoint(path).read(name), atol=2e-5), name


def test_an_exception_in_one_item_stops_all_and_restores_the_threads() -> None:
    threads = torch.get_num_threads()
    done: list[int] = []

    def work(number: int, workspace: Workspace) -> int:
        if number == 3:
            raise RuntimeError("three")
        done.append(number)
        return number

    with pytest.raises(RuntimeError, match="three"):
        stream.in_parallel(range(100), work, "counting", lambda _: 1)
    assert len(done) < 20
    assert torch.get_num_threads() == threads
    assert stream.in_parallel([5, 4, 6], lambda n, workspace: n, "counting", lambda _: 1) == [5, 4, 6]
