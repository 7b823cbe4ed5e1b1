"""Models and data in memory give what the same models and data give from directories and files."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tests.interop.reference import reference
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpunlearn
from mpunlearn import Training
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError, PlanError, StateError, UpdateError
from mpunlearn.evaluation.sets import SETS
from mpunlearn.server.perturbation import Perturbation

TRAINING = Training(objective="grad-diff", epochs=1, learning_rate=1e-3, batch_size=4)


def loaded(path: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto"), AutoTokenizer.from_pretrained(path)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(model: Any, path: Path) -> bool:
    other = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    return all(
        value.dtype == other[name].dtype and value.equal(other[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forgetting_in_memory_gives_the_same_model(save_tiny, tmp_path: Path, examples, dtype: torch.dtype) -> None:
    path, (forget, retain) = save_tiny(dtype=dtype), examples
    on_disk = mpunlearn.forget(path, forget=forget, retain=retain, out=tmp_path / "result", training=TRAINING)
    model, tokenizer = loaded(path)
    texts = {"forget": Dataset.from_list(rows(forget)), "retain": rows(retain)}
    result = mpunlearn.forget(model, tokenizer=tokenizer, training=TRAINING, **texts)
    assert type(result) is type(model)
    assert same(result, on_disk)
    assert not same(result, path)
    assert same(model, path)
    written = mpunlearn.forget(model, tokenizer=tokenizer, training=TRAINING, out=tmp_path / "written", **texts)
    assert same(result, written)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_neox"])
def test_a_round_in_memory(save_tiny, tmp_path: Path, model_type: str) -> None:
    sizes = {"num_experts": 3, "moe_intermediate_size": 12, "head_dim": 8} if "moe" in model_type else {}
    path = save_tiny(model_type=model_type, num_key_value_heads=4, **sizes)
    model, tokenizer = loaded(path)
    state, copies = tmp_path / "state", None
    copies = mpunlearn.publish(model, tokenizer=tokenizer, state=state, perturbation=Perturbation(copies=2))
    assert len(copies) == 2
    assert all(same(copy, folder) for copy, folder in zip(copies, copies.published.copies, strict=True))
    assert AutoTokenizer.from_pretrained(copies.published.copies[0]).get_vocab() == tokenizer.get_vocab()

    def train(copy: Any) -> Any:
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.mul_(0.99)
        copy.save_pretrained(tmp_path / f"trained-{copy.config.mpunlearn['copy']}")
        return copy

    unlearned = mpunlearn.aggregate(model, map(train, reversed(copies)), state=state)
    trained = [tmp_path / "trained-1", tmp_path / "trained-2"]
    unlearned.save_pretrained(tmp_path / "unlearned")
    for name, value in reference(path, state, copies.published.copies, trained).items():
        torch.testing.assert_close(Checkpoint(tmp_path / "unlearned").read(name).double(), value, rtol=1e-5, atol=2e-6)
    assert same(model, path)
    again = mpunlearn.publish(unlearned, state=state, perturbation=Perturbation(copies=2))
    assert again[0].config.mpunlearn["round"] == 2
    folder = again.published.copies[0]
    del again
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:The PEFT config's")  # one config for two copies, which PEFT confuses
def test_adapters_in_memory_and_paths_are_updates(save_tiny, tmp_path: Path, examples) -> None:
    import peft

    model, tokenizer = loaded(save_tiny())
    state = tmp_path / "state"
    copies = mpunlearn.publish(model, tokenizer=tokenizer, state=state, perturbation=Perturbation(copies=2))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = [peft.get_peft_model(copy, config) for copy in copies]
    result = mpunlearn.aggregate(model, adapted, state=state)
    changed = {name for name, value in result.state_dict().items() if not value.equal(model.state_dict()[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    forget, retain = examples
    copies = mpunlearn.publish(result, tokenizer=tokenizer, state=state, perturbation=Perturbation(copies=2))
    updates = [
        mpunlearn.unlearn(path, forget=rows(forget), retain=retain, out=tmp_path / path.name, training=TRAINING)
        for path in copies.published.copies
    ]
    final = mpunlearn.aggregate(result, updates, state=state, dtype="float64")
    before = result.state_dict()
    assert final.dtype == torch.float64
    assert any(not value.equal(before[name].double()) for name, value in final.state_dict().items())


def test_what_cannot_be_right_is_refused(save_tiny, tmp_path: Path, examples) -> None:
    model, tokenizer = loaded(save_tiny())
    with pytest.raises(PlanError, match="needs its tokenizer"):
        mpunlearn.forget(model, forget=["text"])
    with pytest.raises(PlanError, match="--out: is missing"):
        mpunlearn.forget(tmp_path / "model", forget=["text"], training=Training(objective="grad-ascent"))
    with pytest.raises(PlanError, match="found an object of type Linear"):
        mpunlearn.publish(torch.nn.Linear(2, 2), state=tmp_path / "state")
    copies = mpunlearn.publish(model, state=tmp_path / "state", perturbation=Perturbation(copies=2))
    with pytest.raises(UpdateError, match="does not say which copy"):
        mpunlearn.aggregate(model, [model, model], state=tmp_path / "state")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(StateError, match="has changed since round 1"):
        mpunlearn.aggregate(model, copies, state=tmp_path / "state")
    for wrong in (DatasetDict({"train": Dataset.from_list([{"text": "a"}])}), {"text": ["a"]}, [3], [], [{"x": "y"}]):
        with pytest.raises(DataError, match="the forget examples"):
            mpunlearn.forget(model, tokenizer=tokenizer, forget=wrong, training=Training(objective="grad-ascent"))


def test_a_run_resumes_from_the_same_examples_wherever_they_are(save_tiny, tmp_path: Path, examples) -> None:
    path, (forget, retain) = save_tiny(), examples
    seen: list[tuple[int, dict[str, float]]] = []
    options: dict[str, Any] = {"training": TRAINING, "perturbation": Perturbation(copies=2), "rounds": 1}

    def stop_in_copy_2(step: int, values: dict[str, float]) -> None:
        seen.append((step, values))
        if values["copy"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        mpunlearn.run(
            path, forget=rows(forget), retain=retain, out=tmp_path / "run", callback=stop_in_copy_2, **options
        )
    assert [(step, values["round"], values["copy"]) for step, values in seen] == [(1, 1, 1), (2, 1, 1), (1, 1, 2)]
    assert all(set(values) >= {"forget_loss", "retain_loss", "learning_rate"} for _, values in seen)
    mpunlearn.run(path, forget=forget, retain=Dataset.from_list(rows(retain)), out=tmp_path / "run", **options)
    with pytest.raises(PlanError, match="--forget with SHA-256"):
        mpunlearn.run(path, forget=rows(forget)[1:], retain=retain, out=tmp_path / "run", **options)


def test_an_evaluation_of_sets_in_memory(save_tiny, tmp_path: Path) -> None:
    path, world = save_tiny(), generate_rows(0, Recipe())
    sets = {name: world[name][:4] for name in SETS}
    (tmp_path / "benchmark").mkdir()
    for name, examples in sets.items():
        (tmp_path / "benchmark" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    options: dict[str, Any] = {"max_new_tokens": 4, "cache": tmp_path / "cache"}
    on_disk = mpunlearn.evaluate(path, benchmark=str(tmp_path / "benchmark"), **options)
    holdout = Dataset.from_list(sets.pop("holdout"))
    in_memory = mpunlearn.evaluate(path, benchmark=sets, holdout=holdout, **options)
    assert in_memory.metrics == on_disk.metrics
    assert in_memory.provenance["data_digest"] == on_disk.provenance["data_digest"]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # one and the same measurement
    for wrong, message in (({"retain": []}, "found no forget set"), ({"forget": [], "other": []}, "found 'other'")):
        with pytest.raises(DataError, match=message):
            mpunlearn.evaluate(path, benchmark=wrong, **options)
    with pytest.raises(DataError, match="the forget examples, row 1, column answer"):
        mpunlearn.evaluate(path, benchmark={"forget": [{"question": "Who?"}]}, **options)


def test_the_examples_in_the_docstrings_run(save_tiny, tmp_path: Path, monkeypatch) -> None:
    model, tokenizer = loaded(save_tiny())
    monkeypatch.chdir(tmp_path)
    names = {"mpunlearn": mpunlearn, "model": model, "tokenizer": tokenizer, "texts": ["Ada wrote about engines."]}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for function in (mpunlearn.forget, mpunlearn.publish):
        (test,) = finder.find(function, function.__name__, globs=dict(names))
        assert len(test.examples) >= 3
        assert runner.run(test, clear_globs=False).failed == 0
        assert not same(test.globs["unlearned"], tmp_path / "model")
