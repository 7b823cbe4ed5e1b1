"""What two models tell about forgotten texts: found where something was forgotten, and only there."""

import json
from pathlib import Path

import pytest
import torch

from mpunlearn.audit.extract import extract, searched
from mpunlearn.audit.sampling import sample
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record

RECIPE = Recipe(hidden=64, ffn=128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """A model that knows 24 plain texts, one that never saw 6 of them, and these texts."""
    folder = tmp_path_factory.mktemp("extract")
    rows = generate_rows(0, RECIPE)
    texts = [f"{row['question']} {row['answer']}" for row in rows["forget"][:6] + rows["retain"][:18]]
    tokenizer = models.tokenizer_of(rows, RECIPE)
    paths = {}
    for name, known in (("before", texts), ("after", texts[6:])):
        torch.manual_seed(0)
        model = models.new_llama(tokenizer, RECIPE)
        models.fit(model, tokenizer, [Record(None, text) for text in known], 60, 8, 3e-3, 0, name)
        models.save(model, tokenizer, folder / name)
        paths[name] = folder / name
    for name, part in (("forget", texts[:6]), ("reference", texts[6:])):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return paths


def test_forgotten_texts_are_found_without_candidates_and_others_are_not(trained: dict[str, Path]) -> None:
    data = {"forget": trained["forget"], "reference": trained["reference"], "samples": 300}
    found = extract(trained["before"], trained["after"], **data)
    assert found.candidates.metrics()["floor-auc"] > 0.95
    for of in found.sampled.values():
        assert of.found >= 4
        assert of.found_first >= 2
        assert of.auc > 0.75
    assert "of 6" in found.text()
    control = extract(trained["after"], trained["before"], **data)  # the first model has nothing to tell
    assert all(of.found == 0 for of in control.sampled.values())
    with pytest.raises(PlanError, match="--samples"):
        extract(trained["before"], trained["after"], **{**data, "samples": 0})


def test_guidance_turns_away_from_what_the_unlearned_model_says(trained: dict[str, Path]) -> None:
    before, tokenizer = load(trained["before"])
    after, _ = load(trained["after"])
    texts = [json.loads(line)["text"] for line in trained["forget"].read_text().splitlines()]
    prompts = [tokenizer(texts[0])["input_ids"][:1]] * 200
    shares = []
    for guidance in (0.0, 2.0):
        drawn = sample(before, after, prompts, 64, guidance, seed=0)
        shares.append(sum(any(text in tokenizer.decode(ids) for text in texts) for ids in drawn))
    assert shares[1] > 1.5 * shares[0] > 0


def test_texts_are_searched_in_the_order_of_suspicion() -> None:
    of = searched(
        ["a secret  one", "noise", "noise", "noise", "noise", "secret two", "noise"], ["secret one", "secret two"]
    )
    assert (of.found, of.found_first, of.distinct) == (2, 1, 7)
    assert of.auc == pytest.approx(0.6)
    assert searched(["noise"], ["secret"]).auc is None
