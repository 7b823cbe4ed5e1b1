"""`ask`: the prompts of the evaluation, and a table that fits the terminal."""

import json
from pathlib import Path

import pytest

from mpunlearn.cli import main
from mpunlearn.errors import DataError, PlanError
from mpunlearn.evaluation.ask import Answered, Answers, ask
from mpunlearn.evaluation.definitions import DEFINITIONS, Name
from mpunlearn.evaluation.probe import generate
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.model import load


@pytest.fixture
def questions(tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A file of questions, and its content."""
    asked = ["Where was Una Vale born?", "What does Una Vale write?", "Who is Ivo Thorne?"]
    expected = ["In Turin.", "Una Vale writes about harbors.", "A florist."]
    rows = [{"question": question, "answer": answer} for question, answer in zip(asked, expected, strict=True)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, asked, expected


@pytest.mark.parametrize("definitions", DEFINITIONS)
@pytest.mark.parametrize("template", [True, False])
def test_the_prompts_are_those_of_the_evaluation(save_tiny, questions, template: bool, definitions: Name) -> None:
    path, asked, expected = questions
    models = [save_tiny("one"), save_tiny("two", "qwen3")]
    if not template:
        for model in models:
            (model / "chat_template.jinja").unlink()
    answers = ask(models, questions=path, max_new_tokens=8, definitions=definitions)
    assert [(row.question, row.expected) for row in answers.rows] == list(zip(asked, expected, strict=True))
    for number, model in enumerate(models):
        loaded, tokenizer = load(model)
        encoded = Questions(asked, expected, expected, [[], [], []]).encoded(tokenizer, DEFINITIONS[definitions])
        texts = generate(loaded, tokenizer, encoded.prompts, 8)
        assert [row.answers[number] for row in answers.rows] == texts
    assert len({row.answers[0] for row in answers.rows}) > 1
    alone = ask(models[:1], question=asked, max_new_tokens=8, definitions=definitions)
    assert [row.answers for row in alone.rows] == [row.answers[:1] for row in answers.rows]


def test_a_text_is_continued_from_its_middle(save_tiny, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Una Vale writes about harbors. " * 100)
    row = ask([save_tiny()], questions=tmp_path / "text.txt", max_new_tokens=4).rows[0]
    assert "harbors" in row.question
    assert "harbors" in row.expected
    assert 0.5 < len(row.question) / len(row.expected) < 2


def test_options_that_make_no_sense(save_tiny, questions, tmp_path: Path) -> None:
    model, path = save_tiny(), questions[0]
    for options in ({}, {"question": [" "]}, {"questions": path, "limit": 0}, {"questions": path, "max_new_tokens": 0}):
        with pytest.raises(PlanError):
            ask([model], **options)
    with pytest.raises(DataError):
        ask([model], questions=tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("width", [20, 60, 79, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    long = "word " * 60 + "x" * 30
    answers = Answers(
        ["before", "after/" + "long/" * 12], [Answered(long, long, [long, ""]), Answered("q", "", ["a", "b"])]
    )
    lines = answers.table(width).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join(lines).count("word") == 3 * 60
    assert "(nothing)" in answers.table(width)


def test_what_a_model_writes_cannot_control_the_terminal() -> None:
    table = Answers(["m"], [Answered("q", "", ["\x1b[31mred\a"])]).table(80)
    assert "\x1b" not in table
    assert "\a" not in table


def test_from_the_command_line(save_tiny, questions, capsys) -> None:
    model = str(save_tiny())
    arguments = ["--question", "A?", "--question", "B?", "--limit", "3", "--max-new-tokens", "3"]
    assert main(["ask", model, model, "--questions", str(questions[0]), *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["question"] for row in printed["rows"]] == ["A?", "B?", questions[1][0]]
    assert all(len(row["answers"]) == 2 and row["answers"][0] == row["answers"][1] for row in printed["rows"])
    assert main(["ask", model]) == 2
