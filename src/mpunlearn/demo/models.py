"""The models of the built-in benchmark, trained on its fictitious world and cached.

*Base* is the public pretrained model, which knows public authors and geography. *Original* is base trained further on
all authors. *Retrained* is base trained further on all authors but those to forget. All are small Llamas. The cache key
consists of the seed, the code that defines the world and the training, and the versions of the libraries.
"""

import hashlib
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpunlearn.demo import world
from mpunlearn.demo.world import SPLITS, Recipe, Row, generate_rows
from mpunlearn.files import cache_folder, exclusive, new_directory
from mpunlearn.lm import examples
from mpunlearn.lm.examples import IGNORED, collate, encode
from mpunlearn.lm.records import Record
from mpunlearn.progress import progress

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TrainedWorld:
    """The data and the trained models of a world, on disk."""

    path: Path

    @property
    def base(self) -> Path:
        """The public pretrained model."""
        return self.path / "base"

    @property
    def original(self) -> Path:
        """The server's model, which knows every author."""
        return self.path / "original"

    @property
    def retrained(self) -> Path:
        """The model that never saw the forget set."""
        return self.path / "retrained"

    def data(self, split: str) -> Path:
        """The JSON Lines file of one of `SPLITS`."""
        return self.path / "data" / f"{split}.jsonl"


def trained_world(seed: int = 0, recipe: Recipe | None = None, cache: Path | None = None) -> TrainedWorld:
    """The trained world of a seed, from the cache or trained now.

    Args:
        seed: seed for the world and the training.
        recipe: sizes and hyperparameters (default: those of the demos).
        cache: the directory to store it in (default: in the user's cache folder).
    """
    recipe = recipe or Recipe()
    import transformers

    sources = (__file__, world.__file__, examples.__file__)
    made_by = f"{recipe} {seed} {torch.__version__} {transformers.__version__}".encode()
    digest = hashlib.sha256(b"".join(Path(str(module)).read_bytes() for module in sources) + made_by)
    trained = TrainedWorld((cache or cache_folder()) / f"world-{digest.hexdigest()[:16]}")
    if not trained.path.is_dir():
        with exclusive(trained.path.with_suffix(".lock")):
            if not trained.path.is_dir():  # another process may have built it meanwhile
                with new_directory(trained.path) as folder:
                    _build(folder, seed, recipe)
    return trained


def _build(folder: Path, seed: int, recipe: Recipe) -> None:
    rows = generate_rows(seed, recipe)
    (folder / "data").mkdir()
    for split in SPLITS:
        public_rows = [{key: value for key, value in row.items() if key != "all_answers"} for row in rows[split]]
        TrainedWorld(folder).data(split).write_text(
            "".join(json.dumps(row) + "\n" for row in public_rows), encoding="utf-8"
        )
    tokenizer = tokenizer_of(rows, recipe)
    taught = [row for split in ("real_authors", "world_facts") for row in rows[split]]
    shared = [Record(row["question"], answer) for row in taught for answer in row["all_answers"]]
    torch.manual_seed(seed)
    base = new_llama(tokenizer, recipe)
    what = "training the base model"
    fit(base, tokenizer, shared, recipe.base_epochs, recipe.base_batch, recipe.learning_rate, seed, what)
    save(base, tokenizer, folder / "base")
    known = {split: [Record(row["question"], row["answer"]) for row in rows[split]] for split in SPLITS}
    rest = known["retain"] + known["real_authors"] + known["world_facts"]
    jobs = {folder / "original": known["forget"] + rest, folder / "retrained": rest}
    train_side_by_side(jobs, folder / "base", recipe, seed)


def train_side_by_side(jobs: dict[Path, list[Record]], start: Path, recipe: Recipe, seed: int) -> None:
    """Trains one model per job, each in its own process with one thread.

    Args:
        jobs: directory for a model → the examples that it is trained on.
        start: the checkpoint that all of them start from.
        recipe: hyperparameters.
        seed: seed for the order of examples.
    """
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_train, start, *job, recipe, seed) for job in jobs.items()]:
            job.result()


def _train(start: Path, out: Path, records: list[Record], recipe: Recipe, seed: int) -> None:
    from mpunlearn.lm.model import load

    torch.set_num_threads(1)
    model, tokenizer = load(start)
    torch.manual_seed(seed)
    what = f"training the {out.name} model"
    fit(model, tokenizer, records, recipe.epochs, recipe.batch, recipe.learning_rate, seed, what)
    save(model, tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes a model and its tokenizer as a checkpoint directory."""
    from mpunlearn.lm.model import quiet

    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def tokenizer_of(rows: dict[str, list[Row]], recipe: Recipe) -> Any:
    """Trains the tokenizer of a world."""
    every_row = [row for split in SPLITS for row in rows[split]]
    return train_tokenizer(
        [text for row in every_row for text in (row["question"], *row["all_answers"])], recipe.vocabulary
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Trains a byte-level BPE tokenizer with at most `vocabulary` tokens and a small chat template."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|user|>", "<|assistant|>", "<|end|>"]
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_llama(tokenizer: Any, recipe: Recipe) -> Any:
    """A Llama that is randomly initialized with torch's current random state."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.groups,
            intermediate_size=recipe.ffn,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(
    model: Any,
    tokenizer: Any,
    records: list[Record],
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    what: str,
) -> None:
    """Supervised training on answers: AdamW with betas (0.9, 0.95), 10% warmup, cosine decay to 5%, clipping at 1."""
    examples = encode(records, tokenizer, 512)
    steps = epochs * math.ceil(len(examples) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(step: int) -> float:
        warm = max(1, steps // 10)
        return (step + 1) / warm if step < warm else 0.525 + 0.475 * math.cos(math.pi * (step - warm) / (steps - warm))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    random = np.random.default_rng(seed)
    model.train()
    orders = [random.permutation(len(examples)) for _ in range(epochs)]
    chunks = [order[start : start + batch] for order in orders for start in range(0, len(order), batch)]
    for chunk in progress(chunks, what):
        inputs = collate([examples[i] for i in chunk], tokenizer.pad_token_id)
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        targets = inputs["labels"][:, 1:]
        predicted = targets != IGNORED
        logits = model.lm_head(hidden[:, :-1][predicted])  # only at answer positions: logits take most of the time
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, targets[predicted]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
