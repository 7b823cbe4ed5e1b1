import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests.perturbations import without_offset

from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.errors import CheckpointError, MPUError, PlanError, StateError, UnsupportedModelError
from mpunlearn.server.axis_map import AxisMap
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import ServerState

KEY = "model.layers.1.mlp.down_proj.weight"


def dense_matrix(axis_map: AxisMap, size: int) -> torch.Tensor:
    """The n x n matrix of an axis map, built entry by entry."""
    matrix = torch.eye(size, dtype=torch.float64)
    if axis_map.blocks is not None:
        matrix = torch.block_diag(*axis_map.blocks)
    if axis_map.index is not None:
        matrix = torch.stack([matrix[int(i)] for i in axis_map.index])
    if axis_map.sign is not None:
        matrix = torch.stack([float(s) * row for s, row in zip(axis_map.sign, matrix, strict=True)])
    return matrix


@pytest.mark.parametrize("strength", ["full", "paper", "none"])
@pytest.mark.parametrize("scope", ["all", "layers"])
def test_streaming_equals_the_formulas_in_memory(save_tiny, tmp_path: Path, strength: str, scope: str) -> None:
    path = save_tiny(dtype=torch.float64, model_type="qwen2", max_shard_size="40KB")
    base = save_tiny("base", dtype=torch.float64, model_type="qwen2", initializer_range=0.5)
    perturbation = without_offset(copies=3, kappa=0.1, reparameterization=strength, noise_scope=scope)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", base=base, perturbation=perturbation).copies
    state = ServerState(tmp_path / "s")
    record = state.rounds[0]
    from mpunlearn.architecture import FAMILIES, Architecture

    source, reference = Checkpoint(path), Checkpoint(base)
    architecture = Architecture(FAMILIES["qwen2"], source.config)
    publisher = Publisher(state.secret, record, architecture)
    theta = {name: source.read(name) for name in source.tensors}
    # σ of a block is κ times the RMS of the task vector over all of the block's entries.
    blocks: dict[str, list[torch.Tensor]] = {}
    for name in theta:
        block = "layer " + name.split(".")[2] if ".layers." in name else name
        blocks.setdefault(block, []).append((theta[name] - reference.read(name)).flatten())
    sigma = {block: 0.1 * torch.cat(values).square().mean().sqrt() for block, values in blocks.items()}
    alpha = torch.tensor(record.alphas, dtype=torch.float64)
    assert bool(((alpha >= 1) & (alpha <= 2)).all())
    for name, weight in theta.items():
        in_layer = ".layers." in name
        block = "layer " + name.split(".")[2] if in_layer else name
        z = torch.stack(
            [
                state.secret.stream("noise", record.inputs, d, name).normals(weight.numel()).double().view(weight.shape)
                for d in (0, 1)
            ]
        )
        basis = torch.tensor([[1, 1], [-1, 1], [0, -2]]) / torch.tensor([2.0, 6.0], dtype=torch.float64).sqrt()
        for k in range(3):
            noise = alpha[k] * (1.5**0.5) * torch.tensordot(basis[k], z, dims=1) * sigma[block]
            expected = weight + noise if in_layer or scope == "all" else weight
            place = architecture.role_of(name)
            matrices = [
                dense_matrix(axis_map, size)
                for axis_map, size in zip(publisher.maps[k].maps(place), weight.shape, strict=True)
            ]
            expected = matrices[0] @ expected if len(matrices) == 1 else matrices[0] @ expected @ matrices[1].T
            assert torch.allclose(Checkpoint(copies[k]).read(name), expected, rtol=1e-12, atol=1e-12), name


def noise_of(path: Path, copies: list[Path], name: str = KEY) -> torch.Tensor:
    original = Checkpoint(path).read(name)
    return torch.stack([Checkpoint(copy).read(name) - original for copy in copies]).flatten(1)


