"""Example."""

import shutil
from pathlib import Path

from mpunlearn.demo import models
from mpunlearn.files import new_directory


def example(out: str | Path, *, seed: int = 0) -> Path:
    """Writes a small model and text to try everything with, trained once and cached.

    Args:
        out: a new directory: OUT/model, OUT/forget.jsonl, OUT/retain.jsonl.
        seed: of the world and the model.

    Returns:
        `out`.

    Raises:
        CheckpointError: `out` exists or cannot be written.
    """
    world = models.prepare(seed)
    with new_directory(out) as folder:
        shutil.copytree(world.original, folder / "model")
        for split in ("forget", "retain"):
            shutil.copyfile(world.data(split), folder / f"{split}.jsonl")
    return Path(out)
