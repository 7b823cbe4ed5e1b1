"""A retain set for a client that has none: `--retain auto`.

The model answers its own questions. A chat model is given the beginning of a user's message and samples the question
itself, then it answers it (Magpie, Xu et al., arXiv 2406.08464); a model without a chat template continues from the
beginning of a text. What the model says anyway is what unlearning should not change. With `--retain auto:SOURCE`, the
examples are drawn at random from a larger set instead, such as `auto:hub:OWNER/NAME`.

What repeats the forget set is left out, or training would restore it: any example that shares `SHARED_WORDS` consecutive
words with it, contains a whole question or answer of at least two words, or contains a name of it (two words in a row
that begin with capital letters). Anything said in other words is not noticed, so a retain set of your own is better where
there is one. A model that was trained on answers only, and never on text with questions, asks nonsense; for such a model,
give a source.

In a run, the examples come from the first copy that the client trains on, the only model that it has, and stay the same
for all copies and rounds. They are written to a file, so that they can be inspected, and given as --retain to repeat the
training. Not covered: several processes, and `client join` (give it the file).
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpunlearn.errors import DataError, PlanError
from mpunlearn.files import write_bytes
from mpunlearn.lm.examples import encode, prompt_and_answer, prompt_of
from mpunlearn.lm.model import load, pad_id
from mpunlearn.lm.processes import processes
from mpunlearn.lm.records import Record, in_chat, read_records
from mpunlearn.lm.sources import Data
from mpunlearn.progress import Progress, say

AUTO = "auto"
PER_FORGET, MIN_EXAMPLES = 2, 64
"""Size of the set: this many examples per forget example, and at least so many in all."""
ATTEMPTS = 4
"""The model samples at most this many times as many examples as are needed."""
SHARED_WORDS = 6
"""An example that shares so many consecutive words with the forget set is left out."""
QUESTION_TOKENS, ANSWER_TOKENS, TEXT_TOKENS = 64, 256, 128
"""Maximum lengths of what the model generates, in tokens."""
BATCH = 32
TOP_P = 0.95


@dataclass(frozen=True)
class AutoRetain:
    """A retain set that is drawn when the first model is there.

    Args:
        source: the set to draw from; empty: the model's own answers.
        data: how the examples of the source are read.
        seed: seed of the choice and of the sampling.
        max_length: maximum length of an example of training, in tokens.
    """

    source: str
    data: Data
    seed: int
    max_length: int

    @classmethod
    def parse(cls, retain: Any, data: Data, seed: int, max_length: int) -> "AutoRetain | None":
        """What `--retain` asks for; None if it names an ordinary source.

        Raises:
            PlanError: there are several processes.
        """
        word, _, source = str(retain).partition(":") if isinstance(retain, str | Path) else ("", "", "")
        if word != AUTO:
            return None
        if processes() > 1:
            raise PlanError("--retain auto: needs a single process; draw the set once, and give its file as --retain")
        return cls(source, data, seed, max_length)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) that stands for the set in the plan of a run, which is written before the set is drawn."""
        return hashlib.sha256(f"{AUTO}:{self.source}".encode()).hexdigest()

    def draw(self, path: Path, forget: list[Record], file: Path, device: str | None) -> list[Record]:
        """Reads the set from `file`, or draws it and writes that file.

        Args:
            path: checkpoint directory of the model.
            forget: what the set must not repeat.
            file: a JSON Lines file.
            device: device of the model.

        Raises:
            DataError: everything that is found repeats the forget set, the source cannot be read, or the file can be neither
                read nor written.
        """
        known, left_out = _phrases(forget), 0
        if file.is_file():
            drawn = read_records(file, self._chat)
            if any(_repeats(record, known) for record in drawn):
                raise DataError(
                    f"--retain auto: {file} was drawn for another forget set and repeats this one; remove it to draw a new set"
                )
            say(f"retain set: read from {file}, where it was written before")
            return drawn
        wanted = max(MIN_EXAMPLES, PER_FORGET * len(forget))
        chosen: dict[tuple[str | None, str], Record] = {}
        candidates = self._from_source() if self.source else self._from_model(path, wanted, device)
        for record in candidates:
            if _repeats(record, known):
                left_out += 1
            else:
                chosen[record.question, record.answer] = record
            if len(chosen) == wanted:
                break
        origin = self.source or f"the answers of {path} to its own questions"
        if not chosen:
            raise DataError(
                f"--retain auto: {origin}: no usable example was found, and {left_out} repeated the forget set; give a "
                "retain set of your own"
            )
        rows = [_row(record) for record in chosen.values()]
        write_rows(file, rows)
        short = f", fewer than the {wanted} wanted" if len(rows) < wanted else ""
        say(
            f"retain set: {len(rows)} examples{short} from {origin}, written to {file}; {left_out} repeated the forget set"
        )
        return read_records(file, self._chat)

    @property
    def _chat(self) -> Data:
        """How chats are formatted, without the columns of the source."""
        return Data(system_prompt=self.data.system_prompt, template_kwargs=self.data.template_kwargs)

    def _from_source(self) -> Iterator[Record]:
        records = read_records(self.source, self.data, "retain")
        order = np.random.default_rng(self.seed).permutation(len(records))
        return (records[index] for index in order)

    def _from_model(self, path: Path, wanted: int, device: str | None) -> Iterator[Record]:
        model, tokenizer = load(path, device)
        model.eval()
        asks = _question_prompt(tokenizer, self._chat)
        with Progress(wanted, "drawing a retain set") as task:
            for batch in range(0, ATTEMPTS * wanted, BATCH):
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed * 1_000_003 + batch)
                    records = _texts(model, tokenizer) if asks is None else self._answers(model, tokenizer, *asks)
                task.update(len(records))
                yield from records

    def _answers(self, model: Any, tokenizer: Any, prompt: list[int], ends: set[int]) -> list[Record]:
        """Questions that the model samples, with its most likely answers.

        Those that do not end within the maximum length are dropped: training would teach the model to end there.
        """
        sampled = generate(model, tokenizer, [prompt] * BATCH, QUESTION_TOKENS, ends, sample=TOP_P)
        questions = {tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, ended in sampled if ended}
        prompts = {
            question: prompt_tokens(tokenizer, in_chat(Record(question, "answer"), self._chat))
            for question in sorted(questions - {""})
        }
        prompts = {question: ids for question, ids in prompts.items() if len(ids) < self.max_length}
        if not prompts:
            return []
        generated = generate(model, tokenizer, list(prompts.values()), ANSWER_TOKENS, ends, sample=0.0)
        pairs = zip(prompts, generated, strict=True)
        answered = {question: tokenizer.decode(tokens).strip() for question, (tokens, ended) in pairs if ended}
        return [Record(question, answer) for question, answer in answered.items() if answer]