def test_noise_sums_to_zero_and_has_the_stated_covariance(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(dtype=torch.float64, hidden_size=128, intermediate_size=512)
    perturbation = without_offset(copies=4, kappa=0.2, reparameterization="none", alphas=(1.0, 1.0, 1.5, 2.0))
    noise = noise_of(path, preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies)
    sigma = ServerState(tmp_path / "s").rounds[0].sigma["layer 1"]
    alpha = torch.tensor(perturbation.alphas, dtype=torch.float64)
    assert float((noise / alpha[:, None]).sum(dim=0).abs().max()) < 1e-12
    covariance = noise @ noise.T / noise.shape[1] / sigma**2
    expected = torch.outer(alpha, alpha) * 4 / 3 * (torch.eye(4) - 0.25)
    assert float((covariance - expected).abs().max()) < 5 * 4 / noise.shape[1] ** 0.5
    for k in range(4):
        assert stats.kstest((noise[k] / alpha[k] / sigma).numpy(), "norm").pvalue > 1e-4


def test_one_copy_carries_noise_that_nothing_cancels(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(dtype=torch.float64, hidden_size=128, intermediate_size=512)
    perturbation = without_offset(copies=1, kappa=0.1, reparameterization="none")
    noise = noise_of(path, preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies)
    sigma = ServerState(tmp_path / "s").rounds[0].sigma["layer 1"]
    assert stats.kstest((noise[0] / sigma).numpy(), "norm").pvalue > 1e-4


def test_runs_rounds_and_tensors_are_independent(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(dtype=torch.float64, hidden_size=128, intermediate_size=512)
    perturbation = without_offset(copies=2, kappa=0.1, reparameterization="none")
    noises = []
    for run in ("a", "b"):
        copies = preprocess(path, state=tmp_path / run, out=tmp_path / f"{run}-1", perturbation=perturbation).copies
        noises += [noise_of(path, copies)[0], noise_of(path, copies, KEY.replace("1", "0"))[0]]
    server = ServerState(tmp_path / "a")
    server.close()
    noises.append(
        noise_of(path, preprocess(path, state=tmp_path / "a", out=tmp_path / "a-2", perturbation=perturbation).copies)[
            0
        ]
    )
    correlations = np.corrcoef(np.stack([noise.numpy() for noise in noises])) - np.eye(len(noises))
    assert np.abs(correlations).max() < 5 / noises[0].numel() ** 0.5


def test_the_same_state_publishes_the_same_copies_again(save_tiny, tmp_path: Path) -> None:
    path = save_tiny()
    first = preprocess(path, state=tmp_path / "s", out=tmp_path / "one").copies
    again = preprocess(path, state=tmp_path / "s", out=tmp_path / "two").copies
    assert [checkpoint_digest(copy) for copy in first] == [checkpoint_digest(copy) for copy in again]
    other = preprocess(path, state=tmp_path / "t", out=tmp_path / "three").copies
    assert not {checkpoint_digest(copy) for copy in first} & {checkpoint_digest(copy) for copy in other}


@pytest.mark.slow
def test_interrupted_anywhere_copies_never_lose_their_record(save_tiny, tmp_path: Path, monkeypatch) -> None:
    path, rename, sync = save_tiny(), Path.rename, os.fsync
    for number in range(100):
        state, out, left = tmp_path / f"s{number}", tmp_path / f"out{number}", [number]

        def interrupted(done: Callable[..., Any], *arguments: Any, left: list[int] = left) -> None:
            done(*arguments)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "rename", lambda *places: interrupted(rename, *places))
        monkeypatch.setattr(os, "fsync", lambda descriptor: interrupted(sync, descriptor))
        try:
            preprocess(path, state=state, out=out)
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
        if out.exists():
            (record,) = ServerState(state).rounds
            assert not record.closed
        else:
            preprocess(path, state=state, out=out)
    assert number > 10


@pytest.mark.parametrize("change", ["kappa", "weights", "base"])
def test_an_open_round_is_never_published_from_other_inputs(save_tiny, tmp_path: Path, change: str) -> None:
    path = save_tiny()
    preprocess(path, state=tmp_path / "s", out=tmp_path / "one")
    base = None
    if change == "base":
        base, perturbation = path, Perturbation()
    elif change == "weights":
        path, perturbation = save_tiny("other", hidden_act="gelu"), Perturbation()
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    else:
        perturbation = Perturbation(kappa=0.02)
    with pytest.raises(StateError, match="round 1 is open"):
        preprocess(path, state=tmp_path / "s", out=tmp_path / "two", base=base, perturbation=perturbation)
    assert not (tmp_path / "two").exists()
    assert len(ServerState(tmp_path / "s").rounds) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_copies_load_with_transformers_and_generate(
    save_tiny, tmp_path: Path, dtype, tied: bool, model_type: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save_tiny(model_type=model_type, dtype=dtype, tie_word_embeddings=tied)
    [copy] = preprocess(
        path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(copies=1, kappa=0)
    ).copies
    original, published = (AutoModelForCausalLM.from_pretrained(p) for p in (path, copy))
    assert published.dtype == dtype
    tokens = AutoTokenizer.from_pretrained(copy)("Where was", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = original.float()(tokens).logits, published.float()(tokens).logits
    limit = 1e-4 if dtype == torch.float32 else 0.2
    assert float((before - after).abs().max()) < limit * float(before.abs().max())
    assert published.generate(tokens, max_new_tokens=4, do_sample=False).shape[1] == tokens.shape[1] + 4
    assert (published.lm_head.weight is published.model.embed_tokens.weight) == tied
    # Rounding after a rotation is the only difference: what is only permuted and negated is equal to the bit.
    a, b = (Checkpoint(p).read("model.embed_tokens.weight").float().abs().sort().values for p in (path, copy))
    assert torch.equal(a, b)


def test_a_tied_head_that_is_stored_twice_stays_tied(save_tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny(tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    [copy] = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(copies=1)).copies
    assert "lm_head.weight" not in Checkpoint(copy).tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ"):
        preprocess(path, state=tmp_path / "t", out=tmp_path / "d")


def test_constants_of_old_checkpoints_are_not_published(save_tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path / "model.safetensors"), **extra}, path / "model.safetensors")
    [copy] = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(copies=1)).copies
    assert not set(extra) & set(Checkpoint(copy).tensors)


def test_publish_dtype(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(dtype=torch.bfloat16)
    copies = preprocess(
        path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(publish_dtype="float32")
    ).copies
    assert {info.dtype for info in Checkpoint(copies[0]).tensors.values()} == {torch.float32}
    assert Checkpoint(copies[0]).config["dtype"] == "float32"


def test_copies_hold_no_secret_and_no_path_of_the_server(save_tiny, tmp_path: Path, capfd) -> None:
    path = save_tiny()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "_name_or_path": "/srv/secret-model"}))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    paths = {"name_or_path": "/srv/secret-model", "special_tokens_map_file": "/srv/secret-model/map.json"}
    (path / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **paths}))
    (path / "optimizer.pt").write_text("server's own")
    preprocess(path, state=tmp_path / "s", out=tmp_path / "c")
    key = (tmp_path / "s" / "secret.key").read_bytes()
    alphas = ServerState(tmp_path / "s").rounds[0].alphas
    printed = "".join(capfd.readouterr()).encode()
    secrets = [key, key.hex().encode(), base64.b64encode(key), str(tmp_path / "s").encode(), b"/srv/secret-model"]
    secrets += [repr(alpha).encode() for alpha in alphas]
    published = {
        file.relative_to(tmp_path): file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()
    }
    assert len(published) >= 3 * 4
    for name, content in {**published, Path("printed"): printed}.items():
        assert not any(secret in content for secret in secrets), name
    assert not list((tmp_path / "c").rglob("optimizer.pt"))
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "s" / "secret.key").stat().st_mode & 0o777 == 0o600


