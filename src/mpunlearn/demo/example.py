"""The command `example`: writes a small model and data for trying out the other commands."""

import shutil
from pathlib import Path

from mpunlearn.extras import needs
from mpunlearn.files import as_path, new_directory

RUN_YAML = """\
# Options of `mpunlearn run` and `mpunlearn server start` that work well for this example.
rounds: 5
objective: npo
epochs: 2
learning_rate: 1.0e-3
batch_size: 8
gamma: 0.1
"""


def example(out: str | Path, *, seed: int = 0) -> Path:
    """Writes a small model and data for trying out the other commands. The models are trained once and then cached.

    Args:
        out: A new directory. It gets OUT/model; OUT/retrained, the model that never saw the forget set; OUT/forget.jsonl,
            OUT/retain.jsonl and further question sets, so that OUT is also a benchmark for `evaluate`; and OUT/run.yaml
            with options that suit them.
        seed: Seed for the fictitious data and the models.

    Returns:
        `out`.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    needs("client", "example")
    from mpunlearn.demo.models import trained_world
    from mpunlearn.demo.world import SPLITS

    folder = as_path(out, "out")
    with new_directory(folder) as partial:
        world = trained_world(seed)
        shutil.copytree(world.original, partial / "model")
        shutil.copytree(world.retrained, partial / "retrained")
        for split in SPLITS:
            shutil.copyfile(world.data(split), partial / f"{split}.jsonl")
        (partial / "run.yaml").write_text(RUN_YAML)
    return folder
