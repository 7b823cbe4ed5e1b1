"""A small Llama that has learned real text: the second world of `disclosure.py`, trained on TOFU and cached.

*Base* is trained from scratch on the questions of 50 TOFU authors, which count as public. *Original* is base trained
further on 12 other authors, and *retrained* is base trained further on 10 of these. The two authors in between are to be
forgotten. Seeds choose other authors.

Not covered: base knows its own authors better than English, as any model of this size does. The TOFU benchmark (Maini et
al., arXiv 2401.06121) is not part of this repository.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from mpunlearn.demo import models
from mpunlearn.demo.models import TrainedWorld
from mpunlearn.demo.world import Recipe
from mpunlearn.files import cache_folder, new_directory
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record
from tofu_small import QUESTIONS_PER_AUTHOR, read, write

RECIPE = Recipe(
    authors=12,
    forgotten=2,
    public=50,
    vocabulary=4000,
    hidden=192,
    ffn=576,
    learning_rate=2e-3,
    base_epochs=12,
    base_batch=16,
    epochs=10,
    batch=8,
)
TUNING_RATE = 8e-4
"""Learning rate of original and retrained: they should know their texts, but not by heart."""


def tofu_world(tofu: Path, seed: int = 0, recipe: Recipe = RECIPE, cache: Path | None = None) -> TrainedWorld:
    """The trained world of a seed, from the cache or trained now, in this process.

    Args:
        tofu: directory with full.json.
        seed: seed for the choice of authors and the training.
        recipe: sizes and hyperparameters.
        cache: the directory to store it in (default: in the user's cache folder).
    """
    sources = (Path(__file__), Path(models.__file__), tofu / "full.json")
    made_by = f"{recipe} {seed} {torch.__version__}".encode()
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + made_by).hexdigest()
    world = TrainedWorld((cache or cache_folder()) / f"tofu-{digest[:16]}")
    if not world.path.is_dir():
        world.path.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(world.path) as folder:
            _build(TrainedWorld(folder), split(read(tofu / "full.json"), seed, recipe), seed, recipe)
    return world


def split(records: list[Record], seed: int, recipe: Recipe) -> dict[str, list[Record]]:
    """The questions of some authors each to forget, to retain, and that are public."""
    count = QUESTIONS_PER_AUTHOR
    authors = [records[start : start + count] for start in range(0, len(records), count)]
    order = np.random.default_rng(seed).permutation(len(authors))[: recipe.authors + recipe.public]
    groups = np.split(order, [recipe.forgotten, recipe.authors])
    names = ("forget", "retain", "public")
    return {
        name: [record for author in group for record in authors[author]]
        for name, group in zip(names, groups, strict=True)
    }


def _build(world: TrainedWorld, parts: dict[str, list[Record]], seed: int, recipe: Recipe) -> None:
    (world.path / "data").mkdir()
    for name, records in parts.items():
        write(world.data(name), records)
    texts = [text for part in parts.values() for record in part for text in (str(record.question), record.answer)]
    tokenizer = models.train_tokenizer(texts, recipe.vocabulary)
    torch.manual_seed(seed)
    base = models.new_llama(tokenizer, recipe)
    rate, name = recipe.learning_rate, "training the base model"
    models.fit(base, tokenizer, parts["public"], recipe.base_epochs, recipe.base_batch, rate, seed, name)
    models.save(base, tokenizer, world.base)
    for path, records in ((world.original, parts["forget"] + parts["retain"]), (world.retrained, parts["retain"])):
        model, _ = load(world.base)
        torch.manual_seed(seed)
        name = f"training the {path.name} model"
        models.fit(model, tokenizer, records, recipe.epochs, recipe.batch, TUNING_RATE, seed, name)
        models.save(model, tokenizer, path)