def bad_model(save_tiny, how: str) -> tuple[Path, type[MPUError], str]:
    from safetensors.torch import load_file, save_file

    path = save_tiny()
    file, config = path / "model.safetensors", json.loads((path / "config.json").read_text())
    tensors = load_file(file)
    if how == "unknown family":
        (path / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
        return path, UnsupportedModelError, "known families: gemma, gemma2, gemma3_text, gpt_neox, llama, mistral"
    if how == "no model_type":
        (path / "config.json").write_text("{}")
        return path, UnsupportedModelError, "known families"
    if how == "quantized":
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        return path, UnsupportedModelError, "quantized"
    if how == "size missing":
        (path / "config.json").write_text(json.dumps({**config, "hidden_size": None}))
        return path, UnsupportedModelError, "hidden_size"
    if how == "unknown tensor":
        save_file({**tensors, "model.layers.0.adapter.weight": torch.ones(3)}, file)
        return path, UnsupportedModelError, "model.layers.0.adapter.weight"
    if how == "layer beyond the config":
        save_file({**tensors, "model.layers.2.input_layernorm.weight": torch.ones(32)}, file)
        return path, UnsupportedModelError, "model.layers.2.input_layernorm.weight"
    if how == "missing tensor":
        save_file({name: tensor for name, tensor in tensors.items() if name != KEY}, file)
        return path, CheckpointError, KEY
    if how == "wrong shape":
        save_file({**tensors, KEY: torch.ones(3, 3)}, file)
        return path, UnsupportedModelError, r"\[3, 3\]"
    if how == "integers":
        save_file({**tensors, KEY: tensors[KEY].to(torch.int32)}, file)
        return path, UnsupportedModelError, "int32"
    value = {"nan": float("nan"), "infinity": float("inf")}[how]
    tensors[KEY][0, 0] = value
    save_file(tensors, file)
    return path, CheckpointError, KEY


@pytest.mark.parametrize(
    "how",
    ["unknown family", "no model_type", "quantized", "size missing", "unknown tensor", "layer beyond the config",
     "missing tensor", "wrong shape", "integers", "nan", "infinity"],
)  # fmt: skip
def test_models_that_cannot_be_handled_exactly_are_refused_before_anything_is_written(save_tiny, tmp_path, how) -> None:
    path, kind, message = bad_model(save_tiny, how)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(kind, match=message):
        preprocess(path, state=tmp_path / "state", out=tmp_path / "copies")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_base_of_another_shape_is_refused(save_tiny, tmp_path: Path) -> None:
    base = save_tiny("base", intermediate_size=48)
    with pytest.raises(CheckpointError, match="--base"):
        preprocess(save_tiny(), state=tmp_path / "s", out=tmp_path / "c", base=base)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "options",
    [{"copies": 0}, {"copies": -1}, {"kappa": -0.1}, {"kappa": float("nan")}, {"kappa": float("inf")},
     {"alphas": (1.0, 2.0)}, {"alphas": (0.5, 1.0, 1.0)}, {"reparameterization": "half"}, {"noise_scope": "some"},
     {"denoising": "median"}, {"publish_dtype": "int8"}, {"copies": 1, "alphas": (1.0,)},
     {"denoising": "extrapolate", "copies": 7}],
)  # fmt: skip
def test_impossible_perturbations(options) -> None:
    with pytest.raises(PlanError, match="--"):
        without_offset(**options)
