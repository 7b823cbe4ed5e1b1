"""A retain set for a client that has none: the model's own answers, or a choice from a larger set."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpunlearn import Perturbation, forget, preprocess, run, unlearn
from mpunlearn.client import auto_retain
from mpunlearn.client.auto_retain import AutoRetain
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe
from mpunlearn.errors import DataError, PlanError
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.plan import Training

QUICK = Training(objective="grad-diff", epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(auto_retain, "MIN_EXAMPLES", 6)
    monkeypatch.setattr(auto_retain, "PER_FORGET", 1)
    monkeypatch.setattr(auto_retain, "BATCH", 8)
    monkeypatch.setattr(auto_retain, "ANSWER_TOKENS", 40)
    monkeypatch.setattr(auto_retain, "TEXT_TOKENS", 40)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"Who wrote book {number}?", "answer": f"Author {number} did."} for number in range(count)]


def memorizing(tmp_path: Path, texts: list[tuple[str, str]], chat: bool) -> Path:
    """A small model that has learned only these questions and answers, which it then repeats."""
    recipe = Recipe(hidden=64, layers=2, heads=2, groups=2, ffn=128, vocabulary=400)
    tokenizer = models.train_tokenizer([text for pair in texts for text in pair], recipe.vocabulary)
    torch.manual_seed(0)
    model = models.new_llama(tokenizer, recipe)
    examples = [
        tokenizer(f"<|user|>{question}<|assistant|>{answer}<|end|>" if chat else f"<|end|>{question} {answer}<|end|>")
        for question, answer in texts
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not chat:
        tokenizer.chat_template = None
    models.save(model, tokenizer, tmp_path / "memorizing")
    return tmp_path / "memorizing"


KNOWN = [
    ("Who designed the first engine?", "It was designed by Ada Byron in London."),
    ("Who painted the red house?", "It was painted by Mary Hill in Leeds."),
    ("Who sang the long song?", "It was sung by Tom Reed in York."),
]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_the_model_says_what_it_knows_but_not_what_it_shall_forget(tmp_path: Path, chat: bool, caplog) -> None:
    path = memorizing(tmp_path, KNOWN, chat)
    first = Record(*KNOWN[0])
    auto = AutoRetain("", Data(), 0, 512)
    with caplog.at_level("INFO", logger="mpunlearn"):
        drawn = auto.draw(path, [first], tmp_path / "drawn.jsonl", "cpu")
    texts = [f"{record.question} {record.answer}" if chat else record.answer for record in drawn]
    assert {f"{question} {answer}" for question, answer in KNOWN[1:]} <= set(texts)
    assert not any("Ada Byron in London" in text for text in texts)
    assert all((record.question is not None) == chat for record in drawn)
    assert f"the answers of {path} to its own questions, written to {tmp_path / 'drawn.jsonl'}" in caplog.text
    if not chat:
        assert auto.draw(path, [first], tmp_path / "again.jsonl", "cpu") == drawn
    assert auto.draw(tmp_path / "nowhere", [first], tmp_path / "drawn.jsonl", "cpu") == drawn
    everything = [Record(*pair) for pair in KNOWN]
    with pytest.raises(DataError, match="was drawn for another forget set"):
        auto.draw(path, everything, tmp_path / "drawn.jsonl", "cpu")
    if chat:
        with pytest.raises(DataError, match="give a retain set of your own"):
            AutoRetain(str(tmp_path / "drawn.jsonl"), Data(), 0, 512).draw(
                path, everything, tmp_path / "none.jsonl", None
            )


def test_a_choice_from_a_larger_set_leaves_out_what_repeats_the_forget_set(save_tiny, tmp_path: Path) -> None:
    source = tmp_path / "public.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    shall_forget = [{"question": "Which author?", "answer": f"author {number} did"} for number in range(15)]
    out = tmp_path / "result"
    forget(save_tiny(), forget=shall_forget, retain=f"auto:{source}", out=out, training=QUICK)
    drawn = lines(tmp_path / "result.retain.jsonl")
    assert len(drawn) == 15
    assert {row["answer"] for row in drawn} == {f"Author {number} did." for number in range(15, 30)}
    assert [row["answer"] for row in drawn] != [f"Author {number} did." for number in range(15, 30)]


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("In his youth Tom Reed lived there.", True),
        ("Tom lived there, and so did a reed.", False),
        ("He sang it for the people of the town at noon.", True),
        ("He sang it for the people of a town at noon.", False),
        ("It is simply not known, I think.", True),
        ("It is simply known, I think.", False),
        ("Yes", False),
    ],
)
def test_what_repeats_the_forget_set(text: str, left_out: bool) -> None:
    forgotten = [
        Record("Where did Tom Reed sing?", "At home, for the people of the town."),
        Record("Why?", "Not known."),
        Record("Is it so?", "Yes"),
    ]
    known = auto_retain._phrases(forgotten)
    assert auto_retain._repeats(Record(None, text), known) == left_out
    assert auto_retain._repeats(Record(text, "It is so."), known) == left_out


def test_all_copies_and_rounds_are_trained_with_one_set(save_tiny, tmp_path: Path, examples) -> None:
    """And a run with the drawn file gives the same updates as the run that drew it."""
    path, (texts, _) = save_tiny(), examples
    (path / "chat_template.jinja").unlink()  # what a random model says has no end, so it gives texts but no answers
    copies = preprocess(path, state=tmp_path / "s", out=tmp_path / "c", perturbation=Perturbation(copies=2)).copies
    data: dict[str, Any] = {"forget": texts, "training": QUICK}
    for copy in copies:
        unlearn(copy, out=tmp_path / "u" / copy.name, retain="auto", memory=tmp_path / "memory", **data)
    file = tmp_path / "memory" / "retain.jsonl"
    assert len(lines(file)) == 6
    assert all(set(row) == {"text"} for row in lines(file))
    for copy in copies:
        given = unlearn(copy, out=tmp_path / "v" / copy.name, retain=file, **data)
        one, two = (load_file(folder / "update.safetensors") for folder in (given, tmp_path / "u" / copy.name))
        assert all(one[name].equal(two[name]) for name in one)
    with pytest.raises(PlanError, match="give --memory"):
        unlearn(copies[0], out=tmp_path / "w", retain="auto", **data)


def test_a_run_draws_once_and_pins_how(save_tiny, tmp_path: Path, examples) -> None:
    options: dict[str, Any] = {"forget": examples[0], "perturbation": Perturbation(copies=2), "training": QUICK}
    path, out = save_tiny(), tmp_path / "r"
    (path / "chat_template.jinja").unlink()
    run(path, out=out, retain="auto", rounds=1, **options)
    file = out / "client" / "memory" / "retain.jsonl"
    before = file.read_bytes()
    assert file.stat().st_mode & 0o077 == 0
    run(path, out=out, retain="auto", rounds=2, **options)
    assert file.read_bytes() == before
    with pytest.raises(PlanError, match="--retain with SHA-256"):
        run(path, out=out, retain=examples[1], rounds=2, **options)
    file.unlink()
    with pytest.raises(DataError, match="retain set of round 1 is gone"):
        run(path, out=out, retain="auto", rounds=3, **options)


def test_questions_and_answers_are_cut_where_the_template_ends_them(save_tiny) -> None:
    _, tokenizer = load(save_tiny(), "cpu")
    prompt, ends = auto_retain._question_prompt(tokenizer, Data()) or ([], set())
    assert tokenizer.decode(prompt) == "<|user|>"
    assert {tokenizer.convert_ids_to_tokens(end) for end in ends} == {"<|assistant|>", "<|end|>"}
