"""Aggregation: exact where theory says so, and deaf to everything that is not an update of this round."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.perturbations import without_offset

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.errors import PlanError, StateError, UpdateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import CARD
from mpunlearn.server.design import CopyDesign, extrapolated, harmonic
from mpunlearn.server.noise import noisy
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.state import ServerState
from mpunlearn.server.workspace import Workspace

NAME = "model.layers.0.mlp.up_proj.weight"


def quadratic_descent(theta: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The update of plain gradient descent on ½ θᵀHθ - bᵀθ with a fixed positive H."""
    n = theta.numel()
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    start, moved = theta.flatten(), theta.flatten().clone()
    for _ in range(steps):
        moved = moved - 0.1 * (factor @ (factor.T @ moved) - b)
    return (moved - start).view(theta.shape)


@given(st.integers(2, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_on_a_quadratic_the_aggregate_is_the_noise_free_update(copies: int, data) -> None:
    alphas = data.draw(st.lists(st.floats(1, 3), min_size=copies, max_size=copies))
    design, theta = harmonic(alphas), torch.linspace(-1, 1, 24, dtype=torch.float64)
    draws = [torch.randn(24, dtype=torch.float64) for _ in range(design.draws)]
    updates = [quadratic_descent(noisy(theta, draws, design, 0.5, k, Workspace())) for k in range(copies)]
    exact = quadratic_descent(theta)
    aggregate = sum(float(w) * update for w, update in zip(design.weights, updates, strict=True))
    assert float((aggregate - exact).abs().max()) < 1e-10
    if max(alphas) - min(alphas) > 0.1:
        plain = sum(updates) / copies
        assert float((plain - exact).abs().max()) > 1e-6


def test_extrapolation_is_exact_on_higher_orders_where_averaging_is_not() -> None:
    """An update that is a cubic of θ: four copies on a line cancel it, three zero-sum copies do not."""
    theta, draw = torch.linspace(-1, 1, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)

    def error(design: CopyDesign, draws: list[torch.Tensor]) -> float:
        updates = [-(noisy(theta, draws, design, 0.2, k, Workspace()) ** 3) for k in range(design.copies)]
        aggregate = sum(float(w) * update for w, update in zip(design.weights, updates, strict=True))
        return float((aggregate + theta**3).abs().max())

    assert error(extrapolated([1.0, -1.0, 0.5**0.5, -(0.5**0.5)]), [draw]) < 1e-12
    assert error(harmonic([1.0, 1.0, 1.0]), [draw, draw.flip(0)]) > 1e-3


@pytest.mark.parametrize("strength", ["none", "paper", "full"])
@pytest.mark.parametrize("denoising", ["harmonic", "extrapolate"])
def test_end_to_end_on_a_quadratic(save_tiny, tmp_path: Path, strength: str, denoising: str) -> None:
    """Through the files: in published coordinates the client descends a quadratic that no orthogonal map changes."""
    path = save_tiny(dtype=torch.float64, model_type="qwen2")
    perturbation = without_offset(copies=3, kappa=0.3, reparameterization=strength, denoising=denoising)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    for copy in copies:
        tensors = load_file(copy / "model.safetensors")
        save_file({name: 0.7 * tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    out = postprocess(copies, state=tmp_path / "s", out=tmp_path / "o", eta=0.5)
    for name in Checkpoint(path).tensors:
        expected = Checkpoint(path).read(name) * (1 - 0.5 * 0.3)
        assert torch.allclose(Checkpoint(out).read(name), expected, atol=1e-10), name


@pytest.fixture
def published(save_tiny, tmp_path: Path):
    """A published round and a valid update for each of its three copies."""
    path = save_tiny()
    plain = without_offset()
    copies = preprocess(path, state=tmp_path / "state", out=tmp_path / "copies", perturbation=plain).copies
    updates = [write_update(copy, tmp_path / "updates" / copy.name) for copy in copies]
    return path, copies, updates


def write_update(copy: Path, out: Path, scale: float = -0.01, names: tuple[str, ...] = (NAME,)) -> Path:
    source = Checkpoint(copy)
    with new_directory(out) as folder:
        write_json(folder / "update.json", {CARD: source.config[CARD]})
        specs = {name: (torch.float32, source.tensors[name].shape) for name in names}
        with TensorWriter(folder, specs, stem="update") as writer:
            for name in names:
                writer.write(name, scale * source.read(name).float())
    return out


def write_factors(copy: Path, out: Path, names: list[str], rank: int = 2, product: bool = False) -> Path:
    """An update of random factors, or the dense update that they stand for."""
    source = Checkpoint(copy)
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name in names:
        outputs, inputs = source.tensors[name].shape
        a = 0.05 * torch.randn(rank, inputs, generator=generator)
        b = 0.05 * torch.randn(outputs, rank, generator=generator)
        tensors |= {name: b @ a} if product else {f"{name}.lora_A": a, f"{name}.lora_B": b}
    out.mkdir(parents=True)
    write_json(out / "update.json", {CARD: source.config[CARD]})
    save_file(tensors, out / "update.safetensors")
    return out


@pytest.mark.parametrize("strength", ["none", "paper", "full"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "qwen3", "qwen3_moe"])
def test_factors_give_what_their_product_gives(save_tiny, tmp_path: Path, strength: str, model_type: str) -> None:
    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if "moe" in model_type else {}
    path = save_tiny(model_type=model_type, num_key_value_heads=4, **sizes)
    perturbation = without_offset(kappa=0.02, reparameterization=strength)
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    names = [name for name, info in Checkpoint(copies[0]).tensors.items() if len(info.shape) == 2]
    finals = []
    for product in (False, True):
        updates = [write_factors(copy, tmp_path / f"u{product}" / copy.name, names, product=product) for copy in copies]
        finals.append(Checkpoint(postprocess(updates, state=tmp_path / "s", out=tmp_path / f"o{product}")))
    moved = 0.0
    for name in finals[0].tensors:
        assert torch.allclose(finals[0].read(name), finals[1].read(name), atol=1e-6), name
        moved = max(moved, float((finals[0].read(name) - Checkpoint(path).read(name)).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.lora_A"), "without"),
        (lambda t: t.update({f"{NAME}.lora_A": torch.zeros(3, 32)}), "has shape"),
        (lambda t: t.update({f"{NAME}.lora_A": torch.zeros(2, 31)}), "has shape"),
        (lambda t: t.update({f"{NAME}.lora_A": torch.zeros(0, 32), f"{NAME}.lora_B": torch.zeros(40, 0)}), "has shape"),
        (lambda t: t.update({f"{NAME}.lora_A": torch.zeros(64, 32), f"{NAME}.lora_B": torch.zeros(40, 64)}), "rank"),
        (lambda t: t.update({f"{NAME}.lora_B": torch.zeros(40, 2, dtype=torch.int32)}), "dtype"),
        (lambda t: t.update({f"{NAME}.lora_B": torch.full((40, 2), torch.nan)}), "NaN"),
        (lambda t: t.update({f"{NAME}.lora_B": torch.full((40, 2), 1e4)}), "norm"),
        (lambda t: t.update({NAME: torch.zeros(40, 32)}), "and its LoRA factors"),
        (lambda t: t.update({"model.norm.weight.lora_A": torch.zeros(2, 32)}), "no matrix"),
        (lambda t: t.update({"x.lora_A": torch.zeros(2, 32), "x.lora_B": torch.zeros(40, 2)}), "no matrix"),
    ],
)
def test_factors_that_are_none_are_refused(published, tmp_path: Path, change, message: str) -> None:
    _, copies, _ = published
    updates = [write_factors(copy, tmp_path / "f" / copy.name, [NAME]) for copy in copies]
    tensors = load_file(updates[1] / "update.safetensors")
    change(tensors)
    save_file(tensors, updates[1] / "update.safetensors")
    with pytest.raises(UpdateError, match=message):
        postprocess(updates, state=tmp_path / "state", out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_updates_and_trained_checkpoints_give_the_same_model(published, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, copies, updates = published
    trained = []
    for copy in copies:
        model = AutoModelForCausalLM.from_pretrained(copy)
        with torch.no_grad():
            model.get_parameter(NAME).mul_(0.99)
        model.save_pretrained(tmp_path / "trained" / copy.name)
        AutoTokenizer.from_pretrained(copy).save_pretrained(tmp_path / "trained" / copy.name)
        trained.append(tmp_path / "trained" / copy.name)
    one = postprocess(updates[::-1], state=tmp_path / "state", out=tmp_path / "one")
    two = postprocess(trained, state=tmp_path / "state", out=tmp_path / "two")
    for name in Checkpoint(path).tensors:
        assert torch.allclose(Checkpoint(one).read(name), Checkpoint(two).read(name), atol=1e-6), name
    assert float((Checkpoint(one).read(NAME) - 0.99 * Checkpoint(path).read(NAME)).abs().max()) < 1e-6
    assert torch.equal(Checkpoint(one).read("model.norm.weight"), Checkpoint(path).read("model.norm.weight"))
    assert CARD not in Checkpoint(one).config
    assert AutoModelForCausalLM.from_pretrained(one).config.model_type == "llama"


def test_small_updates_survive_between_rounds_in_float32(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(dtype=torch.bfloat16)
    perturbation = without_offset(copies=1, kappa=0.0, reparameterization="none")
    current = path
    for number in (1, 2):
        [copy] = preprocess(
            current, state=tmp_path / "s", out=tmp_path / f"c{number}", perturbation=perturbation
        ).copies
        update = write_update(copy, tmp_path / f"u{number}", scale=1.5 * 2**-10)
        dtype = "float32" if number == 1 else None
        current = postprocess([update], state=tmp_path / "s", out=tmp_path / f"o{number}", dtype=dtype)
        assert Checkpoint(current).tensors[NAME].dtype == (torch.float32 if number == 1 else torch.bfloat16)
        assert Checkpoint(current).config["dtype"] == ("float32" if number == 1 else "bfloat16")
        assert Checkpoint(copy).tensors[NAME].dtype == torch.bfloat16
    before, after = Checkpoint(path).read(NAME).float(), Checkpoint(current).read(NAME).float()
    assert torch.equal((before * (1 + 1.5 * 2**-10)).bfloat16().float(), before)  # one update alone is rounded away
    assert bool((after.abs() >= before.abs()).all())
    assert not torch.equal(before, after)


def refusals(tmp_path: Path, copies: list[Path], updates: list[Path], how: str) -> tuple[list[Path], str]:
    """Damages the second update, or the list; returns what to give and what the error should say."""
    bad = updates[1]
    file = bad / "update.safetensors"
    tensors = load_file(file)
    card = json.loads((bad / "update.json").read_text())[CARD]

    def with_card(**changes) -> list[Path]:
        (bad / "update.json").write_text(json.dumps({CARD: {**card, **changes}}))
        return updates

    def with_tensors(changed: dict[str, torch.Tensor]) -> list[Path]:
        save_file(changed, file)
        return updates

    if how == "missing":
        return [updates[0], updates[2]], "no update for copy 2"
    if how == "twice":
        return [updates[0], updates[1], updates[1]], "copy 2, and so does"
    if how == "none":
        return [], "no update for copies 1, 2, 3"
    if how == "another run":
        return with_card(run="0" * 32), "run 00000000; expected"
    if how == "another round":
        return with_card(round=2), "round 2"
    if how == "copy beyond m":
        return with_card(copy=4), "copy 4"
    if how == "no card":
        (bad / "update.json").write_text("{}")
        return updates, "does not say which copy"
    if how == "bad card":
        return with_card(copy="2"), "Card.copy: expected an integer"
    if how == "not a directory":
        return [*updates[:2], tmp_path / "nothing"], "neither an update nor a trained checkpoint"
    if how == "pickle":
        file.unlink()
        torch.save(tensors, bad / "update.bin")
        return updates, "safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
        return updates, "not a complete safetensors file"
    if how == "unknown name":
        return with_tensors({**tensors, "../../etc/passwd": torch.ones(2)}), "etc/passwd"
    if how == "shape":
        return with_tensors({NAME: tensors[NAME].T.contiguous()}), "has shape"
    if how == "integers":
        return with_tensors({NAME: tensors[NAME].to(torch.int64)}), "int64"
    if how == "other tensors":
        return with_tensors({**tensors, "model.norm.weight": torch.zeros(32)}), "different tensors"
    if how == "nan":
        tensors[NAME][3, 4] = float("nan")
        return with_tensors(tensors), "NaN or infinite"
    if how == "infinity":
        tensors[NAME][3, 4] = float("inf")
        return with_tensors(tensors), "NaN or infinite"
    if how == "huge":
        return with_tensors({NAME: 1e6 * tensors[NAME]}), "norm"
    if how == "trained but incomplete":
        other = tmp_path / "trained"
        shutil.copytree(copies[1], other)
        whole = load_file(other / "model.safetensors")
        save_file({name: tensor for name, tensor in whole.items() if name != NAME}, other / "model.safetensors")
        return [updates[0], other, updates[2]], "not a model that was trained from a published copy"
    if how == "trained and rounded":
        other = tmp_path / "trained"
        shutil.copytree(copies[1], other)
        rounded = {name: t.bfloat16() for name, t in load_file(other / "model.safetensors").items()}
        save_file(rounded, other / "model.safetensors")
        return [updates[0], other, updates[2]], "rounding"
    raise AssertionError(how)


REFUSALS = """missing|twice|none|another run|another round|copy beyond m|bad card|no card|not a directory|pickle|truncated
unknown name|shape|integers|other tensors|nan|infinity|huge|trained but incomplete|trained and rounded"""


@pytest.mark.parametrize("how", REFUSALS.replace("\n", "|").split("|"))
def test_what_is_not_an_update_is_refused_and_nothing_changes(published, tmp_path: Path, how: str) -> None:
    _, copies, updates = published
    given_updates, message = refusals(tmp_path, copies, updates, how)
    state = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UpdateError, match=message):
        postprocess(given_updates, state=tmp_path / "state", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == state


def test_an_update_of_the_round_before_is_refused(published, tmp_path: Path) -> None:
    path, _, updates = published
    postprocess(updates, state=tmp_path / "state", out=tmp_path / "out")
    preprocess(path, state=tmp_path / "state", out=tmp_path / "copies-2", perturbation=without_offset())
    with pytest.raises(UpdateError, match="round 1.*expected.*round 2"):
        postprocess(updates, state=tmp_path / "state", out=tmp_path / "out-2")


def test_a_checkpoint_that_changed_since_is_refused_and_one_that_moved_is_found(published, tmp_path: Path) -> None:
    path, _, updates = published
    moved = path.rename(tmp_path / "moved")
    assert postprocess(updates, state=tmp_path / "state", out=tmp_path / "a", checkpoint=moved).is_dir()
    file = moved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(StateError, match="has changed since round 1 was published"):
        postprocess(updates, state=tmp_path / "state", out=tmp_path / "b", checkpoint=moved)
    assert not (tmp_path / "b").exists()


def test_a_state_without_a_round_and_a_directory_that_is_no_state(published, tmp_path: Path) -> None:
    _, copies, updates = published
    with pytest.raises(StateError, match="no round was published"):
        postprocess(updates, state=tmp_path / "nowhere", out=tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StateError, match="not a valid server state"):
        postprocess(updates, state=copies[0], out=tmp_path / "out")
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(StateError, match="other users can access"):
        ServerState(tmp_path / "state")


@pytest.mark.parametrize("options", [{"eta": float("nan")}, {"eta": float("inf")}, {"dtype": "int8"}])
def test_impossible_options(published, tmp_path: Path, options) -> None:
    with pytest.raises(PlanError, match="--"):
        postprocess(published[2], state=tmp_path / "state", out=tmp_path / "out", **options)
