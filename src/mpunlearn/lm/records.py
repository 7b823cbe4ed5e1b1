"""Examples in one form, whatever the columns of the data: a question with its answer, or a plain text.

The columns of a row determine what it is: `question` and `answer`, `prompt` and `completion`, a chat (`messages`), or a
plain `text`. Options can name other columns. In a chat, the last message is the answer, the one before it is the
question, and earlier ones are the history. `sources` reads the rows.

Objectives such as DPO also need an alternate answer to each forget question, which the model should learn to prefer. It
comes from a column, from a file of refusals, or from the built-in list below.

Not covered: images, and tool calls in chats.
"""

import hashlib
import json
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpunlearn.errors import DataError
from mpunlearn.lm.sources import Data, Source, read_rows, read_text

FORMS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
"""The recognized combinations of columns. The first one that a row has is used."""
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
"""Built-in alternate answers, for objectives that accept any refusal."""


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
    """Where it was read from, for error messages."""
    template: tuple[tuple[str, str | int | float | bool], ...] = ()
    """Values for the chat template, as (name, value)."""


def read_records(source: Source, data: Data | None = None, role: str = "forget") -> list[Record]:
    """Reads all examples of a source.

    Args:
        source: a file, a folder, a benchmark, a dataset on the Hugging Face Hub, or the examples; see `sources`.
        data: columns, split and local mirrors.
        role: "forget" or "retain": which part of a benchmark to read if the source does not say.

    Raises:
        DataError: the source cannot be found or read, has no rows, or has a row that is not an example.
    """
    data = data or Data()
    records = [in_chat(_record(where, row, data), data) for where, row in read_rows(source, data, role)]
    if not records:
        raise DataError(f"{source if isinstance(source, str | Path) else f'the {role} examples'}: contains no examples")
    return records


def in_chat(record: Record, data: Data | None) -> Record:
    """A record with the system prompt and the values for the chat template that `data` gives; a text stays as it is.

    A chat that begins with a system message keeps it.
    """
    if data is None or record.question is None:
        return record
    own = record.history[:1] and record.history[0][0] == "system"
    first = (("system", data.system_prompt),) if data.system_prompt is not None and not own else ()
    values = tuple(sorted((data.template_kwargs or {}).items()))
    return replace(record, history=(*first, *record.history), template=values)


def records_digest(records: list[Record]) -> str:
    """SHA-256 (hex) of the examples, in order."""

    def content(record: Record) -> tuple[Any, ...]:
        """Everything but `where`. Without values for the template, the same as before there were any."""
        *fields, _, template = astuple(record)
        return (*fields, template) if template else tuple(fields)

    return hashlib.sha256(json.dumps([content(record) for record in records]).encode()).hexdigest()


def record_text(record: Record) -> str:
    """The text of an example as one string, for commitments: its fields as JSON, without alternate answers."""
    fields = {"question": record.question, "answer": record.answer, "history": record.history}
    return json.dumps({key: value for key, value in fields.items() if value}, ensure_ascii=False, sort_keys=True)


def with_alternates(records: list[Record], data: Data, refusals: bool | str, seed: int) -> list[Record]:
    """The records with at least one alternate answer each: their own, or a randomly chosen refusal.

    Args:
        records: questions with answers.
        data: names the file of refusals, if there is one.
        refusals: whether to use the built-in refusals if there is no such file, or the one refusal to use.
        seed: seed for choosing refusals.

    Raises:
        DataError: an example has no alternate answer, or is a plain text.
    """
    choices: tuple[str, ...] = (refusals,) if isinstance(refusals, str) else REFUSALS if refusals else ()
    if data.alternates is not None:
        lines = read_text(Path(data.alternates)).splitlines()
        choices = tuple(line.strip() for line in lines if line.strip())
        if not choices:
            raise DataError(f"{data.alternates}: contains no refusals; expected one per line")
    random = np.random.default_rng([seed, len(choices)])
    completed = []
    for record in records:
        alternates = record.alternates or ((choices[random.integers(len(choices))],) if choices else ())
        if record.question is None or not alternates:
            raise DataError(
                f"{record.where}: expected a question with an alternate answer in column {data.alternate_key!r}; name "
                "another column with --alternate-key, or give a file of refusals with --alternates, or --alternates generate"
            )
        completed.append(replace(record, alternates=alternates))
    return completed


def _record(where: str, row: dict[str, Any], data: Data) -> Record:
    """Converts a row to a record."""
    columns = _columns(where, row, data)
    if columns == ("messages",):
        return _chat(where, "messages", row["messages"])
    if len(columns) == 1:
        return Record(None, _checked(where, columns[0], row[columns[0]]), where=where)
    question, answer = columns
    if isinstance(row[question], list):
        answers = row[answer] if isinstance(row[answer], list) else [{"role": "assistant", "content": row[answer]}]
        return _chat(where, f"{question} and {answer}", [*row[question], *answers])
    alternates = row.get(data.alternate_key) or ()
    alternates = alternates if isinstance(alternates, list | tuple) else (alternates,)
    return Record(
        _checked(where, question, row[question]),
        _checked(where, answer, row[answer]),
        alternates=tuple(_checked(where, data.alternate_key, alternate) for alternate in alternates),
        where=where,
    )


def _columns(where: str, row: dict[str, Any], data: Data) -> tuple[str, ...]:
    """The columns with a row's example: those that options name, or the first combination in `FORMS` that it has."""
    if data.text_key is not None:
        named: tuple[str, ...] = (data.text_key,)
    elif data.question_key is not None or data.answer_key is not None:
        named = (data.question_key or "question", data.answer_key or "answer")
    else:
        for form in FORMS:
            if all(column in row for column in form):
                return form
        expected = "; ".join(" and ".join(form) for form in FORMS)
        raise DataError(
            f"{where}: has the columns {', '.join(row) or 'none'}; expected one of: {expected} (to use other columns, "
            "give --question-key and --answer-key, or --text-key)"
        )
    if missing := [column for column in named if column not in row]:
        raise DataError(f"{where}: has no column {missing[0]!r}, only {', '.join(row) or 'none'}")
    return named


def _chat(where: str, column: str, messages: Any) -> Record:
    """Converts a chat to a record.

    Args:
        where: location of the row, for error messages.
        column: name of the column, for error messages.
        messages: the content of the column, which should be a list of messages.
    """
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise DataError(
            f"{where}, column {column}: expected a list of messages with role and content that ends with a message "
            f"from the user and one from the assistant, found {messages!r:.60}"
        )
    *history, question, answer = messages
    return Record(
        _checked(where, column, question["content"]),
        _checked(where, column, answer["content"]),
        tuple((message["role"], message["content"]) for message in history),
        where=where,
    )


def _checked(where: str, column: str, value: Any) -> str:
    """Returns the value, which must be text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, column {column}: expected text, found {value!r:.60}")
    return value
