"""Alternate answers that the model writes itself."""

from pathlib import Path
from typing import Any

import pytest
from tests.client.test_auto_retain import lines
from tests.client.training import distance, read_all

from mpunlearn import Perturbation, forget, run, unlearn
from mpunlearn.client import alternates
from mpunlearn.client.alternates import Generated
from mpunlearn.errors import DataError, PlanError
from mpunlearn.lm.model import load_tokenizer
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.plan import Training

QUICK = Training(objective="altpo", alpha=0.0, epochs=1, batch_size=3, learning_rate=1e-3, max_length=128)
SELF = Data(alternates="generate")


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(alternates, "PER_QUESTION", 2)
    monkeypatch.setattr(alternates, "MAX_TOKENS", 8)


@pytest.mark.parametrize("chat", [True, False])
def test_a_run_generates_once_and_goes_on_with_the_same_answers(save_tiny, tmp_path: Path, examples, chat) -> None:
    path, out = save_tiny(max_position_embeddings=512), tmp_path / "r"
    if not chat:
        (path / "chat_template.jinja").unlink()
    options: dict[str, Any] = {"forget": examples[0], "perturbation": Perturbation(copies=2), "data": SELF}
    run(path, out=out, rounds=1, training=QUICK, **options)
    file = out / "client" / "memory" / "alternates.jsonl"
    before = file.read_bytes()
    rows = lines(file)
    assert [row["question"] for row in rows] == [row["question"] for row in lines(examples[0])]
    assert all(1 <= len(row["alternate"]) <= 2 and row["answer"] not in row["alternate"] for row in rows)
    assert file.stat().st_mode & 0o077 == 0
    run(path, out=out, rounds=2, training=QUICK, **options)
    assert file.read_bytes() == before
    file.unlink()
    with pytest.raises(DataError, match="alternate answers of round 1 is gone"):
        run(path, out=out, rounds=3, training=QUICK, **options)


def test_the_file_gives_the_same_update_and_the_seed_other_answers(save_tiny, tmp_path: Path, examples) -> None:
    path = save_tiny(max_position_embeddings=512)
    one = unlearn(path, forget=examples[0], out=tmp_path / "u", training=QUICK, data=SELF)
    file = tmp_path / "u.alternates.jsonl"
    two = unlearn(path, forget=file, out=tmp_path / "v", training=QUICK)
    assert distance(read_all(one), read_all(two)) == 0
    records = [Record(row["question"], row["answer"]) for row in lines(examples[0])]
    again = Generated(0).write(path, records, tmp_path / "again.jsonl", "cpu")
    assert [list(record.alternates) for record in again] == [row["alternate"] for row in lines(file)]
    assert Generated(1).write(path, records, tmp_path / "other.jsonl", "cpu") != again
    assert Generated(0).write(tmp_path / "nowhere", records, tmp_path / "again.jsonl", "cpu") == again
    with pytest.raises(DataError, match="was generated for another forget set"):
        Generated(0).write(path, records[1:], tmp_path / "again.jsonl", "cpu")


def test_own_alternates_stay_and_forget_writes_beside_the_result(save_tiny, tmp_path: Path) -> None:
    path = save_tiny(max_position_embeddings=512)
    rows = [{"question": "Who?", "answer": "Ada.", "alternate": "Mary."}, {"question": "Where?", "answer": "In York."}]
    forget(path, forget=rows, out=tmp_path / "m", training=QUICK, data=SELF)
    written = lines(tmp_path / "m.alternates.jsonl")
    assert written[0]["alternate"] == ["Mary."]
    assert written[1]["alternate"]


def test_the_prompt_is_the_papers(save_tiny) -> None:
    tokenizer = load_tokenizer(save_tiny())
    prompt = tokenizer.decode(alternates._prompt(tokenizer, Record("Who?", "Ada.")))
    asked = f"Question: Who?\nAnswer: Ada.\n{alternates.INSTRUCTION}"
    assert prompt == f"<|user|>{asked}<|assistant|>Alternate Answer:"
    assert alternates._cut(" In Rome. \nQuestion: Why?") == "In Rome."


def test_errors(save_tiny, tmp_path: Path, monkeypatch) -> None:
    path = save_tiny(max_position_embeddings=512)
    with pytest.raises(DataError, match="expected a question with an answer, found a text"):
        unlearn(path, forget=["A text."], out=tmp_path / "u", training=QUICK, data=SELF)
    monkeypatch.setattr(alternates, "generate", lambda model, tokenizer, prompts, *_, **__: [([], True)] * len(prompts))
    with pytest.raises(DataError, match="no answer but the true one or none in 8 attempts"):
        Generated(0).write(path, [Record("Who?", "Ada.")], tmp_path / "a.jsonl", "cpu")
    assert not (tmp_path / "a.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="--alternates generate: needs a single process"):
        Generated.parse(SELF, 0)
    assert Generated.parse(Data(), 0) is None
