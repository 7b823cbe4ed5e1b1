"""MUSE (Shi et al., arXiv 2407.06460): verbatim memorization, knowledge memorization, privacy leakage; on news or books.

Verbatim: a prefix of a forget text is continued greedily by 128 tokens and compared with how it went on. Knowledge: questions
are answered within 32 tokens after a few examples of answering. Both by ROUGE-L F1. Privacy: min-k scores of forget and holdout
texts. Parts are read by name (`muse/news/verbmem/forget`, …), from the hub or a local mirror.
"""

from typing import Any

import numpy as np

from mpunlearn.errors import DataError
from mpunlearn.evaluation import metrics
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.tofu import PerExample
from mpunlearn.lm.examples import Example
from mpunlearn.lm.sources import Data, read_rows

VERBATIM_TOKENS = 128
KNOWLEDGE_TOKENS = 32
CONTEXT = 2048
"""Tokens of a text that membership scores look at."""
_STOPS = ("\n\n", "\nQuestion", "Question:")


def measure(model: Any, tokenizer: Any, benchmark: str, data: Data) -> PerExample:
    """Everything that one model says about every example of "muse/news" or "muse/books"."""
    prompts, expected = _columns(f"{benchmark}/verbmem/forget", data, "prompt", "gt")
    said = generate(model, tokenizer, [tokenizer(prompt)["input_ids"] for prompt in prompts], VERBATIM_TOKENS)
    found: PerExample = {"forget": {"verbatim_memorization": _f1(expected, said)}}
    for name in ("forget", "retain"):
        questions, answers = _columns(f"{benchmark}/knowmem/{name}_qa", data, "question", "answer")
        shown = zip(*_columns(f"{benchmark}/knowmem/{name}_qa_icl", data, "question", "answer"), strict=True)
        before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shown)
        asked = [tokenizer(f"{before}Question: {question}\nAnswer:")["input_ids"] for question in questions]
        said = [_cut(text) for text in generate(model, tokenizer, asked, KNOWLEDGE_TOKENS)]
        found.setdefault(name, {})["knowledge_memorization"] = _f1(answers, said)
    for name in ("forget", "holdout"):
        [texts] = _columns(f"{benchmark}/privleak/{name}", data, "text")
        encoded = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts]
        answers_of = probe(model, tokenizer, [Example(ids, ids) for ids in encoded])
        found.setdefault(name, {})["mia_min_k"] = [metrics.min_k_score(answer) for answer in answers_of]
    return found


def summarize(found: PerExample, retrained: PerExample | None = None) -> dict[str, float]:
    """MUSE's metrics by name."""
    result = {
        "verbatim_memorization": float(np.mean(found["forget"]["verbatim_memorization"])),
        "forget_knowledge_memorisation": float(np.mean(found["forget"]["knowledge_memorization"])),
        "retain_knowledge_memorisation": float(np.mean(found["retain"]["knowledge_memorization"])),
        "mia_min_k": _auc(found),
    }
    if retrained is not None:
        result["privacy_leak"] = metrics.privacy_leak(result["mia_min_k"], _auc(retrained))
    return result


def _auc(found: PerExample) -> float:
    return metrics.auc(np.array(found["forget"]["mia_min_k"]), np.array(found["holdout"]["mia_min_k"]))


def _columns(source: str, data: Data, *columns: str) -> list[list[str]]:
    """Columns of texts of a source."""
    rows = list(read_rows(source, data))
    for where, row in rows:
        for column in columns:
            if not isinstance(row.get(column), str):
                raise DataError(f"{where}, column {column}: expected text, found {row.get(column)!r:.60}")
    if not rows:
        raise DataError(f"{source}: holds no examples")
    return [[row[column] for _, row in rows] for column in columns]


def _f1(expected: list[str], said: list[str]) -> list[float]:
    return [metrics.rouge_l(*pair)[1] for pair in zip(expected, said, strict=True)]


def _cut(text: str) -> str:
    """What was said before another question begins."""
    for stop in _STOPS:
        text = text.split(stop)[0]
    return text
