"""The command `extract`: what a model before and after unlearning tells about the texts that it forgot.

The idea: whoever has both models can test whether a given text was forgotten, and can look for such texts without any
candidates. Nothing in a protocol changes that, since the server has both models. So this measures the floor of the
client's side: what remains even if updates told nothing. With candidates, the attacks are those of `client audit`; the
difference of the two models stands for the update. Without candidates, see `sampling`.

Not covered: several unlearning runs, and grouping of candidates by subject.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.client.audit.report import ClientAudit
from mpunlearn.errors import PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.tables import aligned


@dataclass(frozen=True)
class Sampled:
    """What was found among samples, without candidates."""

    distinct: int
    """Number of different samples."""
    found: int
    """Number of forgotten texts that some sample contains."""
    found_first: int
    """The same for the samples whose likelihood fell most: twice as many as there are forgotten texts."""
    auc: float | None
    """How well the fall in likelihood tells samples that contain a forgotten text from others; None without either."""


@dataclass(frozen=True)
class Extraction:
    """What two models tell about the texts that one of them forgot."""

    forgotten: int
    """Number of forgotten texts."""
    candidates: ClientAudit
    """Given candidates."""
    sampled: dict[str, Sampled]
    """Way of sampling → what was found."""

    def text(self) -> str:
        """The result as text."""
        parts = [
            [label, group, f"{separation.auc:.3f}", f"{separation.tpr:.2f}"]
            for label, groups in self.candidates.separations.items()
            for group, separation in groups.items()
        ]
        rows = [
            (name, str(of.distinct), f"{of.found} of {self.forgotten}", f"{of.found_first} of {self.forgotten}",
             "" if of.auc is None else f"{of.auc:.3f}")
            for name, of in self.sampled.items()
        ]  # fmt: skip
        return "\n".join(
            [
                "With candidates: is this text one of those that were forgotten? (TPR at 1 % false positives)",
                aligned(["score", "told from", "AUC", "TPR"], parts),
                "",
                "Without candidates: samples from the model before unlearning, ranked by how much less likely they became",
                aligned(["samples", "different", "texts found", "found in the first", "AUC"], rows),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {**dataclasses.asdict(self), "candidates": self.candidates.to_json()}


def extract(
    model: str | Path,
    unlearned: str | Path,
    *,
    forget: str | Path,
    reference: str | Path,
    near: str | Path | None = None,
    samples: int = 2000,
    prompt_tokens: int = 1,
    max_new_tokens: int = 64,
    guidance: float = 1.0,
    seed: int = 0,
    max_length: int = 512,
    data: Data | None = None,
) -> Extraction:
    """Measures what a model before and after unlearning tells about the texts that it forgot. For research.

    Args:
        model: The model before unlearning.
        unlearned: The model after it, such as RUN/final.
        forget: The texts that were forgotten, to compare the findings with.
        reference: Texts of the same kind that both models know. Samples begin like these.
        near: Texts on the same subjects as the forgotten ones that were not forgotten.
        samples: Number of samples.
        prompt_tokens: Number of tokens of a text that a sample begins with.
        max_new_tokens: Maximum number of tokens in a sample, without those.
        guidance: Strength of the contrast to the unlearned model in the second set of samples.
        seed: Random seed of the samples.
        max_length: Maximum number of tokens in a text.
        data: How to read the texts.

    Returns:
        How well given texts can be told apart, and how many are found without candidates.

    Raises:
        PlanError: An option is out of range.
        MPUError: The models or the texts cannot be read.
    """
    needs("client", "extract")
    from mpunlearn.client.audit.audit import audit

    for option, value in (
        ("samples", samples), ("prompt-tokens", prompt_tokens), ("max-new-tokens", max_new_tokens), ("guidance", guidance),
    ):  # fmt: skip
        if not value > 0:
            raise PlanError(f"--{option}: expected a number above 0, found {value:g}")
    before, after = as_path(model, "model"), as_path(unlearned, "unlearned")
    given = audit(
        [after], copy=[before], forget=forget, reference=reference, near=near, max_length=max_length, data=data
    )

    from mpunlearn.audit.sampling import sample
    from mpunlearn.client.audit.membership import mean_nll
    from mpunlearn.lm.examples import IGNORED, Example, encode
    from mpunlearn.lm.model import load, load_model
    from mpunlearn.lm.records import read_records

    theta, tokenizer = load(before)
    other = load_model(after).eval()
    theta.eval()
    wanted = [record.answer for record in read_records(forget, data)]
    starts = [
        example.input_ids[:prompt_tokens]
        for example in encode(read_records(reference, data), tokenizer, max_length)
        if len(example.input_ids) > prompt_tokens
    ]
    if not starts:
        raise PlanError(f"--prompt-tokens {prompt_tokens}: no reference text is longer")
    prompts = [starts[number % len(starts)] for number in range(samples)]
    found = {}
    for name, strength in (("plain", 0.0), (f"guidance {guidance:g}", guidance)):
        drawn = sample(theta, other, prompts, max_new_tokens, strength, seed)
        distinct = [list(tokens) for tokens in dict.fromkeys(map(tuple, drawn)) if len(tokens) > prompt_tokens]
        examples = [Example(ids, [IGNORED] * prompt_tokens + ids[prompt_tokens:]) for ids in distinct]
        rise = mean_nll(other, tokenizer, examples) - mean_nll(theta, tokenizer, examples)
        texts = tokenizer.batch_decode(distinct, skip_special_tokens=True)
        found[name] = searched([texts[index] for index in rise.argsort(descending=True).tolist()], wanted)
    return Extraction(given.texts["forget"], given, found)


def searched(ranked: Sequence[str], wanted: Sequence[str]) -> Sampled:
    """Looks for texts in samples.

    Args:
        ranked: the samples, the most suspicious first.
        wanted: the forgotten texts.
    """
    from mpunlearn.roc import auc

    texts, plain = [_plain(text) for text in ranked], [_plain(text) for text in wanted]
    hits = [any(text in sample for text in plain) for sample in texts]
    first = texts[: 2 * len(plain)]
    ranks = range(len(hits), 0, -1)
    groups = [[rank for rank, hit in zip(ranks, hits, strict=True) if hit is kind] for kind in (True, False)]
    return Sampled(
        len(texts),
        sum(any(text in sample for sample in texts) for text in plain),
        sum(any(text in sample for sample in first) for text in plain),
        auc(*groups) if all(groups) else None,
    )


def _plain(text: str) -> str:
    return " ".join(text.split())
