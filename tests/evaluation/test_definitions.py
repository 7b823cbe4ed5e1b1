"""Both definitions of every metric that has two, by hand and against a slow reference that reads one example at a time."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError, PlanError
from mpunlearn.evaluation import depth, durability, leakage, measurement, metrics, muse, tofu, worst_case
from mpunlearn.evaluation.definitions import DEFINITIONS, OPENUNLEARNING, STRICT
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.evaluation.muse import MuseSets
from mpunlearn.evaluation.probe import Probe, probe
from mpunlearn.evaluation.prompts import asked
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import IGNORED, Example
from mpunlearn.lm.model import load, load_model
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def probe_of(logprobs: list[float], matches: list[bool] | None = None) -> Probe:
    zeros = np.zeros(len(logprobs))
    return Probe(np.array(logprobs), np.array(matches or [True] * len(logprobs)), zeros, zeros + 1, True)


@pytest.mark.parametrize(
    ("matches", "exact", "theirs", "ours"),
    [
        ([True, True, True, False], 1.0, 1.0, 1.0),  # the last token is the end token
        ([False, True, True, True], 2 / 3, 2 / 3, 2 / 3),
        ([True, False, True, True], 2 / 3, 1 / 3, 1 / 3),
        ([True, True, False, True], 2 / 3, 1 / 3, 0.0),
        ([False, False, False, False], 0.0, 1 / 3, 0.0),
    ],
)
def test_an_answer_of_which_nothing_is_extracted(matches: list[bool], exact: float, theirs: float, ours: float) -> None:
    answer = probe_of([-1.0] * 4, matches)
    for definitions, strength in ((OPENUNLEARNING, theirs), (STRICT, ours)):
        assert metrics.exact_memorization(answer, definitions) == pytest.approx(exact)
        assert metrics.extraction_strength(answer, definitions) == pytest.approx(strength)


def test_the_end_token_counts_only_in_strict_membership_scores() -> None:
    answer = probe_of([-1.0, -4.0, -2.0, -3.0, -1.0, -9.0])
    assert metrics.min_k_score(answer) == pytest.approx(3.5)  # the lowest two of five: -4 and -3
    assert metrics.min_k_score(answer, definitions=STRICT) == pytest.approx(6.5)  # the lowest two of six: -9 and -4
    assert metrics.min_k_plus_plus_score(answer) == pytest.approx(3.5)
    assert metrics.min_k_plus_plus_score(answer, definitions=STRICT) == pytest.approx(6.5)


def test_quotients_of_almost_nothing() -> None:
    correct, wrong = probe_of([-math.log(1e10)]), probe_of([-math.log(1e10)])
    assert metrics.truth_ratio(correct, [wrong]) == pytest.approx(0.5)  # 1e-10 / (1e-10 + 1e-10)
    assert metrics.truth_ratio(correct, [wrong], STRICT) == pytest.approx(1)
    assert metrics.normalized_probability(correct, [wrong]) == pytest.approx(1 / 3)
    assert metrics.normalized_probability(correct, [wrong], STRICT) == pytest.approx(1 / 2)
    assert metrics.privleak(0.75, 1.0) == pytest.approx(25e10)
    assert metrics.privleak(1.0, 1.0) == 0
    assert math.isnan(metrics.privleak(0.75, 1.0, STRICT))


def test_an_answer_that_is_one_token_has_no_memorization_and_leaves_the_mean() -> None:
    lone = probe_of([-1.0])
    assert math.isnan(metrics.exact_memorization(lone))
    assert metrics.extraction_strength(lone) == metrics.min_k_score(lone) == metrics.min_k_plus_plus_score(lone) == 0
    values = {"Q_A_Prob": [0.5, 0.5], "exact_memorization": [float("nan"), 0.25], "extraction_strength": [0.0, 1.0]}
    summary = tofu.summarize({"forget": values})
    assert (summary["exact_memorization"], summary["extraction_strength"]) == (0.25, 0.5)


@pytest.fixture
def loaded(save_tiny: Callable[..., Path]) -> tuple[Any, Any]:
    return load(save_tiny(dtype=torch.float32))


def test_where_a_plain_prompt_ends(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    tokenizer.chat_template = None
    record = Record("Where was she born?", "Lyon is it.")
    theirs, ours = asked(record, tokenizer, OPENUNLEARNING), asked(record, tokenizer, STRICT)
    assert theirs.example.input_ids == ours.example.input_ids
    # The space at the end of the prompt is a token of the prompt, and part of the first word in the whole text.
    assert tokenizer.decode(theirs.prompt).endswith("Answer: ")
    assert tokenizer.decode(ours.prompt).endswith("Answer:")
    assert tokenizer.decode([label for label in ours.example.labels if label != IGNORED]) == " Lyon is it.<|end|>"
    assert tokenizer.decode([label for label in theirs.example.labels if label != IGNORED]) == " is it.<|end|>"


def test_a_template_that_goes_on_after_the_end_token(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    tokenizer.chat_template = CHATML
    record = Record("Where was she born?", "Lyon is it.")
    theirs, ours = asked(record, tokenizer, OPENUNLEARNING), asked(record, tokenizer, STRICT)
    assert theirs.prompt == ours.prompt
    assert tokenizer.decode([label for label in ours.example.labels if label != IGNORED]) == "Lyon is it.<|end|>\n"
    assert theirs.example.input_ids == [*ours.example.input_ids, tokenizer.eos_token_id]
    assert theirs.example.labels == [*ours.example.labels, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with pytest.raises(DataError, match="no token of its own"):
        asked(record, tokenizer, OPENUNLEARNING)


def by_hand(model: Any, tokenizer: Any, question: str, answer: str, template: str | None) -> dict[str, Any]:
    """OpenUnlearning's values of one answer, from the full logits of one text at a time."""
    if template is None:
        prompt, whole = f"Question: {question}\nAnswer: ", f"Question: {question}\nAnswer: {answer}"
    else:
        prompt = f"<|user|>{question}<|end|>\n<|assistant|>"
        whole = f"{prompt}{answer}<|end|>\n"
    ids, start = tokenizer(whole)["input_ids"], len(tokenizer(prompt)["input_ids"])
    ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    seen = torch.tensor([[int(token != tokenizer.eos_token_id) for token in ids]])  # the padding token is the end token
    model.zero_grad()
    logprobs = model(input_ids=torch.tensor([ids]), attention_mask=seen).logits[0].log_softmax(dim=-1)
    own = [logprobs[place - 1, ids[place]] for place in range(start, len(ids))]
    kept = range(start, len(ids) - 1)
    first = [int(logprobs[place - 1].argmax()) == ids[place] for place in kept]
    shortest = next((k for k in range(len(first)) if all(first[k:])), len(first) - 1)
    standard = []
    for place in kept:
        at = logprobs[place - 1].detach()
        mean = (at.exp() * at).sum()
        standard.append(float((at[ids[place]] - mean) / ((at.exp() * at**2).sum() - mean**2).sqrt()))
    count = max(1, int(len(kept) * 0.4))
    torch.autograd.backward(-torch.stack(own[:-1]).mean())
    own = [value.item() for value in own]
    loss = -sum(own) / len(own)
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    return {
        "loss": loss,
        "Q_A_Prob": math.exp(-loss),
        "exact_memorization": sum(first) / len(first),
        "extraction_strength": 1 - shortest / len(first),
        "mia_loss": loss,
        "mia_zlib": loss / len(zlib.compress(text.encode())),
        "mia_min_k": -float(np.mean(sorted(own[:-1])[:count])),
        "mia_min_k_plus_plus": -float(np.mean(sorted(standard)[:count])),
        "mia_gradnorm": float(np.mean(norms)),
    }


