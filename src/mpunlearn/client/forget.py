"""Unlearning in one place: turns a model into one that has forgotten some text.

The same objectives and the same training as in `unlearn`, without a second party: no copies, no noise, one result. A
model owner that may see the text needs no more than this. It also makes a stand-in for `preprocess`: a model that has
forgotten everything private that the client of the next run has no business with.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.client.resources import Resources
from mpunlearn.errors import FileError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.plan import Training

if TYPE_CHECKING:
    import torch

    from mpunlearn.checkpoint import TensorDirectory


def forget(
    checkpoint: str | Path,
    *,
    forget: str | Path,
    out: str | Path,
    retain: str | Path | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> Path:
    """Unlearns in one place and writes the unlearned model.

    Args:
        checkpoint: The model, a Hugging Face checkpoint directory.
        forget: The data to forget: a file, a folder saved by `datasets`, a benchmark such as tofu/forget10, or
            hub:OWNER/NAME.
        out: A new directory for the unlearned model.
        retain: The data to retain, in the same formats. Required by objectives with a retain term.
        training: The objective and its hyperparameters.
        data: Columns and locations of the examples.
        resources: Memory, precision, checkpoints and experiment trackers of training.

    Returns:
        `out`.

    Raises:
        FileError: The model cannot be read, or `out` exists or cannot be written.
        DataError: The data cannot be read, or is required but missing.
        PlanError: An option has an invalid value.
    """
    needs("client", "forget")
    from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter, copy_companions
    from mpunlearn.client.client import Client
    from mpunlearn.files import new_directory, write_json
    from mpunlearn.lm.processes import is_main

    source, target = Checkpoint(as_path(checkpoint, "checkpoint")), as_path(out, "--out")
    if target.exists():
        raise FileError(f"{target}: already exists; choose another directory for the model, or remove this one")
    client = Client(forget=forget, retain=retain, training=training, data=data, resources=resources)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        update = client.unlearn(source.path, Path(folder) / "update")
        if is_main():
            changes = TensorDirectory(update, stem="update")
            specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
            with new_directory(target) as partial:
                copy_companions(source.path, partial)
                write_json(partial / "config.json", source.config)
                with TensorWriter(partial, specs) as writer:
                    for name in specs:
                        writer.write(name, _changed(source.read(name), changes, name))
    return target


def _changed(stored: "torch.Tensor", changes: "TensorDirectory", name: str) -> "torch.Tensor":
    """A weight plus its update, computed in float32 and stored in the dtype of the weight."""
    import torch

    from mpunlearn.protocol.exchange import FACTORS

    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    if name in changes.tensors:
        return (stored.to(wide) + changes.read(name).to(wide)).to(stored.dtype)
    if name + FACTORS[0] in changes.tensors:
        a, b = (changes.read(name + factor).to(wide) for factor in FACTORS)
        return torch.addmm(stored.to(wide), b, a).to(stored.dtype)
    return stored
