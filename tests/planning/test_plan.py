"""`plan`: the recommendations, the options that it writes, and its measurement."""

import csv
import itertools
import json
import os
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mpunlearn import Data, Perturbation, Resources, Training
from mpunlearn.cli import VERBS, main
from mpunlearn.errors import DataError, FileError, PlanError
from mpunlearn.options import parse
from mpunlearn.planning import cut
from mpunlearn.planning.plan import applied, plan, run_yaml
from mpunlearn.planning.recommended import CLASSES, TABLE, recommendation, size_class, table
from mpunlearn.protocol.objectives import ObjectiveName

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def given(save_tiny, examples, tmp_path: Path) -> dict:
    """The arguments of `plan` for a tiny model."""
    return {
        "checkpoint": save_tiny(),
        "forget": examples[0],
        "retain": examples[1],
        "out": tmp_path / "run.yaml",
        "seconds": 1.0,
    }


def accepted(verb: str, file: Path, *arguments: str) -> dict:
    """What a command's function gets from a configuration file."""
    parsed = parse(f"mpunlearn {verb}", VERBS[verb].function(verb), [*arguments, "--config", str(file)])
    assert parsed is not None
    return parsed[0]


def test_every_objective_has_one_recommendation_for_each_size() -> None:
    pairs = [(row.objective, row.size) for row in TABLE]
    assert sorted(pairs) == sorted(itertools.product(get_args(ObjectiveName), CLASSES))
    for row in TABLE:
        training = applied(row, Training(row.objective), 5, 16)
        assert (training.learning_rate, training.batch_size) == (row.learning_rate, row.batch_size)
        assert 5 * training.epochs >= row.epochs > 5 * (training.epochs - 1)
        assert row.source


def test_the_size_classes() -> None:
    assert [size_class(int(number)) for number in (1e5, 49e6, 50e6, 1.24e9, 3.2e9, 8e9)] == [
        "tiny", "tiny", "small", "small", "small", "large",
    ]  # fmt: skip


def test_the_tiny_rows_are_the_best_of_the_sweep() -> None:
    from hyperparameters import best, report

    with (DOCS / "hyperparameters.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {row["objective"]: row for row in best(rows)}
    assert report(rows) in (DOCS / "hyperparameters.md").read_text()
    for row in TABLE:
        if row.size == "tiny":
            assert row.learning_rate == found[row.objective]["learning_rate"], row.objective
            assert row.others.get("gamma", 1.0) == found[row.objective]["gamma"], row.objective


def test_the_documentation_has_the_same_table() -> None:
    assert table() in (DOCS / "hyperparameters.md").read_text()


def test_what_was_given_counts_more_than_what_is_recommended() -> None:
    advice = recommendation("npo", 1_240_000_000)
    training = Training("npo", learning_rate=2e-4, epochs=7, parameters={"beta": 0.5})
    chosen = applied(advice, training, 5, 16)
    assert (chosen.learning_rate, chosen.epochs, chosen.parameters["beta"]) == (2e-4, 7, 0.5)
    assert (chosen.batch_size, chosen.alpha) == (advice.batch_size, 1.0)
    assert applied(advice, Training("npo"), 1, 16).epochs == 10
    assert applied(recommendation("rmu", 10**9), Training("rmu"), 5, 4).parameters["layer"] == 2


def test_the_options_are_accepted_by_both_ways_to_run(given) -> None:
    training = Training("simnpo", lora_rank=2, parameters={"delta": 0.5})
    perturbation = Perturbation(copies=2, alphas=(1.0, 2.0))
    result = plan(**given, rounds=3, training=training, perturbation=perturbation)
    by_run = accepted("run", given["out"], "m", "--forget", "f", "--out", "o")
    by_server = accepted("server start", given["out"], "m", "--run", "r")
    for arguments in (by_run, by_server):
        assert arguments["rounds"] == 3
        assert arguments["perturbation"] == perturbation
        assert arguments["training"] == applied(recommendation("simnpo", result.parameters), training, 3, 2)
    assert given["out"].read_text().count(recommendation("simnpo", result.parameters).source) == 1


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.objective}-{row.size}")
def test_every_recommendation_is_accepted_as_a_file(tmp_path: Path, row) -> None:
    training = applied(row, Training(row.objective), 5, 16)
    (tmp_path / "run.yaml").write_text(run_yaml(5, Perturbation(), training, row))
    for verb, arguments in (("run", ("m", "--forget", "f", "--out", "o")), ("server start", ("m", "--run", "r"))):
        assert accepted(verb, tmp_path / "run.yaml", *arguments)["training"] == training


