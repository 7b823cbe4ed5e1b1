"""The table of the benchmark of common noise, that its arms exist, and the small world of real text."""

import json
from pathlib import Path

import pytest

from disclosure import probability
from disclosure_arms import ARMS
from disclosure_tables import HEADER, figure, table
from mpunlearn.demo.models import trained_world
from mpunlearn.demo.table import measure_in
from mpunlearn.demo.world import Recipe
from tofu_small import QUESTIONS_PER_AUTHOR
from tofu_world import tofu_world

NUMBERS = [
    ("toy", "npo", "noise-free", 0, 0.0, 0.0, 0.0, 0.1, 0.9),
    ("toy", "npo", "noise-free", 1, 0.0, 0.0, 0.0, 0.2, 0.8),
    ("toy", "npo", "lean", 0, 0.1, 0.09, 0.3, 0.11, 0.88),
    ("toy", "npo", "lean", 1, 0.1, 0.11, 0.5, 0.17, 0.8),
    ("tofu", "npo", "lean", 0, 0.1, 0.11, 0.5, 0.17, 0.8),
]
ROWS = [dict(zip(HEADER, map(str, row), strict=True)) for row in NUMBERS]


def test_the_deviation_is_that_from_noise_free_at_the_same_seed() -> None:
    *_, last = table(ROWS).splitlines()  # a row without a reference is left out
    assert last == "| toy | lean | 10.0% | 10.0% | 40.0% | 1.5 (0.140, 0.840) | 2 |"


def test_the_figure_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        figure(ROWS, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_presets_are_calibrated_and_unlearn_as_long_as_noise_free() -> None:
    arms = {name: make() for name, make in ARMS.items()}
    assert {name for name, arm in arms.items() if arm.perturbation.common_noise == "auto"} == {
        "hardened",
        "lean",
        "lean, η 1.1, 12 epochs",
    }
    assert arms["lean"].rounds * arms["lean"].epochs == arms["noise-free"].rounds * arms["noise-free"].epochs


def test_the_probability_is_that_of_the_evaluation() -> None:
    world = trained_world(0)
    expected = measure_in(world, "", world.original)
    assert probability(world.original, world.data("retain")) == pytest.approx(expected.retain.probability, abs=1e-5)


def test_the_world_of_real_text_splits_by_author_and_is_cached(tmp_path: Path) -> None:
    tofu = tmp_path / "tofu"
    tofu.mkdir()
    count = 4 * QUESTIONS_PER_AUTHOR
    rows = [{"question": f"Who is author {i // 20}, part {i}?", "answer": f"A writer {i}."} for i in range(count)]
    (tofu / "full.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe(
        authors=2, forgotten=1, public=2, vocabulary=300, hidden=16, ffn=16, base_epochs=1, epochs=1, layers=1
    )
    world = tofu_world(tofu, 0, recipe, tmp_path / "cache")
    authors = {
        split: {json.loads(line)["question"].split(",")[0] for line in world.data(split).read_text().splitlines()}
        for split in ("forget", "retain", "public")
    }
    assert [len(names) for names in authors.values()] == [1, 1, 2]
    assert len(set.union(*authors.values())) == 4
    made = world.original.stat().st_mtime_ns
    assert tofu_world(tofu, 0, recipe, tmp_path / "cache").original.stat().st_mtime_ns == made
