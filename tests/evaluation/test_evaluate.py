"""Whole evaluations: in TOFU's format and in MUSE's, cached, and refused where the data are not what they seem."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mpunlearn.cli import main
from mpunlearn.client import Data
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError, PlanError
from mpunlearn.evaluation import evaluate, muse, tofu
from mpunlearn.evaluation.metrics import rouge_l
from mpunlearn.evaluation.probe import probe
from mpunlearn.evaluation.robustness import quantized, relearning, round_weights
from mpunlearn.evaluation.sets import SETS, Questions, read_sets
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small benchmark in TOFU's format."""
    rows = generate_rows(0, Recipe())
    path = tmp_path / "benchmark"
    path.mkdir()
    for name in SETS:
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name][:6]))
    return path


def test_metrics_are_means_of_what_every_example_says(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    report = evaluate(path, benchmark=str(folder), max_new_tokens=8, cache=tmp_path / "cache", out=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == report.metrics
    per_example = report.per_example
    assert set(per_example) == set(SETS)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        assert report.metrics[f"{name}_probability"] == pytest.approx(np.mean(per_example[name]["probability"]))
        assert len(per_example[name]["rouge_l_recall"]) == 6
    # Against one example done by hand.
    model, tokenizer = load(path)
    row = json.loads((folder / "real_authors.jsonl").read_text().splitlines()[2])
    options = [row["answer"], *row["perturbed_answer"]]
    answers = probe(model, tokenizer, encode([Record(row["question"], a) for a in options], tokenizer, 512))
    p = [answer.probability for answer in answers]
    assert per_example["real_authors"]["probability"][2] == pytest.approx(p[0] / sum(p), rel=1e-3)
    ratio = np.exp(np.mean([-answer.loss for answer in answers[1:]]) + answers[0].loss)
    assert per_example["real_authors"]["truth_ratio"][2] == pytest.approx(ratio, rel=1e-3)
    nine = [report.metrics[f"{s}_{m}"] for s in tofu.KEPT for m in ("probability", "rouge_l_recall", "truth_ratio")]
    slow = 0.0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert report.metrics["model_utility"] == pytest.approx(slow)
    assert "forget_quality" not in report.metrics
    forget, holdout = (per_example[name]["mia_min_k"] for name in ("forget", "holdout"))
    slow = sum((h > f) + 0.5 * (h == f) for f in forget for h in holdout) / 36
    assert report.metrics["mia_min_k"] == pytest.approx(slow)


def test_forget_questions_are_judged_by_the_paraphrase(save_tiny, folder: Path) -> None:
    sets = read_sets(str(folder), "", None, Data())
    row = json.loads((folder / "forget.jsonl").read_text().splitlines()[0])
    assert sets["forget"].paraphrases[0] == row["paraphrased_answer"]
    assert sets["real_authors"].paraphrases == sets["real_authors"].answers
    model, tokenizer = load(save_tiny())
    found = tofu.measure(model, tokenizer, {"forget": sets["forget"]}, texts=False)
    answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
    said = probe(model, tokenizer, encode([Record(row["question"], a) for a in answers], tokenizer, 512))
    expected = np.exp(said[0].loss - np.mean([answer.loss for answer in said[1:]]))
    assert found["forget"]["truth_ratio"][0] == pytest.approx(expected, rel=1e-3)


def test_a_model_compared_with_itself_has_forgotten_perfectly(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": tmp_path / "cache"}
    report = evaluate(path, retain_model=path, **options)
    assert report.metrics["forget_quality"] == pytest.approx(1)
    assert report.metrics["privacy_leak"] == pytest.approx(0)
    assert "| retrained |" in report.table()


def test_what_was_evaluated_is_not_evaluated_again(save_tiny, folder: Path, tmp_path: Path, monkeypatch) -> None:
    path, other = save_tiny(), save_tiny("other", hidden_size=64)
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": tmp_path / "cache"}
    first = evaluate(path, **options)
    module = importlib.import_module("mpunlearn.evaluation.evaluate")

    def refuse(*args):
        raise AssertionError("loaded again")

    with monkeypatch.context() as patched:
        patched.setattr(module, "load", refuse)
        assert evaluate(path, **options).metrics == first.metrics
        for changed in ({"max_new_tokens": 5}, {"benchmark": str(folder), "holdout": str(folder / "retain.jsonl")}):
            with pytest.raises(AssertionError, match="loaded again"):
                evaluate(path, **{**options, **changed})
        with pytest.raises(AssertionError, match="loaded again"):
            evaluate(other, **options)


def test_curves_are_drawn_and_leave_the_model_as_it_was(save_tiny, folder: Path, tmp_path: Path, capsys) -> None:
    path = save_tiny()
    model, tokenizer = load(path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forget = read_sets(str(folder), "", None, Data())["forget"]
    # Shown the very answers that are measured, a model learns them: the others are the same questions again.
    double = Questions(forget.questions * 2, forget.answers * 2, forget.paraphrases * 2, forget.wrong * 2)
    curve = relearning(model, tokenizer, double, shown=6, steps=(0, 4, 40), learning_rate=1e-2)
    assert list(curve) == ["0", "4", "40"]
    assert curve["0"] < curve["4"] < curve["40"]
    assert curve["40"] > 0.5
    rounded = quantized(model, tokenizer, {"forget": forget}, max_new_tokens=4)
    assert list(rounded) == ["8", "4"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    command = ["evaluate", str(path), "--benchmark", str(folder), "--robustness", "true", "--max-new-tokens", "4"]
    assert main([*command, "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "forget probability after steps of relearning" in printed
    assert set(json.loads((tmp_path / "r.json").read_text())["robustness"]) >= {"forget_probability at bits"}


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15), (2, 3)])
def test_weights_are_rounded_to_the_nearest_of_so_many_levels(save_tiny, bits: int, levels: int) -> None:
    model, _ = load(save_tiny())
    name = "model.layers.0.mlp.up_proj.weight"
    before, norm = model.get_parameter(name).detach().clone(), model.model.norm.weight.detach().clone()
    round_weights(model, bits)
    after = model.get_parameter(name).detach()
    step = before.abs().amax(dim=1, keepdim=True) / ((levels - 1) // 2)
    assert float(((after - before).abs() / step).max()) <= 0.5 + 1e-4
    whole = (after / step).round()
    assert torch.allclose(whole * step, after, atol=1e-6)
    assert int(whole.abs().max()) == (levels - 1) // 2
    assert torch.equal(model.model.norm.weight, norm)
    assert not torch.equal(after, before)


def muse_mirror(root: Path) -> Path:
    def write(part: str, rows: list[dict]) -> None:
        file = root / "muse" / "news" / f"{part}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row) for row in rows))

    write("verbmem/forget", [{"prompt": "Ada was born", "gt": "in Lyon and lives there."}] * 2)
    for name in ("forget", "retain"):
        write(f"knowmem/{name}_qa", [{"question": "Where was Ada born?", "answer": "Lyon"}])
        write(f"knowmem/{name}_qa_icl", [{"question": "Where was Bo born?", "answer": "Fez"}])
    for name in ("forget", "holdout"):
        write(f"privleak/{name}", [{"text": f"{name} number {n} writes mystery."} for n in range(3)])
    return root


def test_muse_is_measured_from_a_mirror(save_tiny, tmp_path: Path) -> None:
    path, data = save_tiny(), Data(data_root=str(muse_mirror(tmp_path / "mirror")))
    options = {"benchmark": "muse/news", "data": data, "cache": tmp_path / "cache"}
    report = evaluate(path, retain_model=path, **options)
    assert set(report.metrics) == {
        "verbatim_memorization",
        "forget_knowledge_memorisation",
        "retain_knowledge_memorisation",
        "mia_min_k",
        "privacy_leak",
    }
    assert report.metrics["privacy_leak"] == pytest.approx(0)
    model, tokenizer = load(path)
    ids = tokenizer("Ada was born")["input_ids"]
    text = tokenizer.decode(
        model.generate(torch.tensor([ids]), max_new_tokens=128, do_sample=False)[0, len(ids) :],
        skip_special_tokens=True,
    )
    expected = rouge_l("in Lyon and lives there.", text)[1]
    assert report.per_example["forget"]["verbatim_memorization"][0] == pytest.approx(expected)
    assert muse._cut("Lyon\n\nQuestion: and?") == "Lyon"
    assert muse._cut("Lyon Question: and?") == "Lyon "


def test_what_is_not_a_benchmark_is_refused(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    with pytest.raises(DataError, match=r"forget\.jsonl"):
        evaluate(path, benchmark=str(tmp_path / "nothing"))
    with pytest.raises(PlanError, match="--max-new-tokens"):
        evaluate(path, benchmark=str(folder), max_new_tokens=0)
    (folder / "retain.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"retain\.jsonl, line 1, column paraphrased_answer"):
        evaluate(path, benchmark=str(folder))


def test_the_real_benchmark_is_read(tmp_path: Path) -> None:
    root = Path(__file__).parents[3] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("TOFU is not beside the checkout")
    sets = read_sets("tofu", "forget10", None, Data(data_root=str(root)))
    assert {name: len(questions) for name, questions in sets.items()} == {
        "forget": 400,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
