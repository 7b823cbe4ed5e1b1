"""Announced floors: what a plan says before there is a model, and how it is read."""

import json
import math
from pathlib import Path

import pytest
import yaml

from mpunlearn import Perturbation
from mpunlearn.audit.floor import noise_floor, read_floors
from mpunlearn.cli import main
from mpunlearn.errors import FileError, PlanError


def floors(tmp_path: Path, **options):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(options))
    return read_floors(tmp_path / "plan.yaml")


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_some_copies_leave_noise_and_all_of_them_none(copies: int) -> None:
    left = noise_floor(Perturbation(copies=copies, kappa=0.1))
    # k of m zero-sum noises: their sum has variance k (m - k) / (m - 1).
    expected = [0.1 * math.sqrt((copies - k) / (k * (copies - 1))) for k in range(1, copies + 1)]
    assert left == pytest.approx(expected, abs=1e-9)


def test_the_worst_choice_of_copies_counts() -> None:
    quiet_last = Perturbation(copies=3, kappa=0.1, alphas=(2.0, 1.5, 1.0))
    assert noise_floor(quiet_last)[0] == pytest.approx(0.1)
    on_a_line = noise_floor(Perturbation(copies=3, kappa=0.1, denoising="extrapolate"))
    assert on_a_line == pytest.approx([0.1, 0.0, 0.0], abs=1e-9)


def test_rounds_average_noise_but_not_common_noise(tmp_path: Path) -> None:
    found = floors(tmp_path, copies=1, kappa=0.3, rounds=9, common_noise=0.4)
    assert found.left(1, 1) == pytest.approx(0.5)
    assert found.left(1, 9) == pytest.approx(math.hypot(0.1, 0.4))
    with_base = floors(tmp_path, copies=1, kappa=0.3, rounds=9, common_noise=0.4, base="b")
    assert with_base.left(1, 9) == pytest.approx(0.1)
    assert "common noise leaves 40.00% of the weights on top" in with_base.text()


def test_presets_and_options_of_other_commands_are_read(tmp_path: Path) -> None:
    hardened = floors(tmp_path, preset="hardened", objective="npo", **{"learning-rate": 1e-4})
    assert (hardened.perturbation.copies, hardened.perturbation.kappa, hardened.common) == (3, 0.05, None)
    assert "common noise is auto" in hardened.text()
    assert "--preset lean" in hardened.text()
    assert floors(tmp_path, preset="hardened", kappa=0.2).perturbation.kappa == 0.2
    paper = floors(tmp_path, preset="paper").text()
    assert "Whoever holds all copies of a round has the model" in paper
    assert "--preset lean" not in paper


def test_a_configuration_that_the_command_line_printed_is_a_plan(tmp_path: Path, capsys) -> None:
    assert main(["run", "m", "--forget", "f", "--out", "o", "--copies", "2", "--kappa", "0.1", "--print-config"]) == 0
    plan = tmp_path / "plan.yaml"
    plan.write_text(capsys.readouterr().out)
    assert main(["audit", "--plan", str(plan), "--json", "--out", str(tmp_path / "floors.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["copies_held"]["1"]["one_round"] == pytest.approx(0.1)
    assert found["copies_held"]["2"] == {"one_round": 0, "all_rounds": 0}
    assert json.loads((tmp_path / "floors.json").read_text()) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("copies: 0", "--copies: expected at least 1, found 0"),
        ("rounds: none", "rounds: expected an integer of at least 1, found 'none'"),
        ("- 3", "expected options such as"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_plan_that_is_none_is_refused_with_its_path(tmp_path: Path, content: str, message: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(content)
    with pytest.raises(PlanError, match=f"--plan {plan}: .*{message}"):
        read_floors(plan)
    with pytest.raises(FileError, match="cannot be read"):
        read_floors(tmp_path / "absent.yaml")
