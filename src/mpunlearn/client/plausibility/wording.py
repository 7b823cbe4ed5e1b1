"""Do the chat template and the tokenizer show the text as it is?

A template is a program that sees the text. One that tags every character, or moves the question into the answer, decides
what can be read off the update. An honest template puts the messages into a fixed frame. So each chat is rendered twice:
as it is, and with placeholders as its messages. The first must equal the second with the messages filled in, and the
question must be in the prompt, which carries no loss. White space is not compared, since many templates trim messages.

A tokenizer can tag, too, so the text that it gives back must be the text that went in.

Not covered: a tokenizer with several tokens for the same characters, whose choice says where they stand.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mpunlearn.lm.examples import prompt_and_answer
from mpunlearn.lm.records import Record


def template_is_faithful(tokenizer: Any, records: Sequence[Record]) -> bool:
    """Whether the chat template shows every message of every chat as it is, within a frame that is always the same."""
    frames: dict[tuple[Any, ...], tuple[str, str]] = {}
    for record in records:
        if record.question is None:
            continue
        roles = tuple(role for role, _ in record.history)
        marks = [f"Placeholder{number}x" for number in range(len(roles) + 2)]
        kind = (roles, record.template)
        if kind not in frames:
            history = tuple(zip(roles, marks, strict=False))
            frames[kind] = prompt_and_answer(
                tokenizer, replace(record, question=marks[-2], answer=marks[-1], history=history)
            )
        prompt, answer = frames[kind]
        if any(mark not in prompt for mark in marks[:-1]) or marks[-1] not in answer:
            return False
        whole = _bare(prompt + answer)
        if any(whole.count(mark) != 1 for mark in marks):
            return False
        for mark, text in zip(
            marks, [*(text for _, text in record.history), record.question, record.answer], strict=True
        ):
            whole = whole.replace(mark, _bare(text), 1)
        if _bare("".join(prompt_and_answer(tokenizer, record))) != whole:
            return False
    return True


def tokenizer_is_faithful(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the tokens of every text, decoded, are the text, and are not more than it has bytes."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _plain(decoded) != _plain(text) or len(ids) > len(text.encode(errors="replace")) + 1:
            return False
    return True


def _bare(text: str) -> str:
    """Text without white space."""
    return "".join(text.split())


def _plain(text: str) -> str:
    """Text without white space, and without differences that tokenizers normalize away."""
    return _bare(unicodedata.normalize("NFKC", text)).casefold()
