"""A question with its answer as tokens: where the prompt ends, and which tokens of the answer count.

`lm.examples.encode` finds the end of the prompt by characters, as in training. OpenUnlearning tokenizes the prompt a second
time, by itself, and takes as many tokens as that gives for the prompt. The two differ where a token holds characters of
both: with most tokenizers, a plain prompt that ends in a space ends in a token of its own, while the same space is part of
the answer's first word in the whole text. Not covered: OpenUnlearning's limit of 512 tokens for texts without a chat
template.
"""

from dataclasses import dataclass
from typing import Any

from mpunlearn.errors import DataError
from mpunlearn.evaluation.definitions import Definitions
from mpunlearn.lm.examples import IGNORED, Example, encode, in_template, plain_prompt, prompt_of, tokenized
from mpunlearn.lm.records import Record

_UNLIMITED = 1 << 30
"""Maximum number of tokens per example: an evaluation cuts nothing off."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer, tokenized."""

    example: Example
    prompt: list[int]
    """The tokens after which an answer is generated."""


def asked(record: Record, tokenizer: Any, definitions: Definitions) -> Asked:
    """Tokenizes a question with its answer.

    Raises:
        DataError: no token of the answer counts, or the model's chat template rejects the chat.
        CheckpointError: the model's chat template or tokenizer is broken.
    """
    if not definitions.prompt_alone:
        (example,) = encode([record], tokenizer, _UNLIMITED)
        return Asked(example, prompt_of(example))
    if tokenizer.chat_template:
        prompt, whole = in_template(tokenizer, record)
    else:
        prompt = plain_prompt(record) + definitions.answer_mark
        whole = prompt + record.answer
    where, special = record.where or "a question of the benchmark", not tokenizer.chat_template
    ids, prompt_ids = (
        tokenized(tokenizer, text, where, add_special_tokens=special)["input_ids"] for text in (whole, prompt)
    )
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    first = max(1, len(prompt_ids))
    if len(ids) <= first:
        raise DataError(
            f"{where}: the answer {record.answer!r:.60} has no token of its own after the tokens of its prompt; leave this "
            "question out, or give --definitions strict"
        )
    return Asked(Example(ids, [IGNORED] * first + ids[first:]), prompt_ids)


def answer_text(example: Example, tokenizer: Any) -> str:
    """The tokens that count, as text without special tokens."""
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=True))


def continued(tokenizer: Any, prompt: str, rest: str) -> Example:
    """A text of which the rest counts, as lm-eval does it: the tokens of prompt and rest together, less as many as the
    prompt alone has. Nothing is added at the end.

    Raises:
        DataError: no token of the rest counts.
        CheckpointError: the model's tokenizer is broken.
    """
    ids, before = (
        tokenized(tokenizer, text, "a question of the benchmark")["input_ids"] for text in (prompt + rest, prompt)
    )
    first = max(1, len(before))
    if len(ids) <= first:
        raise DataError(f"a question of the benchmark: {rest!r:.60} has no token of its own after {prompt[-60:]!r}")
    return Example(list(ids), [IGNORED] * first + list(ids[first:]))
