"""Benchmarks by name: which dataset on the Hugging Face Hub a name stands for, and which of its rows.

A name says benchmark and part. If it says no more than the benchmark's domain or target, the role decides: `wmdp/bio` is
the forget corpus as --forget and the retain corpus as --retain.

    tofu/forget10                    TOFU (arXiv 2401.06121): any of its configurations
    muse/news, muse/books            MUSE (arXiv 2407.06460): the raw texts; muse/news/knowmem/forget_qa and others
    wmdp/bio, wmdp/cyber             WMDP (arXiv 2403.03218): the corpora; also wmdp/bio/forget and wmdp/bio/retain
    wmdp/bio/questions               its multiple-choice questions, also of cyber and chem
    wmdp/wikitext                    the retain corpus with which WMDP's authors train RMU
    rwku/Stephen_King                RWKU (arXiv 2406.10890): the texts about one of its 200 targets
    rwku/Stephen_King/forget_level1  the rows of any of its configurations that are about the target
    knowundo/privacy                 KnowUnDo (arXiv 2407.01920), also copyright: questions of the unlearn or retention scope
    knowundo/privacy/unlearn/val     the questions for evaluation, also of retention

RWKU has no retain set. As --retain, `rwku/TARGET` therefore gives the texts about the other targets, which is our choice;
its neighbor questions are for evaluation and stay out of training. Not covered: RWKU's utility sets and WMDP's MMLU, for
which `evaluate --tasks` runs lm-eval.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mpunlearn.errors import DataError

Row = tuple[str, dict[str, Any]]
"""The location of a row, for error messages, and the row."""
Rows = Iterator[Row]
MIN_WIKITEXT = 50
"""RMU leaves out lines of wikitext of at most this many characters: they are headings and blank lines."""
_MUSE_PARTS = {"forget": "forget", "retain": "retain1"}
_SCOPES = {"forget": "unlearn", "retain": "retention"}


def as_they_are(rows: Rows) -> Rows:
    """All rows, unchanged."""
    return rows


class Remote(NamedTuple):
    """A dataset that may have to be downloaded."""

    repository: str
    """OWNER/NAME on the Hub."""
    config: str | None
    split: str
    mirrors: tuple[str, ...] = ()
    """Where a file with the same rows may be: paths relative to `Data.data_root`, without suffix."""
    convert: Callable[[Rows], Rows] = as_they_are
    """From the dataset's rows to those of the part, in columns that `records` recognizes."""


def find(source: str, role: str) -> Remote | None:
    """The part of a benchmark that a source names, or None if the source is not a benchmark.

    Args:
        source: the name.
        role: which part to read if the name does not say: "forget", or else the retain set, also for calibration and other
            text that need not be forgotten.

    Raises:
        DataError: the benchmark has no such part.
    """
    name, _, part = source.partition("/")
    role = role if role == "forget" else "retain"
    return _BENCHMARKS[name](source, part, role) if name in _BENCHMARKS else None


def _tofu(source: str, part: str, role: str) -> Remote:
    if not part:
        raise DataError(f"{source}: name a part of the benchmark, such as tofu/forget10")
    return Remote("locuslab/TOFU", part, "train", (source, part))


def _muse(source: str, part: str, role: str) -> Remote | None:
    corpus, _, part = part.partition("/")
    if corpus not in ("news", "books"):
        return None
    part = part or _MUSE_PARTS[role]
    folder, _, last = part.rpartition("/")
    return Remote(f"muse-bench/MUSE-{corpus.title()}", folder or "raw", last, (f"muse/{corpus}/{part}", part))


