"""Examines a copy: runs the checks in the order of their price, and says what fails.

Texts are read as in training: with the tokenizer and the template that are in the copy's directory. Where the policy
names a base, these are the base's (see `network.pins`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.plausibility import neurons, weights, wording
from mpunlearn.client.plausibility.report import Limits, Measured
from mpunlearn.errors import DataError
from mpunlearn.lm.examples import Example, encode, prompt_and_answer
from mpunlearn.lm.model import load_model, load_tokenizer, nll, pad_id
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import read_text

MAX_TEXTS = 256
"""At most this many texts of the forget set and of the retain set are run through the model."""


@dataclass(frozen=True)
class Texts:
    """The client's texts."""

    unlearned: list[Record]
    """The forget set and the decoys."""
    retain: list[Record]


def public_text(limits: Limits) -> list[Record]:
    """The public text: the policy's own, or the sentences that the package contains.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    if limits.public_text is None:
        content = resources.files("mpunlearn.client.plausibility").joinpath("public.txt").read_text(encoding="utf-8")
    else:
        content = read_text(Path(limits.public_text))
    records = [Record(None, line.strip()) for line in content.splitlines() if line.strip()]
    if not records:
        raise DataError(f"{limits.public_text}: contains no text; expected one text per line")
    return records


def measure(copy: Path, texts: Texts, limits: Limits, max_length: int, base: Path | None = None) -> Iterator[Measured]:
    """Measures a copy; cheap checks come first, and the model runs only if the weights are finite.

    Args:
        copy: directory of the copy.
        texts: the client's texts; may be empty.
        limits: names the public text.
        max_length: maximum number of tokens in a text, as in training.
        base: a public model with the same tokenizer, to compare likelihoods with.

    Raises:
        MPUError: the copy is not a checkpoint of a supported family, or cannot be loaded.
    """
    checkpoint, finite = Checkpoint(copy), True
    architecture = Architecture.of(checkpoint)
    architecture.tensor_roles(checkpoint)
    for measured in weights.measure(checkpoint, architecture):
        finite &= measured.check != "finite" or bool(measured.value)
        yield measured
    if not finite:
        return
    tokenizer, public = load_tokenizer(copy), public_text(limits)
    own = [*texts.unlearned, *texts.retain]
    chats = [record for record in own if record.question is not None]
    yield Measured("verbatim", float(wording.template_is_faithful(tokenizer, chats)), "the chat template")
    written = [record.answer for record in (*public, *own) if record.question is None]
    written += ["".join(prompt_and_answer(tokenizer, record)) for record in chats]
    yield Measured("verbatim", float(wording.tokenizer_is_faithful(tokenizer, written)), "the tokenizer")
    model, pad = load_model(copy).eval(), pad_id(tokenizer)
    sentences = encode(public, tokenizer, max_length)
    retained = encode(texts.retain[:MAX_TEXTS], tokenizer, max_length)
    for idle, single in neurons.measure(model, architecture, sentences, "public text", pad):
        yield idle
        yield single
    if own:
        mine = [*encode(texts.unlearned[:MAX_TEXTS], tokenizer, max_length), *retained]
        for _, single in neurons.measure(model, architecture, mine, "your texts", pad):
            yield single
    yield Measured("public_nll", of_public := _nats(model, sentences, tokenizer), "public text")
    if base is None:
        return
    of_retain = _nats(model, retained, tokenizer)
    del model  # one model at a time
    model = load_model(base).eval()
    yield Measured("above_base", of_public - _nats(model, sentences, tokenizer), "public text")
    if retained:
        yield Measured("above_base_retain", of_retain - _nats(model, retained, tokenizer), "your retain set")


def failures(found: Sequence[Measured], limits: Limits) -> dict[str, list[str]]:
    """What fails: for each check, what is wrong where."""
    failed: dict[str, list[str]] = {}
    for measured in found:
        if (reason := limits.failure(measured)) is not None:
            failed.setdefault(measured.check, []).append(reason)
    return failed


def _nats(model: Any, texts: Sequence[Example], tokenizer: Any) -> float:
    """Mean negative log-likelihood per token."""
    tokens: int = sum(text.tokens for text in texts)
    return sum(nll(model, list(texts), neurons.BATCH, tokenizer)) / max(1, tokens)
