"""Updates that arrive: norms and averages of factors, and factors that another basis would spoil."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpunlearn import preprocess
from mpunlearn.errors import UpdateError
from mpunlearn.protocol.exchange import Card
from mpunlearn.server.average import average
from mpunlearn.server.updates import changed_tensors, examine


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_average_of_factors_is_the_average_of_products(ranks: list[int], shares: list[float], seed: int) -> None:
    import tempfile

    torch.manual_seed(seed)
    products = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, rank in enumerate(ranks):
            (folder / str(number)).mkdir()
            a, b, dense = torch.randn(rank, 6), torch.randn(7, rank), torch.randn(5)
            save_file({"w.lora_A": a, "w.lora_B": b, "v": dense}, folder / str(number) / "update.safetensors")
            entry = {"run": "r", "round": 1, "copy": 1, "copies": 1}
            (folder / str(number) / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
            products.append((b @ a, dense))
        mine = shares[: len(ranks)]
        out = average([folder / str(number) for number in range(len(ranks))], mine, folder / "average")
        assert changed_tensors(out) == {"w", "v"}
        result = load_file(out / "update.safetensors")
        product = result["w"] if "w" in result else result["w.lora_B"] @ result["w.lora_A"]
        assert ("w" in result) == (sum(ranks) > 6)
        for value, index in ((product, 0), (result["v"], 1)):
            expected = sum(s * p[index] for s, p in zip(mine, products, strict=True)) / sum(mine)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_of_factors_is_that_of_their_product(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    published = preprocess(model, state=tmp_path / "state", out=tmp_path / "copies").copies[0]
    entry = json.loads((published / "config.json").read_text())["mpunlearn"]
    name = "model.layers.0.self_attn.q_proj.weight"
    norm = float(sum(value.square().sum() for value in load_file(model / "model.safetensors").values()) ** 0.5)
    for size, passes in ((0.9, True), (1.1, False)):
        folder = tmp_path / str(size)
        folder.mkdir()
        a, b = torch.randn(2, 32), torch.randn(32, 2)
        b *= size * norm / (b @ a).norm()
        save_file({f"{name}.lora_A": a, f"{name}.lora_B": b.contiguous()}, folder / "update.safetensors")
        (folder / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
        if passes:
            examine(folder, published, model, Card(**entry), factored=True, expected={name})
            continue
        with pytest.raises(UpdateError, match="norm is 1.1"):
            examine(folder, published, model, Card(**entry), factored=True)


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (torch.full((1, 32), 1e37), torch.full((32, 1), 1e-39), "overflow in another basis"),
        (torch.tensor([[1e10], [-1e10]]).expand(2, 32), torch.full((32, 2), 1e10), "cancel"),
    ],
)
def test_factors_that_another_basis_would_spoil_are_refused(save_tiny, tmp_path: Path, a, b, why: str) -> None:
    model = save_tiny()
    published = preprocess(model, state=tmp_path / "state", out=tmp_path / "copies").copies[0]
    entry = json.loads((published / "config.json").read_text())["mpunlearn"]
    name = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "update").mkdir()
    save_file(
        {f"{name}.lora_A": a.contiguous(), f"{name}.lora_B": b.contiguous()}, tmp_path / "update" / "update.safetensors"
    )
    (tmp_path / "update" / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
    with pytest.raises(UpdateError, match=why):
        examine(tmp_path / "update", published, model, Card(**entry), factored=True)
