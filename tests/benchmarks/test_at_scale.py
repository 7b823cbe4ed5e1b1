"""The script at scale goes on where it stopped."""

from pathlib import Path

import at_scale
from at_scale import ARMS, OBJECTIVES, RATES, steps
from objectives import FREE, ORIGINAL, RETRAINED, append
from unlearning_worlds import World

MEASURED = dict.fromkeys(("overall", "memorization", "privacy", "utility"), 0.5)


def row(objective: str, arm: str, rate: float) -> dict:
    return {"world": "tofu", "objective": objective, "arm": arm, "seed": 0, "rate": rate, "gamma": 1.0, **MEASURED}


def test_only_what_is_missing_is_done(tmp_path: Path, monkeypatch) -> None:
    done: list[tuple[str, str, float]] = []

    def measured(world, objective, arm, rate, seed, work, deep=True) -> dict:
        done.append((objective, arm, rate))
        return {**row(objective, arm, rate), "overall": rate}  # so that the highest rate is the best

    def reference(world, arm, seed, work) -> dict:
        done.append(("", arm, 0.0))
        return row("", arm, 0.0)

    monkeypatch.setattr(at_scale, "measured", measured)
    monkeypatch.setattr(at_scale, "reference", reference)
    world = World(tmp_path / "world", "tofu")
    append(tmp_path / "search.csv", {**row("npo", FREE, RATES[0]), "overall": 0.0})
    append(tmp_path / "results.csv", row("simnpo", "paper", RATES[-1]))
    for _ in range(100):  # each call of the script begins anew
        if (step := next(steps(world, 0, True, tmp_path), None)) is None:
            break
        step()
    searched = [(objective, FREE, rate) for objective in OBJECTIVES for rate in RATES]
    compared = [(objective, arm, RATES[-1]) for objective in OBJECTIVES for arm in ARMS]
    searched.remove(("npo", FREE, RATES[0]))
    compared.remove(("simnpo", "paper", RATES[-1]))
    assert done == [("", ORIGINAL, 0.0), ("", RETRAINED, 0.0), *searched, *compared]
