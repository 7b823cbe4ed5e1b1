"""The audit finds θ in all copies of a round, stops at noise that they share, and leaves a single copy its noise."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.perturbations import without_offset

from mpunlearn import preprocess
from mpunlearn.audit.audit import audit
from mpunlearn.audit.report import ONE, Audit
from mpunlearn.cli import main
from mpunlearn.errors import PlanError

HARMONIC = "all copies, harmonic weights"
KAPPA = 0.01


def published(model: Path, out: Path, **changes) -> tuple[str | Path, ...]:
    """The copies of a round of three, with scales that are pinned so that one copy carries exactly κ."""
    options = {"copies": 3, "kappa": KAPPA, "alphas": (1.0, 1.4, 1.9), **changes}
    return tuple(
        preprocess(model, state=out / "state", out=out / "copies", perturbation=without_offset(**options)).copies
    )


def shifted(model: Path, out: Path, level: float, seed: int = 1) -> Path:
    """The checkpoint θ + c, with ‖c‖ = level ‖θ‖ in every tensor."""
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    random = torch.Generator().manual_seed(seed)
    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        c = torch.randn(value.shape, generator=random)
        weights[name] = value + level * c * (value.norm() / c.norm())
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_all_copies_of_a_round_disclose_the_model_and_one_does_not(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    found = audit(model=model, copies=published(model, tmp_path))
    assert found.attacks[HARMONIC].error < 1e-3
    assert found.attacks[HARMONIC].equal_bfloat16 > 0.9
    assert found.attacks[ONE].error == pytest.approx(KAPPA, rel=0.05)
    assert found.attacks[ONE].equal_bfloat16 < 0.3


def test_known_scales_of_extrapolation_disclose_the_model_and_secret_ones_less(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()

    def error(name: str, alphas: tuple[float, ...] | None) -> float:
        copies = published(model, tmp_path / name, denoising="extrapolate", alphas=alphas)
        return audit(model=model, copies=copies).attacks["all copies, known scales"].error

    assert error("known", (1.0, -1.0, 2.0)) < 1e-7
    # Scales that happen to be drawn close to the known ones hide little, so one draw alone says nothing.
    assert median([error(f"secret-{number}", None) for number in range(3)]) > 1e-5


@pytest.mark.parametrize("level", [0.05, 0.1])
def test_common_noise_leaves_the_announced_floor(save_tiny, tmp_path: Path, level: float) -> None:
    model = save_tiny()
    changes = {"kappa": 0.02, "common_noise": level, "common_noise_shape": "gauss"}
    found = audit(model=model, copies=published(model, tmp_path, **changes), floor=level)
    assert found.attacks[found.strongest].error == pytest.approx(level, rel=0.05)
    assert found.holds


@pytest.mark.parametrize("kappa", [KAPPA, 0.1])
@pytest.mark.parametrize("level", [0.1, 0.3])
def test_the_attack_stops_at_noise_that_all_copies_share(save_tiny, tmp_path: Path, kappa: float, level: float) -> None:
    model = save_tiny()
    stand_in = shifted(model, tmp_path / "shifted", level)
    found = audit(model=model, copies=published(stand_in, tmp_path, kappa=kappa), floor=level)
    assert found.attacks[HARMONIC].error == pytest.approx(level, rel=0.05)
    assert found.holds
    assert f"floor of {level} holds" in found.text()


def test_a_single_copy_and_copies_without_noise(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    copies = published(model, tmp_path, kappa=0.0, alphas=None)
    assert set(audit(model=model, copies=copies[:1]).attacks) == {ONE}
    for found in audit(model=model, copies=copies).attacks.values():
        assert found.error < 1e-6


def test_the_command_says_whether_the_floor_holds(save_tiny, tmp_path: Path, capsys) -> None:
    model = save_tiny()
    copies = [str(path) for path in published(model, tmp_path)]
    arguments = ["audit", "--model", str(model), "--copies", *copies, "--floor", "0.01", "--quiet"]
    assert main(arguments) == 0
    assert "announced floor of 0.01 does not hold" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["copies"], found["holds"]) == (3, False)
    assert found["attacks"][found["strongest"]]["error"] < 1e-3


def test_a_matrix_without_noise_is_found(save_tiny, tmp_path: Path, capsys) -> None:
    model = save_tiny()
    for scope, expected in (("layers", 3), ("all", 0)):
        copy = published(model, tmp_path / scope, copies=1, alphas=None, kappa=0.2, noise_scope=scope)[0]
        arguments = ["audit", "--model", str(model), "--copies", str(copy), "--quiet"]
        assert main([*arguments, "--require", "tensor-equal-bfloat16<0.3"]) == expected
        assert ("weight, 100.0% equal in bfloat16" in capsys.readouterr().out) is (expected == 3)


def test_an_offset_that_is_drawn_anew_is_found(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    for name, anew, expected in (("same", False, 0), ("anew", True, 3)):
        copies = []
        for number in range(4):
            offset = shifted(model, tmp_path / f"{name}-{number}", 0.1, seed=number if anew else 0)
            options = {"copies": 1, "alphas": None, "kappa": 0.01}
            copies.append(str(published(offset, tmp_path / f"run-{name}-{number}", **options)[0]))
            config = json.loads((Path(copies[-1]) / "config.json").read_text())
            del config["mpunlearn"]  # as if they were one round
            (Path(copies[-1]) / "config.json").write_text(json.dumps(config))
        arguments = [
            "audit",
            "--model",
            str(model),
            "--copies",
            *copies,
            "--require",
            "parameter-error>0.09",
            "--quiet",
        ]
        assert main(arguments) == expected


def test_models_that_do_not_belong_together_are_refused(save_tiny, tmp_path: Path) -> None:
    model, other = save_tiny(), save_tiny("other", intermediate_size=48)
    with pytest.raises(PlanError, match=r"other: lacks .* an audit compares models of one architecture"):
        audit(model=model, copies=[other])
    with pytest.raises(PlanError, match="given twice"):
        audit(model=model, copies=[model, model])
    with pytest.raises(PlanError, match="at least one copy"):
        audit(model=model, copies=[])
    with pytest.raises(PlanError, match="--floor"):
        audit(model=model, copies=[model], floor=-1.0)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"model\.norm\.weight has infinite or NaN entries"):
        audit(model=model, copies=[other])


def test_a_floor_holds_up_to_a_tolerance() -> None:
    from mpunlearn.audit.score import Score

    def holds(error: float) -> bool | None:
        return Audit("m", 1, {ONE: Score(error, 0.0, 0.0, "w", 0.0)}, floor=0.1).holds

    assert holds(0.096)
    assert holds(0.094) is False
    assert holds(1.4) is None
