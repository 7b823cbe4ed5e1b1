"""What rounding to the storage dtype leaves of the noise: measured, warned of, and mended by a noise floor."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.perturbations import without_offset

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import DisclosureWarning, UnsupportedModelError
from mpunlearn.server.noise import rounded_entropy, spacing
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.state import ServerState

KEY = "model.layers.0.mlp.up_proj.weight"


@given(st.floats(2.0**-120, 2.0**100), st.sampled_from([torch.bfloat16, torch.float32]))
def test_spacing_is_the_distance_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    stored = torch.tensor([value]).to(dtype)
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    above = (stored.view(bits) + 1).view(dtype)
    assert float(spacing(stored.float(), dtype)) == float(above.double() - stored.double())


def slow_entropy(ratio: float) -> float:
    """By counting: the noise at a fine resolution, rounded to the grid."""
    x = np.linspace(-12 * ratio - 1, 12 * ratio + 1, 400_001)
    p = np.exp(-0.5 * (x / ratio) ** 2)
    counts = np.bincount((np.round(x) - np.round(x).min()).astype(int), weights=p / p.sum())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts)).sum())


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35, 0.5, 1.0, 3.0, 30.0])
def test_rounded_entropy_is_the_entropy_of_the_noise_on_the_grid(ratio: float) -> None:
    assert float(rounded_entropy(np.array(ratio))) == pytest.approx(slow_entropy(ratio), abs=5e-3)
    if ratio >= 1:
        assert float(rounded_entropy(np.array(ratio))) == pytest.approx(math.log2(4.13 * ratio), abs=0.06 / ratio)


def test_rounded_entropy_vanishes_far_below_the_grid() -> None:
    assert float(rounded_entropy(np.array(0.05))) < 1e-6
    assert float(rounded_entropy(np.array(0.0))) == 0


@pytest.fixture
def tuned(save_tiny):
    """A bfloat16 model, and a base from which it differs by a tiny task vector."""
    path = save_tiny(dtype=torch.bfloat16)
    base = save_tiny("base", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(1)
    nudged = {name: (t.float() * (1 + 0.02 * torch.randn_like(t.float()))).bfloat16() for name, t in tensors.items()}
    save_file(nudged, path / "model.safetensors")
    return path, base


def recovered(path: Path, copy: Path) -> float:
    """Share of the original's entries that rounding the published ones to bfloat16 gives back."""
    original, published = Checkpoint(path).read(KEY), Checkpoint(copy).read(KEY)
    return float((published.bfloat16() == original).float().mean())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_without_a_floor_rounding_brings_the_original_back_and_is_warned_of(tuned, tmp_path: Path, dtype) -> None:
    path, base = tuned
    perturbation = without_offset(kappa=0.01, reparameterization="none", publish_dtype=dtype)
    with pytest.warns(DisclosureWarning, match="rounding undoes the noise"):
        published = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", base=base, perturbation=perturbation)
    shares = [recovered(path, copy) for copy in published.copies]
    assert min(shares) > 0.8
    if dtype is None:
        assert published.rounding[KEY].equal == pytest.approx(max(shares), abs=1e-6)
    assert published.rounding[KEY].entropy < 1
    kept = ServerState(tmp_path / "s").rounds[0].rounding
    assert kept == published.rounding
    assert "residual entropy" in published.summary()


def test_with_a_floor_of_one_spacing_about_two_bits_are_left_and_the_noise_still_cancels(tuned, tmp_path: Path) -> None:
    path, base = tuned
    perturbation = without_offset(kappa=0.01, noise_floor="grid", alphas=(1.0, 1.5, 2.0))
    options = {"state": tmp_path / "s", "out": tmp_path / "c", "base": base}
    published = preprocess(path, **options, perturbation=perturbation)
    for name, value in published.rounding.items():
        assert value.entropy > 1.9, name
        assert value.equal < 0.6 or "norm" in name, name
    # A norm has few entries, whose share scatters, but all norms together have enough.
    norms = [value.equal for name, value in published.rounding.items() if "norm" in name]
    assert sum(norms) / len(norms) < 0.6
    control = preprocess(
        path,
        state=tmp_path / "t",
        out=tmp_path / "d",
        base=base,
        perturbation=without_offset(kappa=0.01, noise_floor="grid", reparameterization="none", publish_dtype="float32"),
    )
    assert max(recovered(path, copy) for copy in control.copies) < 0.5
    original = Checkpoint(path).read(KEY).float()
    noise = torch.stack([Checkpoint(copy).read(KEY) - original for copy in control.copies])
    alphas = torch.tensor(ServerState(tmp_path / "t").rounds[0].alphas)
    weights = (1 / alphas) / (1 / alphas).sum()
    left = torch.tensordot(weights, noise, dims=1)
    assert float(left.abs().max()) < 1e-6
    assert float(noise.abs().max()) > 1e-3
    level = noise[0].square().mean().sqrt() / alphas[0]
    assert float(level) >= 0.9 * float(spacing(original, torch.bfloat16).square().mean().sqrt())
    assert (tmp_path / "c").is_dir()


def test_values_that_leave_the_range_of_float16_are_refused(save_tiny, tmp_path: Path) -> None:
    path = save_tiny()
    tensors = load_file(path / "model.safetensors")
    tensors[KEY][0, 0] = 1e6
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="exceeds the range"):
        preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(publish_dtype="float16"))
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "c").exists()
    [copy] = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(copies=1)).copies
    with pytest.raises(UnsupportedModelError, match="exceeds the range"):
        postprocess([copy], state=tmp_path / "s", out=tmp_path / "o", dtype="float16")
    assert not (tmp_path / "o").exists()
