"""The comparison of objectives: its search, its tables, and one cell of it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import unlearning_worlds
from mpunlearn.demo import models
from mpunlearn.demo.world import QUICK_RECIPE, Recipe
from mpunlearn.lm.records import Record
from objectives import BUDGET, FIRST, FREE, GAMMAS, RATES, append, best, cell, proposals, rows_of
from objectives_tables import lasting, ranking, report
from unlearning_worlds import OutOfTime, Scale, demo_world, fit


def row(objective: str, arm: str, seed: int, overall: float, **others: float) -> dict:
    measured = dict.fromkeys(
        ("memorization", "privacy", "utility", "uds", "leak", "R", "Q", "relearned", "relearned_elsewhere", "seconds"),
        0.5,
    )
    key = {"world": "demo", "objective": objective, "arm": arm, "seed": seed, "rate": 1e-3, "gamma": 1.0}
    return {**key, **measured, "overall": overall, **others}


def test_the_search_covers_the_range_and_then_the_neighborhood_of_the_best_pair() -> None:
    first = proposals("npo", [])
    assert len(set(first)) == FIRST
    assert all(RATES[0] <= rate <= RATES[1] and GAMMAS[0] <= gamma <= GAMMAS[1] for rate, gamma in first)
    done = [
        {**row("npo", FREE, 0, overall=float(pair == first[3])), "rate": pair[0], "gamma": pair[1]} for pair in first
    ]
    assert proposals("npo", done[:-1]) == first
    near = proposals("npo", done)
    assert near[:FIRST] == first
    assert len(near) == BUDGET
    for rate, _ in near[FIRST:]:
        assert abs(np.log(rate / first[3][0])) <= np.log(RATES[1] / RATES[0]) / 8 + 1e-2
    assert {gamma for _, gamma in proposals("grad-ascent", [])} == {1.0}


def test_without_an_overall_score_the_parts_decide() -> None:
    rows = [row("npo", FREE, 0, overall) for overall in (0.0, float("nan"))]
    rows.append(row("npo", FREE, 0, 0.0, memorization=0.6))
    assert best(rows) is rows[-1]
    rows.append(row("npo", FREE, 0, 0.1, memorization=0.0))
    assert best(rows) is rows[-1]


def test_rows_survive_the_file_and_objectives_are_sorted(tmp_path: Path) -> None:
    rows = [row("npo", arm, seed, 0.5 + 0.1 * seed) for arm in (FREE, "paper") for seed in (1, 2)]
    rows += [row("simnpo", FREE, seed, 0.9) for seed in (1, 2)]
    for each in rows:
        append(tmp_path / "results.csv", each)
    assert rows_of(tmp_path / "results.csv") == rows
    assert rows_of(tmp_path / "results.csv", "tofu-20") == []
    lines = ranking(rows).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["simnpo", "npo", "npo"]
    # Two seeds, .6 and .7: the half width of the interval is t(.975, 1) * .0707 / sqrt(2) = 12.706 * .05.
    assert "0.650 ± 0.635" in lines[1]


def test_mpu_is_compared_with_noise_free_seed_by_seed() -> None:
    rows = [row("npo", FREE, seed, 0.5, relearned=seed / 10) for seed in (1, 2, 3)]
    rows += [row("npo", "paper", seed, 0.5, relearned=seed / 10 - 0.05) for seed in (1, 2)]
    (line,) = lasting(rows).splitlines()[2:]
    assert "| npo | paper | 2 | -0.050 ± 0.000 |" in line


@pytest.mark.slow
def test_a_cell_unlearns_and_measures_everything(tmp_path: Path) -> None:
    world = partial(demo_world, folder=tmp_path, recipe=QUICK_RECIPE)
    assert "wrong_answer" in json.loads(world(0).training("forget").read_text().splitlines()[0])
    evaluated = [json.loads(line) for line in world(0).data("forget").read_text().splitlines()]
    trained = [json.loads(line) for line in world(0).training("forget").read_text().splitlines()]
    assert all(a["wrong_answer"] not in b["perturbed_answer"] for a, b in zip(trained, evaluated, strict=True))
    found = cell(world, "npo", FREE, 1e-3, 0.1, 0, tmp_path, deep=True)
    assert found["forget_prob"] < 0.5 < found["retain_prob"]
    assert all(np.isfinite(value) for name, value in found.items() if name not in ("world", "objective", "arm"))
    assert cell(world, "", "original", 0.0, 0.0, 0, tmp_path, deep=False)["forget_prob"] > 0.9


def test_training_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Record(f"Who is number {number}?", f"It is {number * 7}.") for number in range(12)]
    tokenizer = models.train_tokenizer([record.answer for record in records], 300)
    scale = Scale(1, 1, Recipe(hidden=16, ffn=32, heads=2, groups=1, epochs=3, batch=4, learning_rate=1e-2))

    def weights(deadlines: list[float]) -> torch.Tensor:
        torch.manual_seed(0)
        llama = models.new_llama(tokenizer, scale.recipe)
        for deadline in deadlines[:-1]:
            clock = iter(np.arange(100.0))
            monkeypatch.setattr(unlearning_worlds.time, "monotonic", lambda clock=clock: float(next(clock)))
            with pytest.raises(OutOfTime, match="stopped after"):
                fit(llama, tokenizer, records, scale, 0, tmp_path / "state.pt", deadline, "model")
            monkeypatch.undo()
            llama = models.new_llama(tokenizer, scale.recipe)
        fit(llama, tokenizer, records, scale, 0, tmp_path / "state.pt", deadlines[-1], "model")
        assert not (tmp_path / "state.pt").exists()
        return torch.cat([parameter.detach().flatten() for parameter in llama.parameters()])

    at_once = weights([float("inf")])
    assert torch.equal(weights([1.0, float("inf")]), at_once)


def test_the_documentation_shows_the_rows_that_are_in_the_repository() -> None:
    docs = Path(__file__).parents[2] / "docs"
    folder = docs / "objectives"
    shown = (docs / "objectives.md").read_text(encoding="utf-8")
    assert report(rows_of(folder / "search.csv"), rows_of(folder / "results.csv")) in shown
