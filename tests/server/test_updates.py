"""Updates that arrive: norms and averages of factors, and factors that another basis would spoil."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpunlearn import Training, preprocess
from mpunlearn.architecture import FAMILIES
from mpunlearn.errors import UpdateError
from mpunlearn.protocol.exchange import Card
from mpunlearn.server.average import average
from mpunlearn.server.plan import RunPlan, check_models
from mpunlearn.server.updates import changed_tensors, examine, planned_tensors, update_bytes


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


MOE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 40, "head_dim": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_knows_what_a_plan_trains(family: str, tmp_path: Path) -> None:
    """For each family, plan and pattern: exactly the tensors that the client's own code selects and writes."""
    from tests.client.training import trained_shapes
    from tests.conftest import tiny_model

    from mpunlearn.client.weights import adapt, select

    moe = MOE if "moe" in family or family == "mixtral" else {}
    tiny_model(family, torch.float32, **moe).save_pretrained(tmp_path / "copy")
    for train in ("blocks", "all", r"layers\.1\.", "weight"):
        for rank in (0, 2):
            model = tiny_model(family, torch.float32, **moe)
            selected = select(model, train)
            if rank:
                linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
                if not linear & selected:
                    continue  # the client declines, as it does for an LM head that transformers renames
                if family == "gpt_neox" and "lm_head.weight" in selected:
                    continue
                model = adapt(model, rank, 4.0, selected, 0, None)
            sent = {name.removesuffix(".lora_A") for name in trained_shapes(model) if not name.endswith(".lora_B")}
            planned = planned_tensors(tmp_path / "copy", Training(train=train, lora_rank=rank))
            assert planned == (None if moe and (rank or train not in ("blocks", "all")) else sent), (train, rank)
            size = update_bytes(tmp_path / "copy", Training(train=train, lora_rank=rank))
            written = 4 * sum(math.prod(shape) for shape in trained_shapes(model).values())
            assert written <= size
            if planned is not None:
                assert size - written <= 200_000


def test_a_plan_or_an_update_that_splits_experts_is_refused(tmp_path: Path) -> None:
    from tests.conftest import tiny_model

    from mpunlearn.errors import PlanError

    tiny_model("mixtral", torch.float32, **MOE).save_pretrained(tmp_path / "model")
    plan = RunPlan(str(tmp_path / "model"), training=Training(train=r"experts\.0\."))
    with pytest.raises(PlanError, match=r"--train experts.*not that tensor of every expert.*select all experts"):
        check_models(plan)
    check_models(RunPlan(str(tmp_path / "model"), training=Training(train=r"experts")))
    published = preprocess(tmp_path / "model", state=tmp_path / "state", out=tmp_path / "copies").copies[0]
    entry = json.loads((published / "config.json").read_text())["mpunlearn"]
    tensors = load_file(published / "model.safetensors")
    for wanted, passes in ((r"layers\.0.*experts\.0\.", False), (r"layers\.0.*experts\.", True)):
        folder = tmp_path / f"update-{passes}"
        folder.mkdir()
        update = {name: 1e-3 * torch.randn(value.shape) for name, value in tensors.items() if re.search(wanted, name)}
        save_file(update, folder / "update.safetensors")
        (folder / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": entry}))
        if passes:
            examine(folder, published, tmp_path / "model", Card(**entry), factored=False)
        else:
            with pytest.raises(UpdateError, match="not that tensor of every expert"):
                examine(folder, published, tmp_path / "model", Card(**entry), factored=False)


def test_a_pattern_that_matches_nothing_is_refused_at_the_start(save_tiny) -> None:
    from mpunlearn.errors import PlanError

    for pattern, why in (("nothing", "matches no tensor"), ("(", "not a regular expression")):
        with pytest.raises(PlanError, match=why):
            check_models(RunPlan(str(save_tiny()), training=Training(train=pattern)))
