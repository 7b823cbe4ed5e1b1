"""The question sets of a benchmark: questions, each with a correct answer, a paraphrase of it, and wrong answers.

TOFU is read by name (arXiv 2401.06121). A folder can also be a benchmark, with the files forget.jsonl, retain.jsonl,
real_authors.jsonl, world_facts.jsonl and holdout.jsonl in TOFU's format; only the first is required. All rows are
checked before a model is loaded, so that mistakes in the data are reported at once. Not covered: benchmarks of another form
(see `named`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpunlearn.errors import DataError
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.prompts import Asked, asked
from mpunlearn.lm.examples import Example
from mpunlearn.lm.records import Record, in_chat
from mpunlearn.lm.sources import Data, Source, read_rows

SETS = ("forget", "retain", "real_authors", "world_facts", "holdout")
BENCHMARKS = (
    "tofu, muse/news, muse/books, wmdp/bio, wmdp/cyber, wmdp/chem, rwku/TARGET, knowundo/privacy, knowundo/copyright"
)
"""All benchmarks by name, for messages."""
UTILITY_SETS = ("retain", "real_authors", "world_facts")
"""Sets that model utility is computed from."""
OPTION_SETS = ("real_authors", "world_facts")
"""Sets whose probability is normalized over the answer options, and whose truth ratio uses the answer itself."""


@dataclass(frozen=True)
class Questions:
    """One question set. All lists have one entry per question."""

    questions: list[str]
    answers: list[str]
    paraphrases: list[str]
    """The correct answers that the truth ratio uses."""
    wrong: list[list[str]]
    """The wrong answers to each question."""
    entities: list[str] = field(default_factory=list)
    """The fact in each answer, such as a name, empty where it is not known. An empty list if no row has one."""
    rewordings: list[str] = field(default_factory=list)
    """Each question in other words, likewise."""

    def __len__(self) -> int:
        return len(self.questions)

    def encoded(self, tokenizer: Any, definitions: Definitions = OPENUNLEARNING, data: Data | None = None) -> "Encoded":
        """All answers, tokenized together with their questions.

        Args:
            tokenizer: the model's tokenizer.
            definitions: where a prompt ends.
            data: the system prompt and the values for the chat template.
        """

        def tokens(question: str, answers: list[str]) -> list[Asked]:
            records = [in_chat(Record(question, answer), data) for answer in answers]
            return [asked(record, tokenizer, definitions) for record in records]

        def of_all(answers: list[str]) -> list[Asked]:
            pairs = zip(self.questions, answers, strict=True)
            return [one for question, answer in pairs for one in tokens(question, [answer])]

        whole = of_all(self.answers)
        answers = [one.example for one in whole]
        shared = self.paraphrases == self.answers
        return Encoded(
            answers,
            answers if shared else [one.example for one in of_all(self.paraphrases)],
            [
                [one.example for one in tokens(question, options)]
                for question, options in zip(self.questions, self.wrong, strict=True)
            ],
            [one.prompt for one in whole],
        )


@dataclass(frozen=True)
class Encoded:
    """One question set, tokenized."""

    answers: list[Example]
    paraphrases: list[Example]
    """The same list object as `answers` if the set has no paraphrases of its own, so that they are probed only once."""
    wrong: list[list[Example]]
    prompts: list[list[int]]
    """What answers are generated after."""


def read_sets(
    benchmark: str | Mapping[str, Source],
    forget_split: str,
    holdout: Source | None,
    data: Data,
) -> dict[str, Questions]:
    """The question sets of a benchmark, by name.

    Args:
        benchmark: "tofu", a folder, or the sets themselves by name.
        forget_split: which of TOFU's forget sets to read, such as forget10.
        holdout: a source of questions that no model was trained on, for membership inference (default: the benchmark's
            own, if it has one).
        data: where local mirrors are.

    Raises:
        DataError: a set cannot be read, or is not in TOFU's format.
    """
    sources: dict[str, Source]
    if isinstance(benchmark, Mapping):
        sources = dict(benchmark)
        if "forget" not in sources or (unknown := sorted(set(sources) - set(SETS))):
            found = f"found {unknown[0]!r:.40}" if "forget" in sources else "found no forget set"
            raise DataError(f"the benchmark: expected a forget set and others of {', '.join(SETS)}, {found}")
    elif benchmark == "tofu":
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
            raise DataError(f"--benchmark {benchmark}: expected one of {BENCHMARKS}, or a folder with forget.jsonl")
    sources |= {"holdout": holdout} if holdout is not None else {}
    return {name: _read(source, name, data) for name, source in sources.items()}


def _read(source: Source, name: str, data: Data) -> Questions:
    """Reads one set. The holdout set needs no paraphrases or wrong answers; entity and paraphrased_question are
    optional everywhere.
    """
    correct = "answer" if name in OPTION_SETS else "paraphrased_answer"
    required = ("question", "answer") if name == "holdout" else ("question", "answer", correct, "perturbed_answer")
    result = Questions([], [], [], [])
    entities: list[str] = []
    rewordings: list[str] = []
    for where, row in read_rows(source, data, "forget" if isinstance(source, str) else name):
        for column in required:
            value, expected = row.get(column), "a list of texts" if column == "perturbed_answer" else "text"
            texts = value if column == "perturbed_answer" else [value]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{where}, column {column}: expected {expected}, found {value!r:.60}")
        result.questions.append(row["question"])
        result.answers.append(row["answer"])
        result.paraphrases.append(str(row.get(correct, row["answer"])))
        result.wrong.append(row.get("perturbed_answer") or [])
        for column, texts in {"entity": entities, "paraphrased_question": rewordings}.items():
            texts.append(row[column] if isinstance(row.get(column), str) else "")
    if not result:
        raise DataError(f"{source if isinstance(source, str) else f'the {name} examples'}: contains no questions")
    return replace(
        result,
        entities=entities if any(entities) else [],
        rewordings=rewordings if any(rewordings) else [],
    )
