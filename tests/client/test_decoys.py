"""Decoys: unlearned along with the forget set, restored by nothing, and no different to the server."""

import json
from pathlib import Path

import pytest
from tests.client.training import distance, read_all, with_options

from mpunlearn import Client, run, unlearn
from mpunlearn.cli import main
from mpunlearn.client.audit.audit import audit
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError, PlanError
from mpunlearn.files import read_json
from mpunlearn.server.perturbation import Perturbation


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    return write(tmp_path / "decoys.jsonl", generate_rows(0, Recipe())["retain"][20:26])


@pytest.mark.parametrize("objective", ["npo", "dpo"])
def test_decoys_join_the_forget_set_in_training(save_tiny, tmp_path: Path, examples, decoys: Path, objective) -> None:
    path, (forget, retain) = save_tiny(), examples
    options = {"retain": retain, "training": with_options(objective=objective)}
    hidden = unlearn(path, forget=forget, decoys=decoys, out=tmp_path / "hidden", **options)
    both = tmp_path / "both.jsonl"
    both.write_text(forget.read_text() + decoys.read_text())
    joined = unlearn(path, forget=both, out=tmp_path / "joined", **options)
    assert distance(read_all(hidden), read_all(joined)) == 0
    assert distance(read_all(hidden), read_all(unlearn(path, forget=forget, out=tmp_path / "plain", **options))) > 0.1


def test_real_texts_are_not_told_from_decoys(save_tiny, tmp_path: Path) -> None:
    """From other texts of the same kind they are."""
    rows = generate_rows(0, Recipe())["retain"]
    files = {
        name: write(tmp_path / f"{name}.jsonl", rows[start : start + 20])
        for name, start in (("forget", 0), ("decoys", 20), ("reference", 40))
    }
    path = save_tiny()
    training = with_options(objective="grad-ascent")
    client = Client(forget=files["forget"], decoys=files["decoys"], training=training)
    update = client.unlearn(path, tmp_path / "u")
    values = audit([update], copy=[path], **files).metrics()
    assert values["membership-auc"] > 0.8
    assert 0.3 < values["membership-decoy-auc"] < 0.7
    assert values["floor-auc"] > 0.8
    assert 0.3 < values["floor-decoy-auc"] < 0.7


def test_a_text_that_is_no_decoy_is_refused(save_tiny, tmp_path: Path, examples) -> None:
    forget, retain = examples
    rows = generate_rows(0, Recipe())
    for name, row in (("forget", rows["forget"][1]), ("retain", rows["retain"][2])):
        decoys = write(tmp_path / f"{name}-decoys.jsonl", [rows["retain"][30], row])
        with pytest.raises(DataError, match=rf"decoys\.jsonl.*: this decoy is also in the --{name} set"):
            Client(forget=forget, retain=retain, decoys=decoys, training=with_options())


def test_a_run_keeps_to_its_decoys(save_tiny, tmp_path: Path, examples, decoys: Path) -> None:
    path, (forget, retain) = save_tiny(), examples
    options = {"forget": forget, "retain": retain, "out": tmp_path / "run", "rounds": 1}
    options |= {"perturbation": Perturbation(copies=2, kappa=0.01), "training": with_options(epochs=1)}
    run(path, decoys=decoys, **options)
    plan = read_json(tmp_path / "run" / "client" / "plan.json")
    assert (
        plan["decoys"] == Client(forget=forget, retain=retain, decoys=decoys, training=with_options()).digests["decoys"]
    )
    with pytest.raises(PlanError, match=r"--decoys with SHA-256 \w+, not \(none\)"):
        run(path, **options)


def test_decoys_on_the_command_line(save_tiny, tmp_path: Path, examples, decoys: Path) -> None:
    arguments = ["unlearn", str(save_tiny()), "--forget", str(examples[0]), "--out", str(tmp_path / "u"), "--quiet"]
    arguments += ["--objective", "grad-ascent", "--epochs", "1"]
    assert main([*arguments, "--decoys", str(tmp_path / "missing.jsonl")]) == 2
    assert main([*arguments, "--decoys", str(decoys)]) == 0
