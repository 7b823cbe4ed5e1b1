"""Whole evaluations in TOFU's format and on MUSE: measured, cached, written, and refused where the data are wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import CheckpointError, DataError, FileError, PlanError
from mpunlearn.evaluation import durability, measurement, tofu
from mpunlearn.evaluation.composite import ATTACKS
from mpunlearn.evaluation.evaluate import Evaluation, evaluate
from mpunlearn.evaluation.metrics import rouge_l
from mpunlearn.evaluation.muse import first_answer
from mpunlearn.evaluation.probe import probe
from mpunlearn.evaluation.robustness import quantized, relearning, round_weights
from mpunlearn.evaluation.sets import OPTION_SETS, SETS, UTILITY_SETS, Questions, read_sets
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data


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
    path, out = save_tiny(), tmp_path / "result.json"
    evaluation = evaluate(path, benchmark=str(folder), max_new_tokens=8, cache=tmp_path / "cache", out=out)
    assert json.loads(out.read_text()) == evaluation.to_json()
    metrics, per_example = evaluation.metrics, evaluation.per_example
    assert evaluation.to_json()["metrics"] == metrics
    assert set(per_example) == set(SETS)
    prefixes = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
    for name, prefix in prefixes.items():
        probability = "Q_A_Prob_normalised" if name in OPTION_SETS else "Q_A_Prob"
        assert metrics[f"{prefix}_{probability}"] == pytest.approx(np.mean(per_example[name][probability]))
        assert metrics[f"{prefix}_Q_A_ROUGE"] == pytest.approx(np.mean(per_example[name]["Q_A_ROUGE"]))
        assert len(per_example[name]["Q_A_ROUGE"]) == 6
    # Against one example done by hand.
    model, tokenizer = load(path)
    row = json.loads((folder / "real_authors.jsonl").read_text().splitlines()[2])
    options = [row["answer"], *row["perturbed_answer"]]
    answers = probe(model, tokenizer, encode([Record(row["question"], a) for a in options], tokenizer, 512))
    p = [answer.probability for answer in answers]
    assert per_example["real_authors"]["Q_A_Prob_normalised"][2] == pytest.approx(p[0] / sum(p), rel=1e-3)
    ratio = np.exp(np.mean([-answer.loss for answer in answers[1:]]) + answers[0].loss)
    assert per_example["real_authors"]["Truth_Ratio"][2] == pytest.approx(ratio, rel=1e-3)
    nine = [metrics[f"retain_{metric}"] for metric in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")]
    nine += [metrics[f"{s}_{m}"] for s in ("ra", "wf") for m in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")]
    slow = 0.0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert metrics["model_utility"] == pytest.approx(slow)
    assert "forget_quality" not in metrics
    forget, holdout = (per_example[name]["mia_min_k"] for name in ("forget", "holdout"))
    slow = sum((h > f) + 0.5 * (h == f) for f in forget for h in holdout) / 36
    assert metrics["mia_min_k"] == pytest.approx(slow)


def test_names_are_those_of_open_unlearning(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    evaluation = evaluate(path, benchmark=str(folder), retain_model=path, max_new_tokens=4, cache=tmp_path / "cache")
    expected = """
        forget_Q_A_Prob forget_Q_A_ROUGE forget_Truth_Ratio retain_Q_A_Prob retain_Q_A_ROUGE retain_Truth_Ratio
        ra_Q_A_Prob_normalised ra_Q_A_ROUGE ra_Truth_Ratio wf_Q_A_Prob_normalised wf_Q_A_ROUGE wf_Truth_Ratio
        model_utility exact_memorization extraction_strength forget_quality mia_loss mia_zlib mia_min_k
        mia_min_k_plus_plus mia_gradnorm mia_reference privleak forget_Q_A_PARA_Prob forget_Q_A_PARA_ROUGE
        retain_Q_A_PARA_Prob
    """
    ours = "forget_Truth_Ratio_prob_mean memorization_score privacy_score"  # OpenUnlearning has no names for these
    assert set(evaluation.metrics) == {*expected.split(), *ours.split()}
    utility = {"retain": 0.8, "real_authors": 0.4, "world_facts": 0.2}
    values = {s: {"Q_A_Prob_normalised" if s in OPTION_SETS else "Q_A_Prob": [p]} for s, p in utility.items()}
    forget = {"Q_A_Prob": [1e-3], "exact_memorization": [0.0], "extraction_strength": [0.0]}
    summary = tofu.summarize({"forget": forget, **values})
    assert set(utility) == set(UTILITY_SETS)
    assert summary["model_utility"] == pytest.approx(
        3 / (1 / 0.8 + 1 / 0.4 + 1 / 0.2)
    )  # the forget set is no part of it


def test_forget_questions_are_judged_by_the_paraphrase(save_tiny, folder: Path) -> None:
    sets = read_sets(str(folder), "", None, Data())
    row = json.loads((folder / "forget.jsonl").read_text().splitlines()[0])
    assert sets["forget"].paraphrases[0] == row["paraphrased_answer"]
    assert sets["real_authors"].paraphrases == sets["real_authors"].answers
    model, tokenizer = load(save_tiny())
    per_example = tofu.measure(model, tokenizer, {"forget": sets["forget"]}, texts=False)
    answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
    probes = probe(model, tokenizer, encode([Record(row["question"], a) for a in answers], tokenizer, 512))
    expected = np.exp(probes[0].loss - np.mean([answer.loss for answer in probes[1:]]))
    assert per_example["forget"]["Truth_Ratio"][0] == pytest.approx(expected, rel=1e-3)


def test_a_model_compared_with_itself_has_forgotten_perfectly(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": tmp_path / "cache"}
    evaluation = evaluate(path, retain_model=path, **options)
    assert evaluation.metrics["forget_quality"] == pytest.approx(1)
    assert evaluation.metrics["privleak"] == pytest.approx(0)
    assert "| retrained |" in evaluation.table()


def refuse(*args: object) -> None:
    raise AssertionError("loaded again")


def test_what_was_evaluated_is_not_evaluated_again(save_tiny, folder: Path, tmp_path: Path, monkeypatch) -> None:
    path, other = save_tiny(), save_tiny("other", hidden_size=64)
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": tmp_path / "cache"}
    first = evaluate(path, **options)
    monkeypatch.setattr(measurement, "load", refuse)
    assert evaluate(path, **options).metrics == first.metrics
    for changed in (
        {"max_new_tokens": 5},
        {"holdout": str(folder / "retain.jsonl")},
        {"robustness": True},
        {"samples": 1},
        {"worst_case": True},
        {"tasks_folder": tmp_path},
    ):
        with pytest.raises(AssertionError, match="loaded again"):
            evaluate(path, **{**options, **changed})
    with pytest.raises(AssertionError, match="loaded again"):
        evaluate(other, **options)
    (folder / "retain.jsonl").write_text((folder / "retain.jsonl").read_text().replace("?", "!"))
    with pytest.raises(AssertionError, match="loaded again"):
        evaluate(path, **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: json.dumps({**json.loads(text), "format": 1}),
        lambda text: json.dumps({**json.loads(text), "format": 4}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "format"}),
        lambda text: json.dumps({**json.loads(text), "per_example": {"forget": {"Q_A_Prob": ["high"]}}}),
        lambda text: json.dumps({**json.loads(text), "per_example": []}),
    ],
    ids=["cut off", "older", "newer", "without a format", "not numbers", "not sets"],
)
def test_a_damaged_cache_entry_is_measured_again(save_tiny, folder: Path, tmp_path: Path, damage) -> None:
    path, cache = save_tiny(), tmp_path / "cache"
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": cache}
    first = evaluate(path, **options)
    [entry] = cache.iterdir()
    whole = entry.read_text()
    entry.write_text(damage(whole))
    assert evaluate(path, **options).metrics == first.metrics
    assert json.loads(entry.read_text()) == json.loads(whole)


def test_a_model_that_diverged_is_evaluated_cached_and_written(
    save_tiny, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    path, out = save_tiny(), tmp_path / "result.json"
    model, _ = load(path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(path)
    options = {"benchmark": str(folder), "max_new_tokens": 4, "cache": tmp_path / "cache"}
    first = evaluate(path, out=out, **options)
    assert np.isnan(first.metrics["forget_Q_A_Prob"])
    assert re.search(r"\| forget_Q_A_Prob \| nan \|", first.table())
    monkeypatch.setattr(measurement, "load", refuse)
    assert np.isnan(evaluate(path, **options).metrics["forget_Q_A_Prob"])

    def constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(out.read_text(), parse_constant=constant)["metrics"]["forget_Q_A_Prob"] is None


def test_curves_are_drawn_and_leave_the_model_as_it_was(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    model, tokenizer = load(path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forget = read_sets(str(folder), "", None, Data())["forget"]
    # Each question appears twice, once among those that are trained on and once among those that are measured.
    double = Questions(forget.questions * 2, forget.answers * 2, forget.paraphrases * 2, forget.wrong * 2)
    curve = relearning(model, tokenizer, double, shown=6, steps=(0, 4, 40), learning_rate=1e-2)
    assert list(curve) == ["0", "4", "40"]
    assert curve["0"] < curve["4"] < curve["40"]
    assert curve["40"] > 0.5
    with pytest.raises(DataError, match="more than 6 forget questions, found 6"):
        relearning(model, tokenizer, forget, shown=6)
    other = Questions(["Who wrote nothing?"], ["Nobody."], ["Nobody."], [["Somebody."]])
    elsewhere = relearning(model, tokenizer, forget, on=other, shown=1, steps=(0, 40), learning_rate=1e-2)
    assert elsewhere["0"] == pytest.approx(curve["0"], rel=1e-4)  # the second half of `double` is the forget set
    assert elsewhere["40"] < curve["40"] / 2
    rounded = quantized(model, tokenizer, {"forget": forget}, max_new_tokens=4)
    assert list(rounded) == ["8", "4"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    out = tmp_path / "result.json"
    evaluation = evaluate(
        path, benchmark=str(folder), robustness=True, max_new_tokens=4, cache=tmp_path / "cache", out=out
    )
    steps = "forget_Q_A_Prob by relearning steps"
    curves = {steps, f"{steps} on the retain set", "forget_Q_A_Prob by bits", "model_utility by bits"}
    curves |= {durability.RELEARNED, durability.QUANTIZED}
    assert set(json.loads(out.read_text())["robustness"]) == set(evaluation.robustness) == curves
    assert evaluation.robustness["forget_Q_A_Prob by bits"]["model"] == {
        "float32": evaluation.metrics["forget_Q_A_Prob"],
        **{bits: pytest.approx(values["forget_Q_A_Prob"], rel=1e-3) for bits, values in rounded.items()},
    }
    assert "| forget_Q_A_Prob by relearning steps | 0 | 1 | 2 | 4 | 8 | 16 | 32 |" in evaluation.table()


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


def test_muse_is_measured_from_a_mirror(save_tiny, tmp_path: Path, monkeypatch) -> None:
    mirror = muse_mirror(tmp_path / "mirror")
    path = save_tiny()
    options = {"benchmark": "muse/news", "data_root": mirror, "cache": tmp_path / "cache"}
    evaluation = evaluate(path, retain_model=path, **options)
    assert set(evaluation.metrics) == {
        "forget_verbmem_ROUGE",
        "forget_knowmem_ROUGE",
        "retain_knowmem_ROUGE",
        *ATTACKS,
        "privleak",
        "privacy_score",
    }
    assert evaluation.metrics["privleak"] == pytest.approx(0)
    model, tokenizer = load(path)
    ids = tokenizer("Ada was born")["input_ids"]
    text = tokenizer.decode(
        model.generate(torch.tensor([ids]), max_new_tokens=128, do_sample=False)[0, len(ids) :],
        skip_special_tokens=True,
    )
    expected = rouge_l("in Lyon and lives there.", text)[1]
    assert evaluation.per_example["forget"]["verbmem_ROUGE"][0] == pytest.approx(expected)
    monkeypatch.setattr(measurement, "load", refuse)
    assert evaluate(path, retain_model=path, **options).metrics == evaluation.metrics
    (mirror / "muse/news/privleak/forget.json").write_text(json.dumps({"text": "Another text."}))
    with pytest.raises(AssertionError, match="loaded again"):
        evaluate(path, **options)


def test_an_answer_ends_where_the_next_question_begins() -> None:
    assert first_answer("Lyon\n\nQuestion: and?") == "Lyon"
    assert first_answer("Lyon Question: and?") == "Lyon "


def test_what_is_not_a_benchmark_is_refused(save_tiny, folder: Path, tmp_path: Path) -> None:
    path = save_tiny()
    with pytest.raises(DataError, match=r"forget\.jsonl"):
        evaluate(path, benchmark=str(tmp_path / "nothing"))
    with pytest.raises(PlanError, match="--max-new-tokens"):
        evaluate(path, benchmark=str(folder), max_new_tokens=0)
    with pytest.raises(PlanError, match="--relearn-rate"):
        evaluate(path, benchmark=str(folder), relearn_rate=-1.0)
    for option in (
        {"robustness": True},
        {"holdout": str(folder / "holdout.jsonl")},
        {"samples": 1},
        {"worst_case": True},
    ):
        with pytest.raises(PlanError, match="not available for muse/news"):
            evaluate(path, benchmark="muse/news", **option)
    rows = (folder / "retain.jsonl").read_text()
    (folder / "retain.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"retain\.jsonl, line 1, column paraphrased_answer: expected text, found None"):
        evaluate(path, benchmark=str(folder))
    (folder / "retain.jsonl").write_text(json.dumps({**json.loads(rows.splitlines()[0]), "perturbed_answer": [1]}))
    with pytest.raises(DataError, match=r"column perturbed_answer: expected a list of texts, found \[1\]"):
        evaluate(path, benchmark=str(folder))


def test_an_evaluation_never_overwrites_and_finds_mistakes_before_it_measures(
    save_tiny, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(measurement, "load", refuse)
    monkeypatch.setattr(measurement, "read_benchmark", refuse)
    path, out = save_tiny(), tmp_path / "result.json"
    out.write_text("precious")
    with pytest.raises(FileError, match=r"--out .*result\.json: already exists"):
        evaluate(path, benchmark=str(folder), out=out, cache=tmp_path / "cache")
    assert out.read_text() == "precious"
    monkeypatch.undo()
    monkeypatch.setattr(measurement, "load", refuse)
    with pytest.raises(CheckpointError, match="missing"):
        evaluate(path, benchmark=str(folder), retain_model=tmp_path / "missing", cache=tmp_path / "cache")
    with pytest.raises(PlanError, match="--retain-model: expected a path, found an object of type Linear"):
        evaluate(path, benchmark=str(folder), retain_model=torch.nn.Linear(1, 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="--cache .*: cannot be created"):
        evaluate(path, benchmark=str(folder), cache=tmp_path / "file" / "cache")


def test_the_table_shows_nan_and_leaves_out_what_was_not_measured() -> None:
    evaluation = Evaluation({"privleak": float("nan"), "mia_reference": 1e-5}, {"privleak": 0.0}, {}, {}, {})
    assert evaluation.table().splitlines() == [
        "| metric | model | retrained |",
        "|---|---|---|",
        "| privleak | nan | 0.000 |",
        "| mia_reference | 1e-05 |  |",
    ]


def test_the_verb_is_imported_without_torch() -> None:
    script = (
        "import sys, mpunlearn.evaluation.evaluate; "
        "heavy = {'torch', 'transformers', 'scipy', 'datasets', 'lm_eval'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
