"""The arithmetic of the claim's tables, against a slow second one, and one run through the whole of it."""

import csv
import json
from pathlib import Path

import pytest
from scipy import stats

import claim
from claim import rows_of
from claim_arms import FREE, NOISE_FREE, RETRAINED, SUITES, Arm
from claim_tables import SCORES, differences, table


def row(objective: str, seed: int, arm: str, value: float, weights: float = 0.5) -> dict:
    return {"objective": objective, "seed": float(seed), "arm": arm, **dict.fromkeys(SCORES, value), "weights": weights}


def test_differences_are_paired_by_seed() -> None:
    arms = [Arm(FREE, {}), Arm("mpu", {})]
    free, mpu = [0.8, 0.9, 0.7], [0.84, 0.9, 0.68]
    rows = [row("npo", s, FREE, v) for s, v in enumerate(free)] + [row("npo", s, "mpu", v) for s, v in enumerate(mpu)]
    rows += [row("npo", 9, "mpu", 0.1), row("dpo", 0, "mpu", 0.1)]  # nothing to compare with
    found = differences(rows, arms)
    assert set(found) == {("npo", "mpu")}
    change = [100 * (m - f) / 0.8 for m, f in zip(mpu, free, strict=True)]
    mine = found["npo", "mpu"]
    assert mine.seeds == 3
    assert mine.mean == pytest.approx(sum(change) / 3)
    low, high = stats.t.interval(0.95, 2, loc=sum(change) / 3, scale=stats.sem(change))
    assert mine.interval == pytest.approx((high - low) / 2)
    assert mine.absolute == pytest.approx((4 + 0 + 2) / 3)
    assert "| mpu |" in table(found, arms)


def test_every_arm_is_compared_with_one_that_is_there() -> None:
    for suite in SUITES.values():
        arms = suite()
        names = [arm.name for arm in arms]
        assert len(set(names)) == len(names)
        assert all(arm.baseline in names for arm in arms)
        assert all(claim.EPOCHS % arm.rounds == 0 for arm in arms)


@pytest.mark.slow
def test_rows_are_kept_and_not_computed_again(tmp_path: Path, monkeypatch) -> None:
    arms = [Arm(FREE, NOISE_FREE, rounds=1), Arm("mpu", {"copies": 2, "kappa": 0.05}, base=True, rounds=1)]
    monkeypatch.setitem(SUITES, "small", lambda: arms)
    row_of = claim.one(claim.Source(), "grad-diff", 0, arms[0], str(tmp_path / "none"), str(tmp_path / "free"))
    mine = claim.one(claim.Source(), "grad-diff", 0, arms[1], str(tmp_path / "free"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert row_of["weights"] == 0
    assert 0 < mine["weights"] < 1.5
    assert all(0 <= mine[score] <= 1 for score in SCORES)
    file = tmp_path / "small.csv"
    for each in (row_of, mine):
        claim.append(file, each)
    kept = rows_of(file)
    assert json.dumps(kept[1]) == json.dumps({**mine, "seed": 0.0})
    claim.compute("small", ["grad-diff"], 1, tmp_path, claim.Source())
    with open(file, newline="") as lines:
        assert len(list(csv.DictReader(lines))) == 2


@pytest.mark.slow
def test_any_checkpoint_and_data_and_other_batches_for_each_copy(tmp_path: Path) -> None:
    world = claim.models.trained_world(0)
    folder = str(world.path / "data")
    source = claim.Source(model=world.original, benchmark=folder, learning_rate=1e-3, batch_size=8, max_new_tokens=48)
    assert not any(arm.base or arm.name == RETRAINED for arm in claim.arms_of("claim", source))
    free = tmp_path / "free"
    claim.one(source, "npo", 0, Arm(FREE, NOISE_FREE, rounds=1), "none", str(free))
    no_noise = {"copies": 2, "kappa": 0.0, "reparameterization": "none"}
    weights = [
        claim.one(source, "npo", 0, Arm("mine", no_noise, rounds=1, own_batches=own), str(free), "unused")["weights"]
        for own in (False, True)
    ]
    assert weights[0] < 1e-3 < 0.1 < weights[1]
    with pytest.raises(SystemExit, match="--retrained"):
        claim.one(source, "npo", 0, Arm(RETRAINED, {}), str(free), "unused")