def _wmdp(source: str, part: str, role: str) -> Remote:
    if part == "wikitext":
        wikitext = ("wmdp/wikitext", "wikitext")
        return Remote("Salesforce/wikitext", "wikitext-2-raw-v1", "test", wikitext, _without_headings)
    domain, _, what = part.partition("/")
    what = what or role
    if domain in ("bio", "cyber", "chem") and what == "questions":
        return Remote("cais/wmdp", f"wmdp-{domain}", "test", (f"wmdp/{domain}/questions", f"{domain}_questions"))
    if domain not in ("bio", "cyber") or what not in ("forget", "retain"):
        raise DataError(
            f"{source}: WMDP has no such part; expected wmdp/bio or wmdp/cyber, one of them with /forget or /retain, "
            "wmdp/wikitext, or the questions wmdp/bio/questions, wmdp/cyber/questions or wmdp/chem/questions"
        )
    corpus = f"{domain}-{what}-corpus"
    mirrors = (f"wmdp/{domain}/{what}", f"wmdp/{corpus}", corpus)
    if corpus == "bio-forget-corpus":
        return Remote("cais/wmdp-bio-forget-corpus", None, "train", mirrors)
    return Remote("cais/wmdp-corpora", corpus, "train", mirrors)


def _without_headings(rows: Rows) -> Rows:
    return ((where, row) for where, row in rows if len(str(row.get("text", ""))) > MIN_WIKITEXT)


def _rwku(source: str, part: str, role: str) -> Remote:
    target, _, config = part.partition("/")
    if not target:
        raise DataError(f"{source}: name one of RWKU's targets, such as rwku/Stephen_King")
    others = role == "retain" and not config
    config = config or "train_positive_llama3"
    split = "train" if config.startswith("train_") else "test"

    def about(rows: Rows) -> Rows:
        return _about(source, target, rows, others)

    return Remote("jinzhuoran/RWKU", config, split, (f"rwku/{config}",), about)


def _about(source: str, target: str, rows: Rows, others: bool) -> Rows:
    """The rows about a target of RWKU, or those about all others, as texts or as questions with answers."""

    def plain(name: Any) -> str:
        return str(name).replace("_", " ").casefold()

    read = list(rows)
    chosen = [plain(row.get("subject")) == plain(target) for _, row in read]
    if not any(chosen):
        raise DataError(
            f"{source}: no row has {target.replace('_', ' ')!r} as its subject; expected one of RWKU's 200 targets as in "
            "its configuration forget_target, such as rwku/Stephen_King"
        )
    return ((where, _asked(row)) for (where, row), own in zip(read, chosen, strict=True) if own != others)


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """Probes and pairs of RWKU as questions with answers; a pair's first response is the invented one, which DPO prefers."""
    if "query" in row:
        return {**row, "question": row["query"]}
    responses = row.get("response")
    if isinstance(responses, list) and len(responses) == 2:
        return {**row, "question": row.get("prompt"), "answer": responses[1], "alternate": responses[0]}
    if "instruction" in row and "output" in row:
        return {**row, "question": row["instruction"], "answer": row["output"]}
    return row


def _knowundo(source: str, part: str, role: str) -> Remote:
    domain, _, scope = part.partition("/")
    scope, _, use = scope.partition("/")
    scope, use = scope or _SCOPES[role], use or "train"
    if domain not in ("privacy", "copyright") or scope not in _SCOPES.values() or use not in ("train", "val"):
        raise DataError(
            f"{source}: KnowUnDo has no such part; expected knowundo/privacy or knowundo/copyright, which may be followed "
            "by /unlearn or /retention, and these by /train or /val"
        )

    def questions(rows: Rows) -> Rows:
        return _nested(rows, use)

    return Remote("zjunlp/KnowUnDo", domain, scope, (f"knowundo/{domain}/{scope}",), questions)


def _nested(rows: Rows, use: str) -> Rows:
    """KnowUnDo's questions with answers. A split is one row, whose columns train and val are lists of examples."""
    for where, row in rows:
        examples = row.get(use)
        if not isinstance(examples, list):
            raise DataError(f"{where}, column {use}: expected a list of examples, found {examples!r:.60}")
        for number, example in enumerate(examples, start=1):
            here = f"{where}, {use} {number}"
            if not isinstance(example, dict) or not {"text", "labels"} <= example.keys():
                raise DataError(f"{here}: expected an object with text and labels, found {example!r:.60}")
            yield here, {"question": example["text"], "answer": example["labels"]}


_BENCHMARKS: dict[str, Callable[[str, str, str], Remote | None]] = {
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
    "rwku": _rwku,
    "knowundo": _knowundo,
}