@pytest.mark.parametrize("template", [None, CHATML])
def test_every_value_equals_a_slow_reference(loaded: tuple[Any, Any], template: str | None) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = template
    rows = generate_rows(0, Recipe())["forget"][:5]
    questions = [row["question"] for row in rows]
    answers = [row["answer"] for row in rows]
    of = Questions(questions, answers, answers, [[] for _ in rows])
    measured = tofu.measure(model, tokenizer, {"forget": of, "holdout": of}, texts=False)["forget"]
    other = tofu.measure(model, tokenizer, {"forget": of, "holdout": of}, texts=False, definitions=STRICT)["forget"]
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        for name, value in by_hand(model, tokenizer, question, answer, template).items():
            assert measured[name][index] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    for name in ("mia_min_k", "mia_gradnorm", "Q_A_Prob"):  # a control: strict values are others
        assert not np.allclose(measured[name], other[name], rtol=1e-3)


def test_a_model_is_no_more_likely_than_itself(save_tiny: Callable[..., Path]) -> None:
    path = save_tiny()
    model, tokenizer = load(path)
    rows = generate_rows(0, Recipe())
    sets = {
        name: Questions([row["question"] for row in rows[name]], [row["answer"] for row in rows[name]], [], [])
        for name in ("forget", "holdout", "retain")
    }
    sets = {name: Questions(q.questions, q.answers, q.answers, [[]] * len(q)) for name, q in sets.items()}
    other = load_model(path)
    for one in (model, other):  # makes the rounding of other batches large
        one.lm_head.register_forward_hook(lambda _, __, logits: logits * (1 + 1e-3 * logits[..., 0].numel()))
    measured = tofu.measure(model, tokenizer, sets, texts=False, reference=other)
    assert tofu.summarize(measured)["mia_reference"] == 0.5
    assert (
        measured["forget"]["mia_loss"]
        != tofu.measure(model, tokenizer, sets, batch_size=1, texts=False)["forget"]["mia_loss"]
    )


