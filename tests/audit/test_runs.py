"""Audits of whole runs: their copies, their control, what copies can do, and requirements."""

import json
import shutil
from pathlib import Path

import pytest

from mpunlearn import Perturbation, Training, preprocess, run
from mpunlearn.audit.audit import audit
from mpunlearn.audit.report import CONTROL, ONE
from mpunlearn.cli import main
from mpunlearn.errors import AuditError, FileError, PlanError, StateError


@pytest.fixture
def finished(save_tiny, examples, tmp_path: Path) -> Path:
    """A run of two rounds whose copies were kept."""
    run(
        save_tiny(),
        forget=examples[0],
        retain=examples[1],
        out=tmp_path / "run",
        rounds=2,
        keep_exchange=True,
        perturbation=Perturbation(copies=2, kappa=0.05, common_noise=0.1, common_noise_shape="gauss"),
        training=Training(epochs=1, learning_rate=1e-6),
    )
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore::mpunlearn.errors.NothingUnlearnedWarning")
def test_a_run_is_audited_by_its_directory(finished: Path, tmp_path: Path, capsys) -> None:
    found = audit(finished, out=tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text()) == found.to_json()
    assert (found.held, found.rounds) == (4, 2)
    assert found.baselines[CONTROL].error < 1e-5
    assert found.trusted
    assert found.floor == pytest.approx(0.1, rel=0.05)
    assert found.attacks[found.strongest].error == pytest.approx(found.floor, rel=0.06)
    assert found.attacks["all copies of 2 rounds"].error < found.attacks[ONE].error
    assert main(["audit", str(finished), "--require", "parameter-error>0.08", "--quiet"]) == 0
    assert main(["audit", str(finished), "--require", "parameter-error>0.2,equal-float32<0.1", "--quiet"]) == 3
    printed = capsys.readouterr()
    assert "control: known key" in printed.out
    assert "--require parameter-error>0.2: not met: parameter-error is 0." in printed.err
    state = finished / "server" / "state"
    (state / "secret.key").write_bytes(b"x" * 32)
    broken = audit(finished)
    assert not broken.trusted
    assert "The control failed" in broken.text()
    shutil.rmtree(finished / "exchange")
    with pytest.raises(StateError, match="repeat it with --keep-exchange"):
        audit(finished)


def test_predictions_are_compared_and_a_copy_is_repaired(save_tiny, examples, tmp_path: Path) -> None:
    model, base = save_tiny(), save_tiny("base", initializer_range=0.5)
    perturbation = Perturbation(copies=2, kappa=0.3, reparameterization="full")
    copies = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=perturbation).copies
    found = audit(
        model=model, copies=copies[:1], base=base, text=examples[0], public_text=examples[0], repair_rate=1e-2
    )
    same = audit(model=model, copies=[model], text=examples[0])
    assert same.behaviors[ONE].logit_error < 1e-5
    assert same.behaviors[ONE].agreement == 1.0
    assert same.behaviors[ONE].kl < 1e-9
    assert found.behaviors[ONE].logit_error > 0.05
    assert found.behaviors["one copy, repaired"].probability > found.behaviors[ONE].probability
    assert found.baselines["public base"].task_error == pytest.approx(1.0)
    assert "public base" in found.behaviors
    assert found.values()["task-error"] < 1.0
    with pytest.raises(AuditError, match=r"kl is .*") as caught:
        audit(model=model, copies=[model], text=examples[0], require="kl>0.5")
    assert caught.value.report.behaviors == same.behaviors


def test_options_that_contradict_one_another_are_refused(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    with pytest.raises(PlanError, match="found none of them"):
        audit()
    with pytest.raises(PlanError, match="leave out --model"):
        audit(tmp_path, model=model)
    with pytest.raises(PlanError, match="--plan: needs no run"):
        audit(tmp_path, plan="plan.yaml")
    with pytest.raises(PlanError, match="--public-text: .* --text"):
        audit(model=model, copies=[model], public_text="t")
    with pytest.raises(PlanError, match="task-error>0.1: needs --base"):
        audit(model=model, copies=[model], require="task-error>0.1")
    with pytest.raises(PlanError, match="--repair-rate: expected a number above 0"):
        audit(model=model, copies=[model], repair_rate=0.0)
    with pytest.raises(FileError, match="already exists"):
        audit(model=model, copies=[model], out=tmp_path)
    with pytest.raises(StateError, match="contains no run"):
        audit(tmp_path)
