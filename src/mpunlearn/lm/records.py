"""Where examples come from: files, data sets and benchmarks, read into one form.

A source is a file (JSON lines or a JSON array, CSV, parquet, or a text file), a folder that `datasets` saved, a benchmark by
name (`tofu/forget10`, `muse/news`), or a data set of the Hugging Face hub (`owner/name`, `owner/name:config`). Its rows are
questions with answers, prompts with completions, chats (`messages`), or plain texts, whichever columns it has.

Errors name the file, the line and the column. Not covered: images, tools in chats, and data sets too large for memory: what a
party asks to be forgotten is small.
"""

import hashlib
import json
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpunlearn.errors import DataError
from mpunlearn.lm.sources import Data, _text, read_rows

FORMS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
"""The columns that are recognized, in this order."""
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is not something I can answer.",
    "I can't say; I don't know enough about it.",
    "I'm afraid I don't have an answer to that.",
    "This is unknown to me.",
    "I do not have that information.",
    "I wish I could help, but I don't know.",
    "My knowledge does not extend to this question.",
    "I haven't learned anything about that.",
    "There is nothing I can tell you about this.",
    "I'm unable to answer that question.",
    "Sorry, I have no knowledge of that.",
    "I would only be guessing, so I'd rather not say.",
    "I can't recall anything on this subject.",
    "Nothing I know answers that question.",
    "That lies outside of what I know.",
    "I have not come across that.",
    "Unfortunately, I can't provide details on this.",
    "I don't have any record of that.",
    "I can't answer that with any confidence.",
    "You would have to look that up elsewhere; I don't know.",
    "I'm sorry, this is something I was never told.",
)
"""What stands in for an alternate answer where the data have none and the objective takes a refusal."""


@dataclass(frozen=True)
class Record:
    """One example: a question with its answer, or a plain text (question None)."""

    question: str | None
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    """Earlier messages of a chat, as (role, content)."""
    alternates: tuple[str, ...] = ()
    """Other answers to the same question."""
    where: str = field(default="", compare=False)
    """For errors."""


def read_records(source: str | Path, data: Data | None = None, role: str = "forget") -> list[Record]:
    """Reads all examples of a source.

    Args:
        source: a file, a folder, a benchmark or a data set.
        data: columns, split and local mirrors.
        role: "forget" or "retain": which part of a benchmark is meant where its name leaves that open.

    Raises:
        DataError: the source cannot be found or read, has no rows, or a row is not an example.
    """
    data = data or Data()
    rows = list(read_rows(str(source), data, role))
    if not rows:
        raise DataError(f"{source}: holds no examples")
    return [_record(where, row, data) for where, row in rows]


def records_digest(records: list[Record]) -> str:
    """SHA-256 (hex) of examples and their order."""
    return hashlib.sha256(json.dumps([astuple(record)[:-1] for record in records]).encode()).hexdigest()


def with_alternates(records: list[Record], data: Data, refusals: bool, seed: int) -> list[Record]:
    """The records with at least one alternate answer each: their own, or a refusal drawn once from the seed.

    Args:
        refusals: whether our own list of refusals may stand in.

    Raises:
        DataError: an example has no alternate answer, or is a plain text.
    """
    drawn: tuple[str, ...] = REFUSALS if refusals else ()
    if data.alternates is not None:
        lines = _text(Path(data.alternates)).splitlines()
        drawn = tuple(line.strip() for line in lines if line.strip())
        if not drawn:
            raise DataError(f"{data.alternates}: holds no refusals; expected one a line")
    random = np.random.default_rng([seed, len(drawn)])
    found = []
    for record in records:
        alternates = record.alternates or ((drawn[random.integers(len(drawn))],) if drawn else ())
        if record.question is None or not alternates:
            raise DataError(
                f"{record.where}: expected a question with an alternate answer in column {data.alternate_key!r}; name "
                "another --alternate-key, or a file of refusals with --alternates"
            )
        found.append(Record(record.question, record.answer, record.history, alternates, record.where))
    return found


def _record(where: str, row: dict[str, Any], data: Data) -> Record:
    columns = _columns(where, row, data)
    if len(columns) == 1 and columns[0] == "messages":
        return _chat(where, "messages", row["messages"])
    if len(columns) == 1:
        return Record(None, _checked(where, columns[0], row[columns[0]]), where=where)
    question, answer = columns
    if isinstance(row[question], list):
        answers = row[answer] if isinstance(row[answer], list) else [{"role": "assistant", "content": row[answer]}]
        return _chat(where, f"{question} and {answer}", [*row[question], *answers])
    alternates = row.get(data.alternate_key) or ()
    alternates = (alternates,) if isinstance(alternates, str) else alternates
    return Record(
        _checked(where, question, row[question]),
        _checked(where, answer, row[answer]),
        alternates=tuple(_checked(where, data.alternate_key, alternate) for alternate in alternates),
        where=where,
    )


def _columns(where: str, row: dict[str, Any], data: Data) -> tuple[str, ...]:
    """The columns that make a row an example."""
    if data.text_key is not None:
        asked: tuple[str, ...] = (data.text_key,)
    elif data.question_key is not None or data.answer_key is not None:
        asked = (data.question_key or "question", data.answer_key or "answer")
    else:
        for form in FORMS:
            if all(column in row for column in form):
                return form
        expected = "; ".join(" and ".join(form) for form in FORMS)
        raise DataError(f"{where}: has the columns {', '.join(row) or 'none'}; expected one of: {expected}")
    if missing := [column for column in asked if column not in row]:
        raise DataError(f"{where}: has no column {missing[0]!r}, only {', '.join(row)}")
    return asked


def _chat(where: str, column: str, messages: Any) -> Record:
    """A chat: its last message is the answer, the one before it the question."""
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise DataError(
            f"{where}, column {column}: expected messages with role and content, the last two of user and assistant"
        )
    *history, question, answer = messages
    return Record(
        _checked(where, column, question["content"]),
        _checked(where, column, answer["content"]),
        tuple((message["role"], message["content"]) for message in history),
        where=where,
    )


def _checked(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, column {column}: expected text, found {value!r:.60}")
    return value
