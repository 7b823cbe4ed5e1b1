"""The sets of a benchmark, tokenized once: questions with a right answer, a paraphrase of it, and wrong ones.

TOFU is read by name (arXiv 2401.06121). Any folder whose files forget.jsonl, retain.jsonl, real_authors.jsonl,
world_facts.jsonl and holdout.jsonl are in its format, some of them missing, is a benchmark too: the embedded one is such a
folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import DataError
from mpunlearn.lm.examples import Example, encode
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data, read_rows

SETS = ("forget", "retain", "real_authors", "world_facts", "holdout")
KEPT = ("retain", "real_authors", "world_facts")
"""The sets of model utility."""
OPTIONS = ("real_authors", "world_facts")
"""Sets whose probability is normalized over the options, and whose right answer is the answer itself."""


@dataclass(frozen=True)
class Questions:
    """One set of a benchmark."""

    questions: list[str]
    answers: list[str]
    paraphrases: list[str]
    """The right answers of the truth ratio."""
    wrong: list[list[str]]

    def __len__(self) -> int:
        return len(self.questions)

    def encoded(self, tokenizer: Any) -> "Encoded":
        """All answers as tokens."""

        def tokens(answers: list[str]) -> list[Example]:
            pairs = zip(self.questions, answers, strict=True)
            return encode([Record(question, answer) for question, answer in pairs], tokenizer, 1 << 30)

        # Real authors' and world facts' right answers are the answers themselves: no need to ask twice.
        same = self.paraphrases == self.answers
        answers = tokens(self.answers)
        wrong = [
            encode([Record(question, answer) for answer in options], tokenizer, 1 << 30)
            for question, options in zip(self.questions, self.wrong, strict=True)
        ]
        return Encoded(answers, answers if same else tokens(self.paraphrases), wrong)


@dataclass(frozen=True)
class Encoded:
    """One set under one tokenizer."""

    answers: list[Example]
    paraphrases: list[Example]
    wrong: list[list[Example]]


def read_sets(
    benchmark: str, forget_split: str, holdout: str | None, data: Data, forget: str | None = None
) -> dict[str, Questions]:
    """The sets of a benchmark by name.

    Args:
        benchmark: "tofu", or a folder.
        forget_split: which of TOFU's forget sets, such as forget10.
        holdout: a source of questions that no model was trained on, for membership inference (default: the benchmark's own, if
            it has one).
        data: where local mirrors are.
        forget: another source for the forget set.

    Raises:
        DataError: a set cannot be read.
    """
    if benchmark == "tofu":
        sources = {
            "forget": f"tofu/{forget_split}_perturbed",
            "retain": "tofu/retain_perturbed",
            "real_authors": "tofu/real_authors_perturbed",
            "world_facts": "tofu/world_facts_perturbed",
        }
    else:
        folder = Path(benchmark)
        sources = {name: str(folder / f"{name}.jsonl") for name in SETS if (folder / f"{name}.jsonl").is_file()}
        if "forget" not in sources:
            raise DataError(
                f"--benchmark {benchmark}: expected tofu, muse/news, muse/books, or a folder with forget.jsonl"
            )
    sources |= {"forget": forget} if forget else {}
    sources |= {"holdout": holdout} if holdout else {}
    return {name: _read(source, name, data) for name, source in sources.items()}


def _read(source: str, name: str, data: Data) -> Questions:
    found = Questions([], [], [], [])
    for where, row in read_rows(source, data):
        correct = "answer" if name in OPTIONS else "paraphrased_answer"
        needed = ("question", "answer") if name == "holdout" else ("question", "answer", correct, "perturbed_answer")
        for column in needed:
            value = row.get(column)
            good = isinstance(value, list) and value if column == "perturbed_answer" else isinstance(value, str)
            if not good:
                raise DataError(
                    f"{where}, column {column}: expected {'texts' if value else 'a text'}, found {value!r:.60}"
                )
        found.questions.append(row["question"])
        found.answers.append(row["answer"])
        found.paraphrases.append(str(row.get(correct, row["answer"])))
        found.wrong.append(row.get("perturbed_answer") or [])
    if not found:
        raise DataError(f"{source}: holds no questions")
    return found
