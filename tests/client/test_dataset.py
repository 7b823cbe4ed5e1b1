import json
from pathlib import Path

import pytest

from mpunlearn import toy
from mpunlearn.client.dataset import IGNORED, Record, batches, collate, encode, prompt_and_answer, read_records
from mpunlearn.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    recipe = toy.Recipe()
    return toy.tokenizer_of(toy.world(0, recipe), recipe)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_questions_and_texts_are_read_and_other_keys_left_alone(tmp_path: Path) -> None:
    line = json.dumps({"question": "q?", "answer": "a", "perturbed_answer": ["b"]})
    path = write(tmp_path / "x.jsonl", line, "", json.dumps({"text": "once"}))
    assert read_records(path) == [Record("q?", "a"), Record(None, "once")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"question": "q"}', "line 2: expected an object"),
        ('{"question": "q", "answer": 3}', "line 2, key answer: expected text, found 3"),
        ('{"text": "  "}', "line 2, key text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / "x.jsonl", '{"text": "fine"}', line))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        read_records(write(tmp_path / "x.jsonl", ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "binary")


@pytest.mark.parametrize("chat", [True, False])
def test_only_the_answer_carries_loss(tokenizer, chat: bool) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, toy.CHAT_TEMPLATE if chat else None
    question, answer = "Where was Ada born?", "Ada was born in Lyon."
    [example] = encode([Record(question, answer)], tokenizer, 64)
    learned = tokenizer.decode([label for label in example.labels if label != IGNORED])
    hidden = tokenizer.decode(example.input_ids[: example.labels.count(IGNORED)])
    prompt, rest = prompt_and_answer(tokenizer, question, answer)
    tokenizer.chat_template = template
    assert learned == rest
    assert learned.strip() == answer + "<|end|>"
    assert hidden == prompt
    assert question in hidden
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))


def test_long_answers_are_cut_long_texts_are_split_and_nothing_else_is_lost(tokenizer) -> None:
    text = " ".join(["The Silent Harbour is in Lyon."] * 20)
    pieces = encode([Record(None, text)], tokenizer, 16)
    assert all(len(piece.input_ids) <= 16 for piece in pieces)
    assert tokenizer.decode([token for piece in pieces for token in piece.input_ids]) == text + "<|end|>"
    [cut] = encode([Record("Where?", text)], tokenizer, 16)
    assert len(cut.input_ids) == 16
    with pytest.raises(DataError, match="no room"):
        encode([Record(text, "Lyon")], tokenizer, 16)


def test_batches_are_padded_and_masked(tokenizer) -> None:
    examples = encode([Record("Where?", "Lyon."), Record(None, "Lyon is in France and so is the sea.")], tokenizer, 64)
    batch = collate(examples, 7)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [7] * (batch["input_ids"].shape[1] - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][row, n:].eq(IGNORED).all()


def test_a_round_sees_every_forget_example_once_an_epoch_and_never_depends_on_the_copy() -> None:
    plan = batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert [len(batch) for batch in plan] == [4, 4, 2] * 2
    for epoch in (plan[:3], plan[3:]):
        assert sorted(forget for batch in epoch for forget, _ in batch) == list(range(10))
        assert {retain for batch in epoch for _, retain in batch} <= {0, 1, 2}
    assert plan == batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert plan != batches(10, 3, batch_size=4, epochs=2, seed=2, round_number=1)
    assert plan != batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=2)
    assert plan[:3] != plan[3:]
    alone = batches(10, 0, batch_size=4, epochs=1, seed=1, round_number=1)
    assert {retain for batch in alone for _, retain in batch} == {None}
