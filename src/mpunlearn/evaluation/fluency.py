"""Fluency: whether generated answers are language at all, judged by a classifier (arXiv 2506.12618).

A model can reach low probabilities by answering gibberish. OpenUnlearning judges the answers to the forget questions with
the classifier madhurjindal/autonlp-Gibberish-Detector-492513457, and takes the harmonic mean of fluency and model utility as
Utility. Any classifier with a class named clean works; it is read from a folder, never downloaded. Not covered: the other
classes, which distinguish kinds of gibberish.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from mpunlearn.errors import PlanError
from mpunlearn.lm.model import load_model, load_tokenizer

MAX_TOKENS = 32
"""Only the beginning of an answer is judged, as in OpenUnlearning."""
BATCH = 32
CLASS = "clean"

Judge = Callable[[Sequence[str]], list[float]]
"""Texts → how likely each of them is fluent."""


def fluency_judge(path: Path, device: str | None = None) -> Judge:
    """Loads a classifier.

    Args:
        path: its checkpoint directory.
        device: device of the model (default: a GPU if there is one).

    Raises:
        CheckpointError: it cannot be loaded.
        PlanError: it has no class named clean.
    """
    model = load_model(path, device, kind=transformers.AutoModelForSequenceClassification).eval()
    tokenizer = load_tokenizer(path)
    names = [str(name).casefold() for _, name in sorted(model.config.id2label.items())]
    if CLASS not in names:
        raise PlanError(f"--fluency-model {path}: expected a class {CLASS}, found {', '.join(names):.60}")

    @torch.no_grad()
    def judge(texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            logits = model(**batch.to(model.device)).logits.float()
            found += logits.softmax(dim=-1)[:, names.index(CLASS)].tolist()
        return found

    return judge