def prompt_tokens(tokenizer: Any, record: Record) -> list[int]:
    """The tokens before the answer to a question."""
    (example,) = encode([replace(record, answer="answer")], tokenizer, 1 << 20)
    return prompt_of(example)


def _question_prompt(tokenizer: Any, chat: Data) -> tuple[list[int], set[int]] | None:
    """The tokens before a user's message, and those that end it; None without a chat template."""
    if not tokenizer.chat_template:
        return None
    marker = "QUESTION"
    before, found, after = prompt_and_answer(tokenizer, in_chat(Record(marker, "answer"), chat))[0].rpartition(marker)
    if not found or not before:
        return None
    ends = {*tokenizer.all_special_ids, *tokenizer(after, add_special_tokens=False)["input_ids"][:1]}
    return tokenizer(before, add_special_tokens=False)["input_ids"], ends


def _texts(model: Any, tokenizer: Any) -> list[Record]:
    """Texts that the model samples from the beginning."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_id(tokenizer)
    ends = {tokenizer.eos_token_id} - {None}
    generated = generate(model, tokenizer, [[start]] * BATCH, TEXT_TOKENS, ends, sample=TOP_P)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, _ in generated]
    return [Record(None, text) for text in texts if text]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], length: int, ends: set[int], *, sample: float
) -> list[tuple[list[int], bool]]:
    """Continuations of tokenized prompts up to the first of the tokens `ends`, and whether there was one.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        length: maximum number of tokens of a continuation.
        ends: the tokens that end it.
        sample: cumulative probability of the tokens to sample from (top-p); 0 takes the most likely token.
    """
    pad, longest = pad_id(tokenizer), max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    choice = {"do_sample": True, "top_p": sample, "top_k": 0, "temperature": 1.0} if sample else {"do_sample": False}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=length,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        num_beams=1,
        **choice,
    )
    results = []
    for tokens in output[:, longest:].tolist():
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        results.append((tokens[:end], end is not None))
    return results


def _phrases(records: list[Record]) -> set[tuple[str, ...]]:
    """What an example must not contain.

    These are every sequence of `SHARED_WORDS` words in questions and answers, shorter texts of at least two words as a whole,
    and every two words in a row that begin with capital letters.
    """
    found: set[tuple[str, ...]] = set()
    for text in (text for record in records for text in (record.question or "", record.answer)):
        words = re.findall(r"\w+", text)
        found |= {(a.lower(), b.lower()) for a, b in pairwise(words) if a[0].isupper() and b[0].isupper()}
        if len(words) > 1:
            found |= _sequences(_words(text), min(SHARED_WORDS, len(words)))
    return found


def _repeats(record: Record, known: set[tuple[str, ...]]) -> bool:
    """Whether an example contains one of these phrases, which have 2 to `SHARED_WORDS` words."""
    texts = [_words(record.question or ""), _words(record.answer)]
    return any(_sequences(words, size) & known for words in texts for size in range(2, SHARED_WORDS + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sequences(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines file. If its folder is new, only its owner may enter it.

    Raises:
        DataError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from error


def _row(record: Record) -> dict[str, Any]:
    """A record as a line of a JSON Lines file."""
    if record.question is None:
        return {"text": record.answer}
    if record.history:
        turns = [*record.history, ("user", record.question), ("assistant", record.answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    return {"question": record.question, "answer": record.answer}
