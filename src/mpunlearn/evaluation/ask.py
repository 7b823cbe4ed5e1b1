"""The command `ask`: how several models answer the same questions, side by side.

The prompts are those of `evaluate`, and answers are generated greedily, so what is printed is what the metrics score.
A plain text has no question: its first half is the prompt, and the rest what is expected. Models are loaded one after
another. Not covered: sampling, and chats in which the model's own answers are part of the history.
"""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import PlanError
from mpunlearn.evaluation.definitions import DEFINITIONS, Definitions, Name
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.progress import printable

if TYPE_CHECKING:
    from mpunlearn.lm.records import Record

TEXT_TOKENS = 256
"""How much of a plain text is used, half of it as the prompt."""
NARROW = 24
"""Columns narrower than this are printed below one another."""
GAP = "  "


@dataclass(frozen=True)
class Answered:
    """One question, and the answers of all models."""

    question: str
    expected: str
    """The answer in the data; empty if there is none."""
    answers: list[str]
    """One answer per model."""


@dataclass(frozen=True)
class Answers:
    """The answers of several models."""

    models: list[str]
    rows: list[Answered]

    def table(self, width: int | None = None) -> str:
        """The answers as text, wrapped to a width (default: that of the terminal)."""
        width = width or shutil.get_terminal_size((100, 24)).columns
        blocks = []
        for row in self.rows:
            columns = [("expected", row.expected)] if row.expected else []
            columns += list(zip(self.models, row.answers, strict=True))
            question = textwrap.fill(_line(row.question), width)
            blocks.append(f"{question}\n{_side_by_side(columns, width)}")
        return "\n\n".join(blocks)

    def to_json(self) -> dict[str, Any]:
        """The answers as JSON."""
        return dataclasses.asdict(self)


def ask(
    models: Sequence[str | Path],
    *,
    questions: str | Path | None = None,
    question: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int = 200,
    definitions: Name = "openunlearning",
    data: Data | None = None,
) -> Answers:
    """Prints the answers of one or more models to the same questions side by side.

    Args:
        models: The checkpoint directories to compare, such as the model before and after unlearning.
        questions: The questions, with expected answers, in any format that --forget accepts. Of a plain text, the first
            half is the prompt.
        question: A question as text. Can be given several times.
        limit: Maximum number of questions.
        max_new_tokens: Maximum length of generated answers, in tokens.
        definitions: Where prompts end, as for `evaluate`. Without a chat template the strict prompt is that of training.
        data: How to read the questions.

    Returns:
        The answers.

    Raises:
        FileError: A checkpoint cannot be read.
        DataError: The questions cannot be read.
        PlanError: There is no question, or an option has an impossible value.
    """
    needs("client", "ask")
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.lm.records import Record, in_chat, read_records

    paths = [as_path(model, "models") for model in models]
    if questions is None and not question:
        raise PlanError("give --questions FILE, or --question TEXT")
    for option, value in {"--limit": limit, "--max-new-tokens": max_new_tokens}.items():
        if value is not None and value < 1:
            raise PlanError(f"{option}: expected at least 1, found {value}")
    if blank := [text for text in question if not text.strip()]:
        raise PlanError(f"--question: expected text, found {blank[0]!r:.40}")
    if definitions not in DEFINITIONS:
        raise PlanError(f"--definitions: expected one of {', '.join(DEFINITIONS)}, found {definitions!r:.40}")
    for path in paths:
        Checkpoint(path)  # catches a mistyped path before the first model answers
    records = [in_chat(Record(text, ""), data) for text in question]
    if questions is not None:
        records += read_records(as_path(questions, "--questions"), data, "forget")
    records = records[:limit]
    columns = [_answers(path, records, max_new_tokens, DEFINITIONS[definitions]) for path in paths]
    rows = [
        Answered(first.question, first.expected, [first.answers[0], *(answered.answers[0] for answered in others)])
        for first, *others in zip(*columns, strict=True)
    ]
    return Answers([str(path) for path in paths], rows)


def _answers(path: Path, records: "list[Record]", max_new_tokens: int, definitions: Definitions) -> list[Answered]:
    """The answers of one model to all records."""
    from mpunlearn.evaluation.probe import generate
    from mpunlearn.evaluation.prompts import asked
    from mpunlearn.lm.examples import encode
    from mpunlearn.lm.model import load

    model, tokenizer = load(path)
    shown: list[tuple[str, str]] = []
    prompts: list[list[int]] = []
    for record in records:
        if record.question is None:
            ids = encode([record], tokenizer, TEXT_TOKENS)[0].input_ids
            half = len(ids) // 2
            shown.append((tokenizer.decode(ids[:half]), tokenizer.decode(ids[half:], skip_special_tokens=True)))
            prompts.append(ids[:half])
        else:
            # Where the prompt ends is found with the help of an answer, and does not depend on which.
            whole = dataclasses.replace(record, answer=record.answer or "None")
            shown.append((record.question, record.answer))
            prompts.append(asked(whole, tokenizer, definitions).prompt)
    texts = generate(model, tokenizer, prompts, max_new_tokens, mask_pad=definitions.mask_pad)
    return [Answered(question, expected, [text]) for (question, expected), text in zip(shown, texts, strict=True)]


def _side_by_side(columns: Sequence[tuple[str, str]], width: int) -> str:
    """Columns of text with their titles, next to one another, or below one another if the width is too small."""
    each = (width - len(GAP) * (len(columns) - 1)) // len(columns)
    if each < NARROW:
        indent = GAP * 2
        return "\n".join(
            f"{textwrap.fill(title, width)}\n"
            + textwrap.fill(_line(text) or "(nothing)", width, initial_indent=indent, subsequent_indent=indent)
            for title, text in columns
        )
    cells = [
        [*textwrap.wrap(title, each), "-" * each, *(textwrap.wrap(_line(text), each) or ["(nothing)"])]
        for title, text in columns
    ]
    titles = max(len(textwrap.wrap(title, each)) for title, _ in columns)
    for cell in cells:
        cell[0:0] = [""] * (titles - cell.index("-" * each))
    return "\n".join(
        GAP.join(part.ljust(each) for part in parts).rstrip() for parts in zip_longest(*cells, fillvalue="")
    )


def _line(text: str) -> str:
    """A text in one line, with unprintable characters escaped: a model's answer can hold anything."""
    return printable(" ".join(text.split()))