def test_the_prompt_of_knowledge_memorization(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    pairs = [("Where was Ada born?", "Lyon")]
    texts = {name: [f"{name} is a text about Lyon."] for name in ("forget", "holdout")}
    asked_of_both = dict.fromkeys(("forget", "retain"), pairs)
    sets = MuseSets([("Ada", "was born")], asked_of_both, asked_of_both, texts)
    seen: list[str] = []

    def noted(_: Any, tokenizer: Any, prompts: list[list[int]], *__: Any) -> list[str]:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(muse, "generate", noted)
    values = {name: muse.measure(model, tokenizer, sets, None, DEFINITIONS[name]) for name in DEFINITIONS}
    assert [text.rpartition("\n")[2] for text in seen if "Question" in text] == ["Answer: "] * 2 + ["Answer:"] * 2
    ids = tokenizer(texts["forget"][0])["input_ids"]
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    own = [logprobs[place - 1, ids[place]].item() for place in range(1, len(ids))]
    for name, counted in (("openunlearning", own[:-1]), ("strict", own)):
        lowest = sorted(counted)[: max(1, int(0.4 * len(counted)))]
        assert values[name]["forget"]["mia_min_k"][0] == pytest.approx(-np.mean(lowest), rel=1e-4)


@pytest.mark.parametrize("template", [None, CHATML])
def test_further_measurements_have_the_same_prompts(
    loaded: tuple[Any, Any], template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled answers, the worst case, hidden states and relearning see what the other metrics see."""
    model, tokenizer = loaded
    tokenizer.chat_template = template
    rows = generate_rows(0, Recipe())["forget"][:2]
    answers = [row["answer"] for row in rows]
    forget = Questions([row["question"] for row in rows], answers, answers, [[]] * 2)
    seen: list[tuple[list[list[int]], bool]] = []

    def noted(_: Any, __: Any, prompts: list[list[int]], ___: int, ____: Any, mask_pad: bool, *_____: Any) -> list[str]:
        seen.append((prompts, mask_pad))
        return [""] * len(prompts)

    monkeypatch.setattr(leakage, "generate", noted)
    monkeypatch.setattr(worst_case, "generate", noted)
    data = Data(system_prompt="Be brief.")
    differing = []
    for definitions in DEFINITIONS.values():
        encoded = forget.encoded(tokenizer, definitions, data)
        how: dict[str, Any] = {"definitions": definitions, "data": data}
        leakage.measure_leaks(model, tokenizer, forget, leakage.Sampling(1), 1, **how)
        worst_case.worst_case(model, tokenizer, forget, 1, **how)
        (sampled, first_mask), (several, second_mask) = seen[-2:]
        assert first_mask == second_mask == definitions.mask_pad
        count = 1 + len(worst_case.BEGINNINGS)
        assert sampled == several[::count] == encoded.prompts
        assert "  Sure" not in tokenizer.decode(several[1])
        labeled = depth.entities(forget, tokenizer, **how)
        assert [example.input_ids for example in labeled] == [example.input_ids for example in encoded.answers]
        before = durability.curves(model, tokenizer, forget, **how)[durability.RELEARNED]["0"]
        probes = probe(model, tokenizer, encoded.answers, mask_pad=definitions.mask_pad)
        assert before == pytest.approx(np.mean([answer.probability for answer in probes]))
        differing.append((before, depth.likelihood_drops(model, model, tokenizer, forget, **how).max()))
    assert differing[0][0] != pytest.approx(differing[1][0], rel=1e-4)  # a control: the definitions differ
    assert differing[0][1] == differing[1][1] == 0  # a model that is patched with its own states stays the same


def test_a_result_says_its_definitions_and_the_cache_keeps_them_apart(
    save_tiny: Callable[..., Path], examples: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = save_tiny(), tmp_path / "benchmark"
    folder.mkdir()
    rows = generate_rows(0, Recipe())["forget"][:3]
    (folder / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"benchmark": str(folder), "max_new_tokens": 2, "cache": tmp_path / "cache"}
    results = [
        evaluate(path, **options),
        evaluate(path, definitions="strict", **options),
        evaluate(path, system_prompt="Be brief.", template_kwargs={"date_string": "10 Apr 2025"}, **options),
    ]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert [result.provenance["definitions"] for result in results] == ["openunlearning", "strict", "openunlearning"]
    assert results[2].provenance["system_prompt"] == "Be brief."
    assert results[2].provenance["template_kwargs"] == {"date_string": "10 Apr 2025"}
    assert results[0].metrics["forget_Q_A_Prob"] != results[2].metrics["forget_Q_A_Prob"]
    with pytest.raises(PlanError, match="--definitions: expected one of openunlearning, strict, found 'mine'"):
        evaluate(path, definitions="mine", **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="--system-prompt: not available for muse/news"):
        measurement.read_benchmark(
            "muse/news", "", None, measurement.Settings(1, False, 1e-4, None, None, system_prompt="x"), Data()
        )


def test_where_attention_is_masked(loaded: tuple[Any, Any]) -> None:
    from mpunlearn.evaluation.probe import batch_of

    _, tokenizer = loaded
    example = Example([5, 2, 7, 2], [IGNORED, 2, 7, 2])  # 2 is both the end token and the padding token
    assert batch_of([example], tokenizer, mask_pad=True)["attention_mask"].tolist() == [[1, 0, 1, 0]]
    assert batch_of([example], tokenizer)["attention_mask"].tolist() == [[1, 1, 1, 1]]
    tokenizer.pad_token = tokenizer.eos_token = None  # then padding is token 0, which is an ordinary one
    zero = Example([5, 0, 7], [IGNORED, 0, 7])
    assert batch_of([zero], tokenizer, mask_pad=True)["attention_mask"].tolist() == [[1, 1, 1]]
