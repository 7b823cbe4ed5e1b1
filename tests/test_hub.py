"""`push` against a hub on the loopback address: what arrives, and what the card says and does not say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.fake_hub import Hub, fake_hub

from mpunlearn import Training, preprocess
from mpunlearn.cli import main
from mpunlearn.errors import FileError, PlanError
from mpunlearn.hub.push import push
from mpunlearn.server.plan import RunPlan

SECRET_LEVEL = 0.04321


@pytest.fixture
def run(save_tiny, tmp_path: Path) -> Path:
    """A complete run in one process, as far as `push` reads it."""
    from mpunlearn import Perturbation

    folder = tmp_path / "private-place" / "run"
    training = Training("npo", learning_rate=5e-5, batch_size=4, gamma=0.1)
    perturbation = Perturbation(copies=2, kappa=SECRET_LEVEL)
    RunPlan(checkpoint=str(tmp_path / "model"), rounds=3, training=training, perturbation=perturbation).pin(
        folder / "server" / "plan.json"
    )
    (folder / "client").mkdir()
    (folder / "client" / "plan.json").write_text(json.dumps({"forget": "a" * 64, "retain": "b" * 64}))
    save_tiny("private-place/run/final")
    config = json.loads((folder / "final" / "config.json").read_text())
    (folder / "final" / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path)}))
    (folder / "final" / "optimizer.pt").write_bytes(b"no part of a checkpoint")
    return folder


@pytest.fixture
def reports(tmp_path: Path) -> list[str]:
    """An evaluation, an audit of the server and an audit of the client, as options."""
    evaluation = {
        "metrics": {"forget_Q_A_Prob": 0.0123, "model_utility": 0.6, "privleak": None},
        "retrained": {"forget_Q_A_Prob": 0.02},
        "per_example": {"forget": {"loss": [1.0]}},
        "provenance": {"benchmark": "tofu", "forget_split": "forget10", "checkpoint": "/home/owner/run"},
    }
    attacks = {"mean of the copies": {"error": 0.051, "equal_bfloat16": 0.125}, "one": {"error": 0.3}}
    audit = {
        "model": "/home/owner/model",
        "copies": 6,
        "rounds": 3,
        "attacks": attacks,
        "strongest": "mean of the copies",
    }
    client = {"metrics": {"membership-auc": 0.71}, "texts": {"forget": 20}}
    options = []
    for option, name, content in (
        ("--evaluation", "evaluation", evaluation),
        ("--audit", "audit", audit),
        ("--audit", "client", client),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        options += [option, str(tmp_path / f"{name}.json")]
    return options


def pushed(hub: Hub, *arguments: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    """`mpunlearn push` in a process of its own, since the library reads the address of the Hub when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "mpunlearn.cli", "push", *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_bytes_arrive_and_the_card_can_be_read(run: Path, reports: list[str], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    options = ["--private", "--base-model", "some/base", "--license", "mit", "--record", "2026-17"]
    with fake_hub() as hub:
        done = pushed(hub, str(run), "owner/forgetful", *reports, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/owner/forgetful/commit/")
    assert hub.repositories == {"owner/forgetful": True}
    (files,) = hub.commits
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip
    for name in files.keys() - {"README.md", "config.json", "tokenizer_config.json"}:
        assert files[name] == (run / "final" / name).read_bytes(), name
    assert "_name_or_path" not in json.loads(files["config.json"])

    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base"
    assert card.data.license == "mit"
    assert {"unlearning", "npo"} <= set(card.data.tags)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "forget_Q_A_Prob": 0.0123, "model_utility": 0.6,
    }  # fmt: skip
    assert results["model_utility"].dataset_type == "locuslab/TOFU"
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["model-index"][0]["name"] == "forgetful"
    for said in (
        "2026-17",
        "| rounds | 3 |",
        "| learning rate | 5e-05 |",
        "0.051",
        "0.125",
        "0.71",
        "| 0.02 |",
        "## Limits",
    ):
        assert said in card.text, said
    text = files["README.md"].decode()
    for secret in (str(SECRET_LEVEL), str(tmp_path), "/home/owner", "a" * 64, "b" * 64, "private-place", "kappa"):
        assert secret not in text, secret


@pytest.mark.slow
def test_an_upload_that_is_refused_is_one_line_without_the_token(run: Path) -> None:
    with fake_hub() as hub:
        done = pushed(hub, str(run), "owner/forgetful", token="hf_wrong")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mpunlearn push: owner/forgetful: cannot be uploaded: ")
    assert "Traceback" not in done.stderr
    assert "hf_wrong" not in done.stderr
    assert not hub.commits
    done = pushed(Hub(url="http://127.0.0.1:9"), str(run), "owner/forgetful")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_dry_run_uploads_nothing(run: Path, reports: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr("mpunlearn.hub.push._upload", None)
    assert main(["push", str(run / "final"), "owner/forgetful", *reports, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model-index" in printed
    assert "model.safetensors: " in printed
    assert "How it was made" not in printed  # the plan of a bare checkpoint is not known


def test_what_is_not_pushed(run: Path, reports: list[str], save_tiny, tmp_path: Path) -> None:
    copy = preprocess(save_tiny("model"), state=tmp_path / "s", out=tmp_path / "c").copies[0]
    with pytest.raises(PlanError, match="published copy"):
        push(copy, "owner/name", dry_run=True)
    with pytest.raises(PlanError, match="OWNER/NAME"):
        push(run, "name", dry_run=True)
    with pytest.raises(FileError, match="has no metrics"):
        push(run, "owner/name", evaluation=[reports[3]], dry_run=True)
    with pytest.raises(FileError, match="no figures"):
        push(run, "owner/name", audit=[run / "client" / "plan.json"], dry_run=True)
    (run / "final").rename(run / "not-final")
    with pytest.raises(FileError, match="not complete"):
        push(run, "owner/name", dry_run=True)


def test_names_from_files_cannot_write_the_card(run: Path, tmp_path: Path) -> None:
    text = "forget this: Una Vale lives in Turin.\n\n| injected |"
    metrics = {text: 1.0, "fine": 0.5, "nan": None, "flag": True}
    (tmp_path / "e.json").write_text(json.dumps({"metrics": metrics, "provenance": {"benchmark": text}}))
    card = push(run, "o/n", evaluation=[tmp_path / "e.json"], record="1`|2", dry_run=True).card
    assert "Una Vale" not in card
    assert "| fine | 0.5 |" in card
    assert "`1 2`" in card
