"""MUSE (Shi et al., arXiv 2407.06460) on news or books: verbatim memorization, knowledge memorization, privacy leakage.

- Verbatim memorization: the model greedily generates 128 tokens after a prefix of a forget text, and the result is
  compared with the true continuation.
- Knowledge memorization: the model answers questions in at most 32 tokens, after a few-shot prompt.
- Privacy leakage: membership scores of forget and holdout texts. PrivLeak uses min-k.

The first two are scored by ROUGE-L F1. The parts of the benchmark are read by name (`muse/news/verbmem/forget`, …),
from the Hugging Face Hub or a local mirror. Not covered: MUSE's scalability and sustainability, which need several
unlearned models; chat templates in its prompts; and gradnorm, which would need a backward pass for every long text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpunlearn.errors import DataError
from mpunlearn.evaluation import composite, metrics
from mpunlearn.evaluation.bootstrap import EVERYTHING, Sample
from mpunlearn.evaluation.definitions import OPENUNLEARNING, Definitions
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.tofu import PerExample, likelihood_scores, membership_auc
from mpunlearn.lm.examples import Example
from mpunlearn.lm.sources import Data, read_rows

BENCHMARKS = ("muse/news", "muse/books")
VERBATIM_TOKENS = 128
KNOWLEDGE_TOKENS = 32
CONTEXT = 2048
"""Membership scores use the first tokens of each text, up to this number."""
_STOPS = ("\n\n", "\nQuestion", "Question:")

Pairs = list[tuple[str, str]]
"""Questions with answers, or prefixes with continuations."""


@dataclass(frozen=True)
class MuseSets:
    """The parts of MUSE-News or MUSE-Books. Dictionaries have the names of sets as keys."""

    verbatim: Pairs
    """Prefixes of forget texts, with their true continuations."""
    knowledge: dict[str, Pairs]
    """Questions with answers about the forget and the retain texts."""
    shots: dict[str, Pairs]
    """The few-shot examples that precede these questions."""
    texts: dict[str, list[str]]
    """Forget and holdout texts, for membership inference."""


def read_muse(benchmark: str, data: Data) -> MuseSets:
    """Reads one of the `BENCHMARKS`.

    Args:
        benchmark: its name.
        data: where local mirrors are.

    Raises:
        DataError: a part cannot be read, or lacks a column.
    """
    knowledge = {name: f"{benchmark}/knowmem/{name}_qa" for name in ("forget", "retain")}
    return MuseSets(
        verbatim=_pairs(f"{benchmark}/verbmem/forget", data, "prompt", "gt"),
        knowledge={name: _pairs(source, data, "question", "answer") for name, source in knowledge.items()},
        shots={name: _pairs(f"{source}_icl", data, "question", "answer") for name, source in knowledge.items()},
        texts={name: _columns(f"{benchmark}/privleak/{name}", data, "text")[0] for name in ("forget", "holdout")},
    )


def measure(
    model: Any,
    tokenizer: Any,
    sets: MuseSets,
    batch_size: int | None = None,
    definitions: Definitions = OPENUNLEARNING,
) -> PerExample:
    """The values for every example under one model: `verbmem_ROUGE`, `knowmem_ROUGE` and membership scores."""
    mask_pad = definitions.mask_pad
    prompts = [tokenizer(prefix)["input_ids"] for prefix, _ in sets.verbatim]
    generated = generate(model, tokenizer, prompts, VERBATIM_TOKENS, batch_size, mask_pad)
    per_example: PerExample = {"forget": {"verbmem_ROUGE": _f1(sets.verbatim, generated)}}
    for name, pairs in sets.knowledge.items():
        shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in sets.shots[name])
        questions = (f"{shots}Question: {question}\n{definitions.answer_mark}" for question, _ in pairs)
        prompts = [tokenizer(question)["input_ids"] for question in questions]
        answers = generate(model, tokenizer, prompts, KNOWLEDGE_TOKENS, batch_size, mask_pad)
        generated = [first_answer(text) for text in answers]
        per_example.setdefault(name, {})["knowmem_ROUGE"] = _f1(pairs, generated)
    for name, texts in sets.texts.items():
        before = len(tokenizer("")["input_ids"]) if definitions.prompt_alone else 0  # the beginning-of-text token
        encoded = [tokenizer(text)["input_ids"][: before + CONTEXT] for text in texts]
        probes = probe(model, tokenizer, [Example(ids, ids) for ids in encoded], batch_size, mask_pad, moments=True)
        cut = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
        per_example.setdefault(name, {}).update(likelihood_scores(probes, cut, definitions))
    return per_example


def summarize(
    per_example: PerExample,
    retrained: PerExample | None = None,
    sample: Sample = EVERYTHING,
    definitions: Definitions = OPENUNLEARNING,
) -> dict[str, Any]:
    """MUSE's metrics, by name.

    Args:
        per_example: what `measure` returned for the model.
        retrained: the same for the model that never saw the forget texts; PrivLeak and the privacy score need it.
        sample: how often each example counts.
        definitions: which definitions of the metrics, the same as for `measure`.

    Returns:
        Numbers or, for resamples, arrays of shape (B,).
    """
    result = {
        "forget_verbmem_ROUGE": sample.mean("forget", per_example["forget"]["verbmem_ROUGE"]),
        "forget_knowmem_ROUGE": sample.mean("forget questions", per_example["forget"]["knowmem_ROUGE"]),
        "retain_knowmem_ROUGE": sample.mean("retain", per_example["retain"]["knowmem_ROUGE"]),
        **{attack: membership_auc(per_example, attack, sample) for attack in composite.ATTACKS},
    }
    theirs = None if retrained is None else summarize(retrained, sample=sample, definitions=definitions)
    if theirs is not None:
        result["privleak"] = metrics.privleak(result["mia_min_k"], theirs["mia_min_k"], definitions)
    return result | composite.scores(result, theirs, None)


def first_answer(text: str) -> str:
    """Cuts off a generated text where the model starts another question."""
    for stop in _STOPS:
        text = text.split(stop)[0]
    return text


def _pairs(source: str, data: Data, first: str, second: str) -> Pairs:
    return list(zip(*_columns(source, data, first, second), strict=True))


def _columns(source: str, data: Data, *columns: str) -> list[list[str]]:
    """Columns of a source. All of them must contain text."""
    rows = list(read_rows(source, data))
    for where, row in rows:
        for column in columns:
            if not isinstance(row.get(column), str):
                raise DataError(f"{where}, column {column}: expected text, found {row.get(column)!r:.60}")
    if not rows:
        raise DataError(f"{source}: contains no examples")
    return [[row[column] for _, row in rows] for column in columns]


def _f1(pairs: Pairs, generated: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of generated texts against the true answers or continuations."""
    return [metrics.rouge_l(expected, text)[1] for (_, expected), text in zip(pairs, generated, strict=True)]
