"""The models on which `objectives.py` and `at_scale.py` unlearn, with their data for training and for evaluation.

A world has an *original* model, which knows everything, a *retrained* one, which never saw the forget set, the examples of
both parties, and a benchmark in TOFU's format. There are two kinds: the built-in world of the demo, and Llamas trained from
scratch on real TOFU text (arXiv 2401.06121), which is not part of this repository.

In the TOFU worlds, original and retrained also learn TOFU's real authors and world facts, since a model that knows nothing
else has no utility to lose. Twenty authors are trained on by neither and serve as the holdout set of the membership attacks.
AltPO's alternate answer is the first wrong answer to each question; the evaluation uses only the others.

Not covered: models that have read other text before.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpunlearn.demo import models
from mpunlearn.demo.models import TrainedWorld
from mpunlearn.demo.world import SPLITS, Recipe
from mpunlearn.files import new_directory
from mpunlearn.lm.examples import IGNORED, Example, collate, encode
from mpunlearn.lm.records import Record
from tofu_small import QUESTIONS_PER_AUTHOR

Row = dict[str, Any]
HOLDOUT_AUTHORS = 20
MEASURED = 100
"""Questions of the retain set and of the public sets that are measured."""


class OutOfTime(Exception):
    """The time is up; what was done so far is on disk."""


@dataclass(frozen=True)
class World(TrainedWorld):
    """The models original and retrained, the examples in training/, and the questions in data/. It has no base."""

    name: str

    @property
    def benchmark(self) -> Path:
        """The questions for `evaluate --benchmark`."""
        return self.path / "data"

    def training(self, split: str) -> Path:
        """The examples of forget or retain."""
        return self.path / "training" / f"{split}.jsonl"


@dataclass(frozen=True)
class Scale:
    """The size of a TOFU world."""

    forgotten: int
    """Authors to forget, at most 20: those with paraphrased answers."""
    retained: int
    """Authors to keep, at most 160."""
    recipe: Recipe = field(default_factory=Recipe)
    precision: str = "float32"
    """float32, or bfloat16 for autocast."""


TOFU_20 = Scale(2, 18, Recipe(vocabulary=4000, hidden=128, ffn=344, epochs=24, batch=16, learning_rate=4e-3))
"""One million parameters and 20 authors."""


def demo_world(seed: int, folder: Path, recipe: Recipe | None = None) -> World:
    """The built-in world of a seed, with models from the cache."""
    trained = models.trained_world(seed, recipe)
    world = World(folder / f"demo-{seed}", "demo")
    if not world.path.is_dir():
        rows = {split: _read(trained.data(split)) for split in SPLITS}
        with new_directory(world.path) as new:
            _write_data(new, rows, rows["retain"])
            for model in (trained.original, trained.retrained):
                (new / model.name).symlink_to(model.resolve())
    return world


def tofu_world(
    tofu: Path, name: str, scale: Scale, seed: int, folder: Path, device: str = "cpu", deadline: float = math.inf
) -> World:
    """The TOFU world of a seed, trained now unless the folder has it.

    Args:
        tofu: directory with TOFU's JSON files.
        name: its name.
        scale: its size.
        seed: seed for initialization and the order of examples. The authors are always the same.
        folder: where worlds are kept.
        device: where to train.
        deadline: value of `time.monotonic` after which training stops.

    Raises:
        OutOfTime: the deadline has passed. Training goes on from the last epoch when called again.
    """
    world = World(folder / f"{name}-{seed}", name)
    if world.path.is_dir():
        return world
    rows, kept = _tofu_rows(tofu, scale)
    known = {split: [Record(row["question"], row["answer"]) for row in part] for split, part in rows.items()}
    retained = [Record(row["question"], row["answer"]) for row in kept] + known["real_authors"] + known["world_facts"]
    texts = [text for record in known["forget"] + retained for text in (str(record.question), record.answer)]
    tokenizer = models.train_tokenizer(texts, scale.recipe.vocabulary)
    work = folder / f"{name}-{seed}-training"
    work.mkdir(parents=True, exist_ok=True)
    for model, records in (("original", known["forget"] + retained), ("retrained", retained)):
        if not (work / model).is_dir():
            torch.manual_seed(seed)
            llama = models.new_llama(tokenizer, scale.recipe).to(device)
            fit(llama, tokenizer, records, scale, seed, work / f"{model}.pt", deadline, f"{name} {seed}, {model}")
            with new_directory(work / model) as new:
                models.save(llama.cpu(), tokenizer, new)
    with new_directory(world.path) as new:
        _write_data(new, rows, kept)
        for model in ("original", "retrained"):
            (work / model).rename(new / model)
    return world


def examples_of(world: World, split: str) -> list[Example]:
    """The encoded training examples of forget or retain."""
    import transformers

    records = [Record(row["question"], row["answer"]) for row in _read(world.training(split))]
    return encode(records, transformers.AutoTokenizer.from_pretrained(world.original), 512)


def fit(
    model: Any, tokenizer: Any, records: list[Record], scale: Scale, seed: int, file: Path, deadline: float, what: str
) -> None:
    """Supervised training on answers like `demo.models.fit`, on any device, resumable after every epoch.

    Args:
        model: the model, trained in place.
        tokenizer: its tokenizer.
        records: the examples.
        scale: epochs, batch size, learning rate and precision.
        seed: seed for the order of examples.
        file: where the state is kept between epochs; removed at the end.
        deadline: value of `time.monotonic` after which no further epoch begins.
        what: name in messages.

    Raises:
        OutOfTime: the deadline has passed.
    """
    recipe, examples = scale.recipe, encode(records, tokenizer, 512)
    steps_per_epoch = math.ceil(len(examples) / recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=0.1,
        cycle_momentum=False,
    )
    done = 0
    if file.is_file():
        state = torch.load(file, map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        done = state["epochs"]
    model.train()
    for epoch in range(done, recipe.epochs):
        if time.monotonic() > deadline:
            raise OutOfTime(f"{what}: stopped after {epoch} of {recipe.epochs} epochs")
        begin, last = time.monotonic(), 0.0
        order = np.random.default_rng((seed, epoch)).permutation(len(examples))
        for start in range(0, len(order), recipe.batch):
            inputs = collate([examples[i] for i in order[start : start + recipe.batch]], tokenizer.pad_token_id)
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=scale.precision == "bfloat16"):
                output = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                targets = inputs["labels"][:, 1:]
                logits = model.lm_head(output.last_hidden_state[:, :-1][targets != IGNORED])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets[targets != IGNORED])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            last = float(loss.detach())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({**state, "epochs": epoch + 1}, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        seconds = time.monotonic() - begin
        print(f"{what}: epoch {epoch + 1} of {recipe.epochs}, last loss {last:.3f}, {seconds:.0f} s", flush=True)
    file.unlink(missing_ok=True)


def _tofu_rows(tofu: Path, scale: Scale) -> tuple[dict[str, list[Row]], list[Row]]:
    """The questions of every set, and all examples to keep."""
    count, kept = QUESTIONS_PER_AUTHOR, _read(tofu / "retain90.json")
    rows = {
        "forget": _read(tofu / "forget10_perturbed.json")[-count * scale.forgotten :],
        "retain": _read(tofu / "retain_perturbed.json")[: count * scale.retained],
        "real_authors": _read(tofu / "real_authors_perturbed.json"),
        "world_facts": _read(tofu / "world_facts_perturbed.json"),
        "holdout": kept[-count * HOLDOUT_AUTHORS :],
    }
    return rows, kept[: count * scale.retained]


def _write_data(folder: Path, rows: dict[str, list[Row]], kept: list[Row]) -> None:
    """Writes training/ and data/."""
    forget = [
        {"question": row["question"], "answer": row["answer"], "wrong_answer": row["perturbed_answer"][0]}
        for row in rows["forget"]
    ]
    retain = [{"question": row["question"], "answer": row["answer"]} for row in kept]
    _write(folder / "training" / "forget.jsonl", forget)
    _write(folder / "training" / "retain.jsonl", retain)
    for split, part in rows.items():
        if split == "forget":
            part = [{**row, "perturbed_answer": row["perturbed_answer"][1:]} for row in part]
        elif split != "holdout":
            part = part[:: max(1, len(part) // MEASURED)][:MEASURED]
        _write(folder / "data" / f"{split}.jsonl", part)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
