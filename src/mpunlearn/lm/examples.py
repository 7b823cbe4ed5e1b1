"""Examples as tokens, and batches that are the same for every copy.

A question-answer example carries loss on its answer only; a plain text carries loss on every token. Which examples make up
which optimizer step is a function of seed, round and epoch, never of the copy and never of the hardware: the updates of a
round then differ by the noise alone, and a step means the same on one processor and on eight.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpunlearn.errors import DataError
from mpunlearn.lm.records import Record

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Example:
    """A tokenized example; `labels` repeats `input_ids` where there is loss and is `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def skipping(self, count: int) -> "Example":
        """The example without loss on its first `count` answer tokens."""
        answer = [position for position in range(1, len(self.labels)) if self.labels[position] != IGNORED]
        skipped = set(answer[:count])
        return replace(self, labels=[IGNORED if i in skipped else label for i, label in enumerate(self.labels)])


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of tokenized examples and their order."""
    return hashlib.sha256(json.dumps([[e.input_ids, e.labels] for e in examples]).encode()).hexdigest()


def prompt_and_answer(
    tokenizer: Any, question: str, answer: str, history: Sequence[tuple[str, str]] = ()
) -> tuple[str, str]:
    """The text before the answer and the text from there on, in the tokenizer's chat template or in a plain one."""
    if not tokenizer.chat_template:
        before = "".join(f"{role.capitalize()}: {content}\n" for role, content in history)
        return f"{before}Question: {question}\nAnswer:", f" {answer}{tokenizer.eos_token or ''}"
    messages = [{"role": role, "content": content} for role, content in (*history, ("user", question))]
    # Some templates write today's date into the prompt: a fixed one keeps all copies of a run alike.
    fixed = {"tokenize": False, "date_string": "1 January 2025"}
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **fixed)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **fixed)
    prompt = os.path.commonprefix([prompt, whole])  # noqa: RUF071 (character by character is what is wanted)
    return prompt, whole[len(prompt) :]


def encode(records: list[Record], tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenizes records, at most `max_length` tokens an example: a long answer is cut, a long plain text becomes several
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
        prompt, answer = prompt_and_answer(tokenizer, record.question, record.answer, record.history)
        encoded = tokenizer(
            prompt + answer, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True
        )
        ids = encoded["input_ids"][:max_length]
        ends = [end for _, end in encoded["offset_mapping"][:max_length]]
        labels = [token if end > len(prompt) else IGNORED for token, end in zip(ids, ends, strict=True)]
        labels[0] = IGNORED
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{record.where or 'an example'}: a question of {len(ids)} tokens or more leaves no room for its answer "
                f"within --max-length {max_length}: {record.question[:60]!r} …"
            )
        examples.append(Example(ids, labels))
    return examples


def encode_alternates(records: list[Record], tokenizer: Any, max_length: int) -> list[list[Example]]:
    """The alternate answers of each record, tokenized with its question."""
    return [
        encode([replace(record, answer=answer) for answer in record.alternates], tokenizer, max_length)
        for record in records
    ]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: input_ids, attention_mask and labels, each (examples, longest), int64."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
