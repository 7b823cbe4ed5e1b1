"""Alternate answers that the model itself writes: `--alternates generate`, as AltPO makes them.

The published copy is given a question, its true answer, and the instruction of AltPO (Mekala et al., arXiv 2409.13474;
the prompt for Llama 2 in github.com/molereddy/Alternate-Preference-Optimization), and samples `PER_QUESTION` other
answers at temperature 1. A model that follows no instructions continues the text, which gives answers that are plausible
to it, if less to the point. What repeats the true answer, and what is empty, is sampled again.

As with `--retain auto`, the answers come from the first copy that the client trains on, stay the same for all copies and
rounds, and are written to a file in the client's folder: JSON Lines with question, answer and a list `alternate`, which
can be given as --forget. Examples that have alternate answers of their own keep them. Not covered: several processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpunlearn.client.auto_retain import generate, prompt_tokens, write_rows
from mpunlearn.errors import DataError, PlanError
from mpunlearn.lm.model import load
from mpunlearn.lm.processes import processes
from mpunlearn.lm.records import Record, read_records
from mpunlearn.lm.sources import GENERATE, Data
from mpunlearn.progress import Progress, say

INSTRUCTION = "Now write another version of the answer with some alternate plausible facts that change answer details."
"""The paper's instruction."""
BEGINNING = "Alternate Answer:"
"""How the model's answer begins."""
ENDS = ("Question:", "Q:", BEGINNING)
"""What ends an alternate answer, besides the end of the model's turn."""
PER_QUESTION = 5
"""Alternate answers to each question; training draws one of them for each epoch."""
ATTEMPTS = 4
"""An unusable answer is sampled again, at most so many times in all."""
MAX_TOKENS, BATCH = 200, 32


@dataclass(frozen=True)
class Generated:
    """Alternate answers that are generated when the first model is there.

    Args:
        seed: seed of the sampling.
    """

    seed: int

    @classmethod
    def parse(cls, data: Data, seed: int) -> "Generated | None":
        """What `--alternates` asks for; None if it names no model's answers.

        Raises:
            PlanError: there are several processes.
        """
        if data.alternates != GENERATE:
            return None
        if processes() > 1:
            raise PlanError(
                "--alternates generate: needs a single process; generate them once, and give their file as --forget"
            )
        return cls(seed)

    def check(self, records: list[Record]) -> None:
        """Raises a DataError if an example is a plain text, which has no alternate answer."""
        for record in records:
            if record.question is None:
                raise DataError(
                    f"{record.where}: --alternates generate: expected a question with an answer, found a text"
                )

    def write(self, path: Path, records: list[Record], file: Path, device: str | None) -> list[Record]:
        """Reads the alternate answers from `file`, or generates them and writes that file.

        Args:
            path: checkpoint directory of the model.
            records: the questions with their true answers.
            file: a JSON Lines file.
            device: device of the model.

        Returns:
            The records, with alternate answers.

        Raises:
            DataError: the file belongs to other questions, or cannot be read or written; or the model gives a question no
                answer but the true one.
        """
        if file.is_file():
            stored = read_records(file, Data())
            if [(record.question, record.answer) for record in stored] != [(r.question, r.answer) for r in records]:
                raise DataError(
                    f"--alternates generate: {file} was generated for another forget set; remove it to generate new answers"
                )
            say(f"alternate answers: read from {file}, where they were written before")
            return [replace(r, alternates=s.alternates) for r, s in zip(records, stored, strict=True)]
        found = self._generate(path, records, device)
        rows = [
            {"question": record.question, "answer": record.answer, "alternate": answers}
            for record, answers in zip(records, found, strict=True)
        ]
        write_rows(file, rows)
        say(f"alternate answers: up to {PER_QUESTION} for each question, from {path}, written to {file}")
        return [replace(record, alternates=tuple(answers)) for record, answers in zip(records, found, strict=True)]

    def _generate(self, path: Path, records: list[Record], device: str | None) -> list[list[str]]:
        """The alternate answers to each question; errors as for `write`."""
        found = [list(record.alternates) for record in records]
        open_questions = [number for number, answers in enumerate(found) if not answers]
        if not open_questions:
            return found
        model, tokenizer = load(path, device)
        model.eval()
        prompts = {number: _prompt(tokenizer, records[number]) for number in open_questions}
        ends = set(tokenizer.all_special_ids)
        with Progress(PER_QUESTION * len(open_questions), "generating alternate answers") as task:
            for attempt in range(ATTEMPTS):
                wanted = [n for n in open_questions for _ in range(PER_QUESTION - len(found[n]))]
                for start, numbers in _chunks(wanted):
                    with torch.random.fork_rng():
                        torch.manual_seed(self.seed * 1_000_003 + attempt * 100_003 + start)
                        sampled = generate(
                            model, tokenizer, [prompts[n] for n in numbers], MAX_TOKENS, ends, sample=1.0
                        )
                    for number, (tokens, _) in zip(numbers, sampled, strict=True):
                        text = _cut(tokenizer.decode(tokens, skip_special_tokens=True))
                        if text and _plain(text) != _plain(records[number].answer):
                            found[number].append(text)
                    if attempt == 0:
                        task.update(len(numbers))
        for number in open_questions:
            if not found[number]:
                raise DataError(
                    f"{records[number].where or 'an example'}: --alternates generate: the model gave no answer but the true "
                    f"one or none in {ATTEMPTS * PER_QUESTION} attempts; give alternate answers in a column "
                    "(--alternate-key)"
                )
        return found


def _prompt(tokenizer: Any, record: Record) -> list[int]:
    """The tokens of the paper's prompt for a question, up to the beginning of the alternate answer."""
    asked = replace(record, question=f"Question: {record.question}\nAnswer: {record.answer}\n{INSTRUCTION}")
    beginning = tokenizer(BEGINNING if tokenizer.chat_template else f" {BEGINNING}", add_special_tokens=False)[
        "input_ids"
    ]
    return [*prompt_tokens(tokenizer, asked), *beginning]


def _chunks(numbers: list[int]) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(numbers), BATCH):
        yield start, numbers[start : start + BATCH]


def _cut(text: str) -> str:
    """A generated text up to what ends an alternate answer."""
    for end in ENDS:
        text = text.split(end)[0]
    return text.strip()


def _plain(text: str) -> str:
    """A text without differences of case, spaces and final punctuation."""
    return " ".join(text.lower().split()).rstrip(".!")
