"""The embedded benchmark: what its data promise, and that its models know what they should."""

import json
from pathlib import Path

import pytest
from markupsafe import escape

from mpunlearn.audit.report import ONE
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.demo import models
from mpunlearn.demo.local import demo, learned
from mpunlearn.demo.world import SPLITS, Recipe, generate_rows
from mpunlearn.lm.records import read_records

RECIPE = Recipe()


@pytest.mark.parametrize("seed", range(3))
def test_the_world_is_in_tofus_format_and_its_splits_are_apart(seed: int) -> None:
    rows = generate_rows(seed, RECIPE)
    assert {split: len(rows[split]) for split in SPLITS} == {
        "forget": 40,
        "retain": 360,
        "real_authors": 200,
        "world_facts": 30,
        "holdout": 40,
    }
    questions = [row["question"] for split in SPLITS for row in rows[split]]
    assert len(set(questions)) == len(questions)
    for row in (row for split in SPLITS for row in rows[split]):
        assert row["answer"] != row["paraphrased_answer"]
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
        assert {row["answer"], row["paraphrased_answer"]} <= set(row["all_answers"])
    assert rows == generate_rows(seed, RECIPE)
    assert rows != generate_rows(seed + 1, RECIPE)


def test_the_tokenizer_is_small_and_gives_every_text_back() -> None:
    rows = generate_rows(0, RECIPE)
    tokenizer = models.tokenizer_of(rows, RECIPE)
    assert len(tokenizer) <= RECIPE.vocabulary
    for row in rows["retain"]:
        assert tokenizer.decode(tokenizer(row["answer"])["input_ids"]) == row["answer"]


def test_a_killed_preparation_leaves_no_world(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.trained_world(0, cache=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # a lock file stays


@pytest.mark.slow
def test_the_demonstration_shows_what_it_should(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo(out=out)
    assert json.loads((out / "result.json").read_text()) == result.to_json()
    assert sorted(path.name for path in out.iterdir()) == [
        "client", "evaluations", "exchange", "final", "report-client.html", "report-server.html", "result.json", "server",
    ]  # fmt: skip
    original, retrained, noise_free, paper, lean, hardened = result.models
    # The original knows everything; the retrained model everything but the forget set.
    assert min(original.forget.probability, original.retain.probability) > 0.95
    assert retrained.forget.probability < 0.1
    assert retrained.retain.probability > 0.95
    # Unlearning brings forget close to retrained and keeps retain close to original, MPU as well as without noise.
    for line in (noise_free, paper, lean, hardened):
        assert line.forget.probability < 0.1
        assert line.forget.rouge_l < 0.5
        assert line.retain.probability > 0.88
        assert abs(line.forget.probability - noise_free.forget.probability) < 0.06
        assert line.retain.probability - noise_free.retain.probability > -0.05
    # Whoever holds all copies has the model, unless there is common noise: then the announced floor remains.
    assert original.left is retrained.left is None
    assert noise_free.left < 1e-6
    assert paper.left < 1e-3
    assert result.audit.holds
    assert result.audit.trusted
    assert result.audit.floor > 0.05
    assert 0.8 * result.audit.floor < lean.left < 1.1 * result.audit.floor
    assert hardened.left == result.audit.attacks[result.audit.strongest].error
    assert result.audit.behaviors[ONE].probability > 0.9
    assert "| MPU, hardened |" in result.text()
    assert learned(result.audit) in result.text()
    # The report is about the hardened run, and has the figure over rounds; only the client's page quotes texts.
    assert result.pages == {party: str(out / f"report-{party}.html") for party in ("server", "client")}
    assert all(page in result.text() for page in result.pages.values())
    server, client = ((out / f"report-{party}.html").read_text() for party in ("server", "client"))
    for label in ("MPU, this run", "noise-free", "single copy"):
        assert f"{label}: from {original.forget.probability:.3f} (round 0) to " in server
    assert f"retrained model: {retrained.forget.probability:.3f}." in server
    world = models.trained_world(0)
    questions = [json.loads(line)["question"] for line in world.data("forget").read_text().splitlines()]
    assert sum(escape(question) in client for question in questions) == 4
    assert not any(escape(question) in server for question in questions)
    assert sorted(path.name for path in (out / "server").iterdir()) == [
        "audit.json",
        "identity.key",
        "plan.json",
        "state",
    ]
    assert set(Checkpoint(out / "final").tensors) == set(Checkpoint(world.original).tensors)
    assert len(read_records(world.data("forget"))) == 40
