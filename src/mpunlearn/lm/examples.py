"""Tokenized examples: which tokens carry loss, and how examples are padded into a batch.

As usual, a question carries no loss and its answer does, while a plain text carries loss on every token. Labels repeat
the token ids where there is loss and are `IGNORED` elsewhere, as in transformers.

The prompt is formatted by the tokenizer's chat template if it has one. Prompt and answer are tokenized as one string,
just as the model sees them later, and character offsets show where the answer begins.

Not covered: slow tokenizers, which do not report character offsets.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError

from mpunlearn.errors import CheckpointError, DataError
from mpunlearn.lm.records import Record
from mpunlearn.progress import printable

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Example:
    """A tokenized example; `labels` repeats `input_ids` where there is loss and is `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens carry loss. The first token of a text never does, since nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])

    def skipping(self, count: int) -> "Example":
        """The same example without loss on its first `count` answer tokens."""
        counted = [position for position in range(1, len(self.labels)) if self.labels[position] != IGNORED]
        skipped = set(counted[:count])
        return replace(self, labels=[IGNORED if i in skipped else label for i, label in enumerate(self.labels)])


def prompt_of(example: Example) -> list[int]:
    """The tokens before the answer."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:first]


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of tokenized examples, in order."""
    return hashlib.sha256(json.dumps([[e.input_ids, e.labels] for e in examples]).encode()).hexdigest()


def prompt_and_answer(tokenizer: Any, record: Record) -> tuple[str, str]:
    """A question and its answer in the tokenizer's chat template, or in a plain format if it has none.

    Returns:
        The text before the answer, and the rest. Joined, they are what the model sees.

    Raises:
        DataError: the chat template rejects the messages, for example because it does not support system messages.
        CheckpointError: the chat template is broken.
    """
    if not tokenizer.chat_template:
        return f"{plain_prompt(record)}Answer:", f" {record.answer}{tokenizer.eos_token or ''}"
    prompt, whole = in_template(tokenizer, record)
    prompt = os.path.commonprefix([prompt, whole])  # noqa: RUF071 (of strings, not of paths)
    return prompt, whole[len(prompt) :]


def plain_prompt(record: Record) -> str:
    """The lines before the answer if there is no chat template."""
    before = "".join(f"{role.capitalize()}: {content}\n" for role, content in record.history)
    return f"{before}Question: {record.question}\n"


def in_template(tokenizer: Any, record: Record) -> tuple[str, str]:
    """What the tokenizer's chat template writes for the prompt, and for the whole chat; errors as for `prompt_and_answer`.

    The values for the template come from the record, so from the owner of the data.
    """
    messages = [{"role": role, "content": content} for role, content in (*record.history, ("user", record.question))]
    answer = record.answer
    # Some templates write today's date into the prompt. A fixed date keeps a run's examples the same on every day.
    options: dict[str, Any] = {"date_string": "1 January 2025", **dict(record.template), "tokenize": False}
    try:
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **options)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, which can fail in any way
        reason = printable(str(error)[:200])
        if type(error) is not TemplateError:
            raise CheckpointError(f"the model's chat template is broken: {type(error).__name__}: {reason}") from error
        roles = ", ".join([*(role for role, _ in record.history), "user", "assistant"])
        raise DataError(f"the model's chat template rejects messages with the roles {roles}: {reason}") from error
    return str(prompt), str(whole)


def encode(records: list[Record], tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenizes records into examples of at most `max_length` tokens.

    Longer answers are truncated, and longer plain texts are split into several examples.

    Raises:
        DataError: a question leaves no room for its answer, or the model's chat template rejects a chat.
        CheckpointError: the model's chat template or tokenizer is broken.
    """
    examples: list[Example] = []
    for record in records:
        where = record.where or "an example"
        if record.question is None:
            ids = tokenized(tokenizer, record.answer, where)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            examples += [Example(piece, piece) for piece in pieces if len(piece) > 1]
            continue
        try:
            prompt, answer = prompt_and_answer(tokenizer, record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        encoded = tokenized(
            tokenizer,
            prompt + answer,
            where,
            add_special_tokens=not tokenizer.chat_template,
            return_offsets_mapping=True,
        )
        ids = encoded["input_ids"][:max_length]
        ends = [end for _, end in encoded["offset_mapping"][:max_length]]
        labels = [token if end > len(prompt) else IGNORED for token, end in zip(ids, ends, strict=True)]
        if not ids:
            raise CheckpointError(f"{where}: the model's tokenizer and chat template leave nothing of it; check them")
        labels[0] = IGNORED
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{where}: the question leaves no room for its answer within --max-length {max_length}; raise it, or "
                f"shorten the question {record.question[:60]!r} …"
            )
        examples.append(Example(ids, labels))
    return examples


def tokenized(tokenizer: Any, text: str, where: str, **options: Any) -> Any:
    """What the tokenizer makes of a text.

    Raises:
        CheckpointError: it fails.
    """
    try:
        return tokenizer(text, **options)
    except MemoryError:
        raise
    except Exception as error:  # the library raises plain exceptions, for example if a token is not in the vocabulary
        raise CheckpointError(f"{where}: the model's tokenizer fails on it: {printable(str(error)[:200])}") from error


def encode_alternates(records: list[Record], tokenizer: Any, max_length: int) -> list[list[Example]]:
    """The alternate answers of each record, tokenized with its question."""
    return [
        encode([replace(record, answer=answer) for answer in record.alternates], tokenizer, max_length)
        for record in records
    ]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads examples on the right and stacks them into a batch.

    Args:
        examples: at least one example.
        pad_id: the padding token for `input_ids`.

    Returns:
        input_ids, attention_mask and labels, each of shape (examples, longest example), int64.
    """
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
