"""Where examples come from: files, data sets and benchmarks, read into one form.

A source is a file (JSON lines or a JSON array, CSV, parquet, or a text file), a folder that `datasets` saved, a benchmark by
name (`tofu/forget10`, `muse/news`), or a data set of the Hugging Face hub (`owner/name`, `owner/name:config`). Its rows are
questions with answers, prompts with completions, chats (`messages`), or plain texts, whichever columns it has.

Errors name the file, the line and the column. Not covered: images, tools in chats, and data sets too large for memory: what a
party asks to be forgotten is small.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpunlearn.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for errors, and the row."""

FORMS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
"""The columns that are recognised, in this order."""

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

_BENCHMARKS = {
    "tofu": ("locuslab/TOFU", "{part}", "train"),
    "muse/news": ("muse-bench/MUSE-News", "{folder}", "{part}"),
    "muse/books": ("muse-bench/MUSE-Books", "{folder}", "{part}"),
}
"""Benchmark → its repository on the hub, configuration and split (TOFU: arXiv 2401.06121; MUSE: arXiv 2407.06460).

A part of MUSE may name the configuration: muse/news/knowmem/forget_qa; else it is one of the raw texts."""
_MUSE_PARTS = {"forget": "forget", "retain": "retain1"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Data:
    """How examples are read. Only the data owner knows this."""

    question_key: str | None = None
    """column of questions or prompts (default: question or prompt)"""
    answer_key: str | None = None
    """column of answers or completions (default: answer or completion)"""
    text_key: str | None = None
    """column of plain texts (default: text)"""
    alternate_key: str = "alternate"
    """column of alternate answers to forget questions, a text or a list of texts; used by dpo and altpo"""
    alternates: str | None = None
    """file of refusals, one a line, one of which is drawn for each forget question (default for dpo: our own list)"""
    split: str = "train"
    """split of data sets that have several"""
    data_root: str | None = None
    """folder with local mirrors of benchmarks and data sets, such as DATA_ROOT/tofu/forget10.json"""


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


def read_rows(source: str, data: Data, role: str = "forget") -> Iterator[Row]:
    """The rows of a source, whatever their columns, each with where it stands. Arguments and errors as for `read_records`."""
    path = Path(source)
    if path.is_dir():
        return _saved(path, data.split)
    if path.is_file() or path.suffix in _SUFFIXES:
        return _file(path)
    if benchmark := _benchmark(source, role):
        return _mirrored(source, *benchmark, data)
    if name := _HUB_NAME.fullmatch(source):
        return _mirrored(source, name["name"], name["config"], data.split, [], data)
    raise DataError(f"{source}: no such file or folder, and not the name of a benchmark or data set")


def _benchmark(source: str, role: str) -> tuple[str, str, str, list[str]] | None:
    """Repository, configuration, split and the places of a local mirror of a benchmark's part."""
    for name, (repository, config, split) in _BENCHMARKS.items():
        if source != name and not source.startswith(name + "/"):
            continue
        part = source[len(name) + 1 :] or (_MUSE_PARTS[role] if name.startswith("muse") else "")
        if not part:
            raise DataError(f"{source}: name a part of the benchmark, such as {name}/forget10")
        folder, _, last = part.rpartition("/")
        names = {"folder": folder or "raw", "part": last}
        return repository, config.format(**names), split.format(**names), [f"{name}/{part}", part]
    return None


def _mirrored(
    source: str, repository: str, config: str | None, split: str, places: list[str], data: Data
) -> Iterator[Row]:
    """Rows of a local mirror, or else of the hub."""
    root = Path(data.data_root) if data.data_root is not None else None
    if root is not None:
        for place in places:
            for suffix in _SUFFIXES:
                if (file := root / f"{place}{suffix}").is_file():
                    return _file(file)
        if not (root / repository).is_dir():
            tried = ", ".join(str(root / place) + ".json" for place in [*places, repository])
            raise DataError(f"{source}: not below --data-root {root}; looked for {tried} and the like")
    import datasets

    try:
        found = datasets.load_dataset(str(root / repository) if root else repository, config, split=split)
    except Exception as error:  # the library raises its own kinds, the network's, and the file formats'
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source}: cannot be loaded from {repository} ({type(error).__name__}: {reason}); without the hub, keep a "
            "mirror below --data-root"
        ) from error
    return ((f"{source}, row {number}", row) for number, row in enumerate(found, start=1))


def _saved(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a folder that `datasets` saved ({str(error).splitlines()[0]}); expected save_to_disk's"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path}: has no split {split!r}; found {', '.join(found)}, choose with --split")
        found = found[split]
    return ((f"{path}, row {number}", row) for number, row in enumerate(found, start=1))


def _file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _parquet(path)
    text = _text(path)
    if path.suffix == ".csv":
        return _csv(path, text)
    if path.suffix == ".txt":
        return iter([(str(path), {"text": text})])
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _array(path, text)
    return _lines(path, text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); expected one JSON object per line") from None
        yield where, _object(where, value)


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); expected an array of objects, or one object per line") from None
    for number, value in enumerate(values, start=1):
        yield f"{path}, entry {number}", _object(f"{path}, entry {number}", value)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"question": …, "answer": …}}, found {value!r:.60}')
    return value


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: expected {len(reader.fieldnames or [])} columns as in the first line")
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


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
