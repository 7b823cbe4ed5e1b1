"""Probability and ROUGE-L recall of answers: whether a model still gives the answer, and whether it still says it.

Definitions follow TOFU (Maini et al., arXiv 2401.06121, section 2.2): probability is exp(-mean token loss of the answer), and
ROUGE-L recall (with stemming, from the `rouge-score` library) compares the greedy generation with the answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.client.dataset import IGNORED, collate, encode, prompt_and_answer
from mpunlearn.client.model import forward, load, pad_id
from mpunlearn.client.objectives import answer_nll
from mpunlearn.client.records import Record, read_records
from mpunlearn.progress import progress


@dataclass(frozen=True)
class Answers:
    """Means over the examples of one file, each in [0, 1]."""

    probability: float
    rouge_l: float


@torch.no_grad()
def evaluate_answers(
    checkpoint: str | Path, files: dict[str, Path], batch_size: int = 64, max_new_tokens: int = 200
) -> dict[str, Answers]:
    """Evaluates a checkpoint on question-answer files.

    Args:
        files: JSON lines by any name; the result has the same names.
    """
    model, tokenizer = load(Path(checkpoint))
    model.eval()
    results = {}
    for name, file in files.items():
        records = [record for record in read_records(file) if record.question is not None]
        probabilities = answer_probabilities(model, tokenizer, records, batch_size)
        rouge = answer_rouge(model, tokenizer, records, batch_size, max_new_tokens)
        results[name] = Answers(sum(probabilities) / len(records), sum(rouge) / len(records))
    return results


@torch.no_grad()
def answer_probabilities(model: Any, tokenizer: Any, records: list[Record], batch_size: int) -> list[float]:
    """exp(-mean answer-token loss) of each example."""
    examples = encode(records, tokenizer, 2048)
    values: list[float] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        found = forward(model, batch)
        counts = (found["targets"] != IGNORED).sum(dim=1)
        values += torch.exp(-answer_nll(found["logits"], found["targets"]) / counts).tolist()
    return values


@torch.no_grad()
def answer_rouge(
    model: Any, tokenizer: Any, records: list[Record], batch_size: int, max_new_tokens: int
) -> list[float]:
    """ROUGE-L recall of the greedy answer against the true one, of each example."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    values: list[float] = []
    starts = range(0, len(records), batch_size)
    for start in progress(starts, "generating answers"):
        chunk = records[start : start + batch_size]
        prompts = [prompt_and_answer(tokenizer, record.question or "", record.answer)[0] for record in chunk]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template
        ).to(model.device)
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        values += [
            scorer.score(record.answer, text)["rougeL"].recall for record, text in zip(chunk, texts, strict=True)
        ]
    return values