def test_a_preset_and_the_programs_own_defaults(given, capsys) -> None:
    data = ["--forget", str(given["forget"]), "--retain", str(given["retain"]), "--out", str(given["out"])]
    arguments = ["plan", str(given["checkpoint"]), *data, "--preset", "lean", "--no-recommended", "--seconds", "0"]
    assert main(arguments) == 0
    written = yaml.safe_load(given["out"].read_text())
    assert (written["copies"], written["rounds"], written["epochs"]) == (1, 1, 10)
    assert written["learning_rate"] == Training().learning_rate
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "mpunlearn run" in printed
    assert main(arguments) == 2  # the file exists


def test_the_plan_of_a_real_run(given, tmp_path: Path) -> None:
    """Steps and sizes are those of the run, and measuring leaves nothing behind."""
    from mpunlearn import run

    before = sorted(tmp_path.iterdir())
    result = plan(**given, rounds=2, training=Training("npo", epochs=3, batch_size=4))
    assert sorted(tmp_path.iterdir()) == sorted([*before, given["out"]])
    assert not list(Path(os.environ["XDG_DATA_HOME"]).rglob("*"))
    assert result.minutes is not None
    assert result.minutes.total > 0
    assert result.minutes.measured_on == ""
    arguments = accepted("run", given["out"], "m", "--forget", "f", "--out", "o")
    chosen = {name: arguments[name] for name in ("rounds", "perturbation", "training")}
    run(
        given["checkpoint"],
        forget=given["forget"],
        retain=given["retain"],
        out=tmp_path / "run",
        keep_exchange=True,
        **chosen,
    )
    losses = [json.loads(line) for line in (tmp_path / "run/client/memory/losses.jsonl").read_text().splitlines()]
    assert len(losses) == 2 * result.copies
    assert {len(line["forget_loss"]) for line in losses} == {result.steps}
    for kind, expected in (("copies", result.down_bytes), ("updates", result.up_bytes)):
        files = (tmp_path / "run" / "exchange" / "round-2" / kind).rglob("*")
        written = sum(file.stat().st_size for file in files if file.is_file() and file.name != "event.json")
        assert expected == pytest.approx(written, rel=0.01), kind


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("objective", ["npo", "rmu"])
def test_a_model_that_is_too_large_to_be_timed_itself(
    given, save_tiny, monkeypatch, family: str, objective: str
) -> None:
    monkeypatch.setattr(cut, "ENTRIES", 20_000)
    monkeypatch.setattr(cut, "VOCABULARY", 64)
    model = save_tiny("large", family, num_hidden_layers=5, hidden_size=64, intermediate_size=192)
    training = Training(objective, parameters={"layer": 3} if objective == "rmu" else {})
    result = plan(**{**given, "checkpoint": model}, clients=2, training=training)
    assert result.minutes is not None
    assert "2 of 5 layers, 64 tokens" in result.minutes.measured_on
    assert ("experts" in result.minutes.measured_on) == (family == "mixtral")
    assert 0 < result.minutes.total < 60
    assert "server start" in result.text()


def test_objectives_that_need_more_of_the_data_and_of_the_machine(given, examples) -> None:
    # The reference model of undial with LoRA is the model without its adapters in round 1, and a model of its own later.
    for objective, options, rounds, second_model in (
        ("dpo", {}, 2, False),
        ("undial", {"lora_rank": 2}, 1, False),
        ("undial", {"lora_rank": 2}, 2, True),
        ("npo", {"retain_loss": "kl", "train": "blocks"}, 1, True),
        ("ngdiff", {}, 2, False),
    ):
        given["out"].unlink(missing_ok=True)
        resources = Resources(micro_batch_size=2, gradient_checkpointing=True)
        training = Training(objective, **options)
        result = plan(**given, rounds=rounds, training=training, resources=resources, data=Data())
        assert result.minutes is not None
        assert (result.training_parts.reference > 0) == second_model


def test_what_cannot_be_planned(given, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--retain"):
        plan(**{**given, "retain": None})
    with pytest.raises(PlanError, match="--rounds"):
        plan(**given, rounds=0)
    with pytest.raises(FileError):
        plan(**{**given, "checkpoint": tmp_path})
    assert not given["out"].exists()
    given["out"].write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        plan(**given)
    assert given["out"].read_text() == "mine"
