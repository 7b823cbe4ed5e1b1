"""Forget and retain examples: read from JSON lines, put into the model's template, batched the same way for every copy.

A question-answer example carries loss on its answer only; a plain text carries loss on every token. The order of batches is
a function of seed, round and epoch, never of the copy: the updates of a round then differ by the noise alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpunlearn.errors import DataError

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Record:
    """One line of an example file: a question with its answer, or a plain text (question None)."""

    question: str | None
    answer: str


@dataclass(frozen=True)
class Example:
    """A tokenised example; `labels` repeats `input_ids` where there is loss and is `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]


def read_records(path: str | Path) -> list[Record]:
    """Reads JSON lines with `question` and `answer`, or with `text`. Other keys are left alone.

    Raises:
        DataError: the file cannot be read, has no lines, or a line is not such an object.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise DataError(f"{path}: holds no examples; expected one JSON object per line")
    return records


def _record(path: Path, number: int, line: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); expected one JSON object per line") from None
    fields = ("text",) if isinstance(value, dict) and "text" in value else ("question", "answer")
    if not isinstance(value, dict) or any(field not in value for field in fields):
        raise DataError(f"{path}, line {number}: expected an object with question and answer, or with text")
    for field in fields:
        if not isinstance(value[field], str) or not value[field].strip():
            raise DataError(f"{path}, line {number}, key {field}: expected text, found {value[field]!r}")
    return Record(None, value["text"]) if fields == ("text",) else Record(value["question"], value["answer"])


def examples_digest(examples: list[Example]) -> str:
    """SHA-256 (hex) of tokenised examples and their order."""
    return hashlib.sha256(json.dumps([[e.input_ids, e.labels] for e in examples]).encode()).hexdigest()


def prompt_and_answer(tokenizer: Any, question: str, answer: str) -> tuple[str, str]:
    """The text before the answer and the text from there on, in the tokenizer's chat template or in a plain one."""
    if not tokenizer.chat_template:
        return f"Question: {question}\nAnswer:", f" {answer}{tokenizer.eos_token or ''}"
    user = {"role": "user", "content": question}
    # Some templates write today's date into the prompt: a fixed one keeps all copies of a run alike.
    fixed = {"tokenize": False, "date_string": "1 January 2025"}
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": answer}], **fixed)
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, **fixed)
    prompt = os.path.commonprefix([prompt, whole])  # noqa: RUF071 (character by character is what is wanted)
    return prompt, whole[len(prompt) :]


def encode(records: list[Record], tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenises records, at most `max_length` tokens an example: a long answer is cut, a long plain text becomes several
    examples.

    Raises:
        DataError: a question leaves no room for its answer.
    """
    examples: list[Example] = []
    for record in records:
        if record.question is None:
            ids = tokenizer(record.answer)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            examples += [Example(piece, piece) for piece in pieces if len(piece) > 1]
            continue
        prompt, answer = prompt_and_answer(tokenizer, record.question, record.answer)
        encoded = tokenizer(
            prompt + answer, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True
        )
        ids = encoded["input_ids"][:max_length]
        ends = [end for _, end in encoded["offset_mapping"][:max_length]]
        labels = [token if end > len(prompt) else IGNORED for token, end in zip(ids, ends, strict=True)]
        labels[0] = IGNORED
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"a question of {len(ids)} tokens or more leaves no room for its answer within --max-length {max_length}: "
                f"{record.question[:60]!r} …"
            )
        examples.append(Example(ids, labels))
    return examples


def collate(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: input_ids, attention_mask and labels, each (examples, longest), int64."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }


def batches(
    forget: int, retain: int, *, batch_size: int, epochs: int, seed: int, round_number: int
) -> list[list[tuple[int, int | None]]]:
    """The batches of a round as pairs of indices: every forget example once an epoch, each with one random retain example.

    Args:
        forget, retain: sizes of the sets; retain may be 0, and the pairs then hold None.
    """
    plan: list[list[tuple[int, int | None]]] = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, round_number, epoch])
        order = random.permutation(forget).tolist()
        partners = random.integers(retain, size=forget).tolist() if retain else [None] * forget
        pairs = list(zip(order, partners, strict=True))
        plan += [pairs[start : start + batch_size] for start in range(0, forget, batch_size)]
    return plan
