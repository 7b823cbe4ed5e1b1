"""A small model and data to try everything with."""

import shutil
from pathlib import Path

from mpunlearn.files import as_path, new_directory

RUN_YAML = """\
# Values that suit this example; for `mpunlearn run` and `mpunlearn server start`.
rounds: 5
copies: 3
kappa: 0.05
objective: npo
epochs: 2
learning_rate: 1.0e-3
batch_size: 8
gamma: 0.1
"""


def example(out: str | Path, *, seed: int = 0) -> Path:
    """Writes a small model and data to try everything with; trained once, then cached.

    Args:
        out: A new directory: OUT/model, OUT/forget.jsonl, OUT/retain.jsonl, and OUT/run.yaml with options that suit them.
        seed: Seed of the world and the model.

    Returns:
        `out`.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    from mpunlearn.demo.models import trained_world

    folder = as_path(out, "out")
    with new_directory(folder) as partial:
        world = trained_world(seed)
        shutil.copytree(world.original, partial / "model")
        for split in ("forget", "retain"):
            shutil.copyfile(world.data(split), partial / f"{split}.jsonl")
        (partial / "run.yaml").write_text(RUN_YAML)
    return folder
