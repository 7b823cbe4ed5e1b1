"""A classifier's judgment of answers becomes a metric and a part of utility."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.evaluation import composite
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.evaluation.fluency import fluency_judge
from mpunlearn.lm.model import load_tokenizer


@pytest.fixture
def classifier(save_tiny, tmp_path: Path) -> Path:
    """A random classifier with three classes."""
    tokenizer = load_tokenizer(save_tiny())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "noise", 1: "Clean", 2: "word salad"}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), id2label=labels, pad_token_id=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_the_judgment_is_the_probability_of_the_class_clean(classifier: Path) -> None:
    judge = fluency_judge(classifier, "cpu")
    model = transformers.BertForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = load_tokenizer(classifier)
    texts = ["Ada was born in Lyon.", "born born born", "Ada " * 99]
    for text, found in zip(texts, judge(texts), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        assert found == pytest.approx(model(ids).logits.softmax(-1)[0, 1].item(), rel=1e-4)


def test_fluency_is_measured_and_becomes_a_part_of_utility(classifier: Path, tmp_path: Path) -> None:
    rows = generate_rows(0, Recipe())["forget"][:3]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"benchmark": str(tmp_path), "cache": tmp_path / "cache", "max_new_tokens": 3}
    found = evaluate(tmp_path / "model", fluency_model=classifier, **options)
    assert 0 < found.metrics["forget_Q_A_gibberish"] < 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    config["label2id"] = {"a": 0, "b": 1, "c": 2}
    (classifier / "config.json").write_text(json.dumps(config))  # another classifier: measured again, and refused
    with pytest.raises(PlanError, match="--fluency-model .*: expected a class clean, found a, b, c"):
        evaluate(tmp_path / "model", fluency_model=classifier, **options)


def test_the_published_utility_follows_from_model_utility_and_fluency() -> None:
    # Source: see test_composite. AltPO and full: model utility and fluency; AltPO: relative utility.
    model, full = ({"model_utility": u, "forget_Q_A_gibberish": f} for u, f in ((0.56497, 0.85385), (0.60088, 0.87282)))
    assert composite.scores(model, None, full)["utility_score"] == pytest.approx(0.95538, abs=2e-5)
