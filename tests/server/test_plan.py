"""The plan of a run: what is refused, and what a run that was started says to other options."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpunlearn.errors import MPUError, PlanError
from mpunlearn.protocol.plan import Training
from mpunlearn.server.federation import Federation
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.plan import RunPlan, Service


def test_impossible_federations_are_refused() -> None:
    for options, why in (
        ({"clients": 0}, "--clients"),
        ({"assign": "some"}, "--assign"),
        ({"deadline": 0.0}, "--deadline"),
        ({"clients": 2, "quorum": 3}, "--quorum"),
        ({"clients": 2, "quorum": 1, "assign": "one"}, "--quorum"),
        ({"clients": 2, "weights": (1.0,)}, "--weights"),
        ({"clients": 2, "weights": (1.0, -1.0)}, "--weights"),
        ({"clients": 2, "weights": (1.0, 1.0), "assign": "one"}, "--weights"),
    ):
        with pytest.raises(PlanError, match=why):
            Federation(**options)


def plan(**changes: Any) -> RunPlan:
    service = Service("127.0.0.1", 9100, "127.0.0.1", federation=Federation(clients=2, quorum=1))
    return RunPlan(**{"checkpoint": "/model", "rounds": 3, "service": service, **changes})


def test_a_plan_is_pinned_once_and_every_change_is_named_with_both_values(tmp_path: Path) -> None:
    file = tmp_path / "run" / "plan.json"
    pinned = plan(
        perturbation=Perturbation(copies=4, alphas=(1.0, 1.5, 2.0, 3.0)),
        training=Training("npo", parameters={"beta": 0.2}),
    )
    pinned.pin(file)
    assert file.parent.stat().st_mode & 0o777 == 0o700
    pinned.pin(file)
    assert RunPlan.read(file) == pinned
    other = plan(rounds=4, training=Training("simnpo", learning_rate=1e-4))
    with pytest.raises(PlanError) as caught:
        other.pin(file)
    for change in (
        "--rounds 3, not 4",
        "--objective npo, not simnpo",
        "--learning-rate 1e-05, not 0.0001",
        "--alphas 1.0,1.5,2.0,3.0, not (none)",
        "--copies 4, not 3",
        "--beta 0.2, not (none)",
    ):
        assert change in str(caught.value)
    assert "--epochs" not in str(caught.value)
    assert RunPlan.read(file) == pinned


def test_a_field_that_an_older_plan_lacks_has_its_default(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan().pin(file)
    content = json.loads(file.read_text())
    for part, name in ((content, "eta"), (content["training"], "scheduler"), (content["perturbation"], "noise_floor")):
        part.pop(name)
    file.write_text(json.dumps(content))
    assert RunPlan.read(file) == plan()
    plan().pin(file)


def test_a_run_of_a_version_that_trained_token_local_weights_goes_on_with_them(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan().pin(file)
    content = json.loads(file.read_text())
    del content["training"]["token_local"]
    file.write_text(json.dumps(content))
    assert RunPlan.read(file).training.token_local
    assert plan().continuing(file) == RunPlan.read(file)
    plan().continuing(file).pin(file)
    with pytest.raises(PlanError, match="--token-local True, not False"):
        plan().pin(file)


def test_a_run_of_a_version_without_common_noise_goes_on_without(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan().pin(file)
    content = json.loads(file.read_text())
    assert content["perturbation"].pop("common_noise") == "auto"
    file.write_text(json.dumps({**content, "format": 2}))
    assert RunPlan.read(file).perturbation.common_noise == 0
    plan().continuing(file).pin(file)
    with pytest.raises(PlanError, match="--common-noise 0.0, not auto"):
        plan().pin(file)


def test_a_run_of_this_version_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert plan().continuing(file) == plan()
    plan(training=Training(token_local=True)).pin(file)
    assert plan().continuing(file) == plan()


def test_plans_of_format_1_are_read(tmp_path: Path) -> None:
    """0.1.0 kept the fields of the service beside the others."""
    new = json.loads(json.dumps(dataclasses.asdict(plan())))
    old = {**new, **new["service"]}
    old.pop("service")
    old.pop("format")
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert RunPlan.read(tmp_path / "plan.json") == plan()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"format": 4}, "upgrade mpunlearn"),
        ({"format": 2}, "missing field 'checkpoint'"),
        ({"format": 2, "checkpoint": "m", "round": 3}, "unknown field 'round'"),
        ({"format": 2, "checkpoint": "m", "rounds": "3"}, "RunPlan.rounds: expected an integer, found '3'"),
        ({"format": 2, "checkpoint": "m", "training": {"epochs": 1.5}}, "epochs: expected an integer"),
    ],
)
def test_what_is_no_plan_is_named(tmp_path: Path, content: dict, why: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(MPUError, match=why):
        RunPlan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Training(epochs="3"), "--epochs: expected an integer, found '3'"),
        (lambda: Training(objective="npoo"), "--objective: expected one of grad-ascent, .*, found 'npoo'"),
        (lambda: Training(seed=-1), "--seed: expected a number of at least 0, found -1"),
        (lambda: Training(seed=1 << 32), "below 2"),
        (lambda: Training(learning_rate=-1e-3), "--learning-rate: expected a number of at least 0, found -0.001"),
        (lambda: Training(learning_rate=float("nan")), "--learning-rate: expected a finite number"),
        (lambda: Training(parameters={"beta": "x"}), "--beta: expected a number, found 'x'"),
        (lambda: Training(parameters={"layer": 1.0}), "--layer: not a hyperparameter of npo, which has --beta"),
        (lambda: Training(gamma=True), "--gamma: expected a number, found True"),
        (lambda: Perturbation(kappa=1e6), "--kappa"),
        (lambda: Perturbation(kappa=-1), "--kappa"),
        (lambda: Perturbation(copies="3"), "--copies: expected an integer, found '3'"),
        (lambda: Perturbation(reparameterization="half"), "--reparameterization: expected one of full, paper, none"),
        (lambda: plan(eta=-1.0), "--eta"),
        (lambda: plan(eta=0.0), "--eta"),
        (lambda: plan(rounds=0), "--rounds"),
        (lambda: Federation(store=3), "--store: expected a string"),
    ],
)
def test_options_of_wrong_types_or_sizes_are_named(build: Callable[[], object], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        build()
