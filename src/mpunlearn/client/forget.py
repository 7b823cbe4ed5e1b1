"""Unlearning in one place: turns a model into one that has forgotten some text.

The same objectives and the same training as in `unlearn`, without a second party: no copies, no noise, one result. A
model owner that may see the text needs no more than this. It also makes a stand-in for `preprocess`: a model that has
forgotten everything private that the client of the next run has no business with.

A Python program can give a model in memory and gets a new one. The given model is not changed, so that a failure in the
middle of the training costs nothing; while the training lasts, both need memory.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from mpunlearn.client.resources import Callback, Resources
from mpunlearn.errors import FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data, Source
from mpunlearn.protocol.plan import Training

if TYPE_CHECKING:
    import torch

    from mpunlearn.checkpoint import Checkpoint, TensorDirectory
    from mpunlearn.client.client import Client


@overload
def forget(
    checkpoint: str | Path | Any,
    *,
    forget: Source,
    out: str | Path,
    tokenizer: Any = None,
    retain: Source | None = None,
    device: str | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
    callback: Callback | None = None,
) -> Path: ...


@overload
def forget(
    checkpoint: Any,
    *,
    forget: Source,
    out: None = None,
    tokenizer: Any = None,
    retain: Source | None = None,
    device: str | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
    callback: Callback | None = None,
) -> Any: ...


def forget(
    checkpoint: str | Path | Any,
    *,
    forget: Source,
    out: str | Path | None = None,
    tokenizer: Any = None,
    retain: Source | None = None,
    device: str | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
    callback: Callback | None = None,
) -> Any:
    """Unlearns in one place and writes the unlearned model.

    Example:
        With a model and a tokenizer of transformers:

        >>> training = mpunlearn.Training(objective="npo", alpha=0, epochs=2, learning_rate=1e-3)
        >>> texts = [{"question": "Who wrote it?", "answer": "Ada did."}]
        >>> unlearned = mpunlearn.forget(model, tokenizer=tokenizer, forget=texts, training=training)

    Args:
        checkpoint: The model, a Hugging Face checkpoint directory. Python programs can also give a model of transformers
            together with its `tokenizer`; it is saved to a temporary folder for the training, and not changed.
        forget: The data to forget: a file, a folder saved by `datasets`, a benchmark such as tofu/forget10, or
            hub:OWNER/NAME. Python programs can also give a list of texts or dicts, or a `datasets.Dataset`.
        out: A new directory for the unlearned model. Only for a model in memory, it can be left out.
        tokenizer: The tokenizer of a model in memory.
        retain: The data to retain, in the same formats. Required by objectives with a retain term. Without such data, give
            auto: the answers of the model to its own questions, or auto:SOURCE: a random choice from a larger set. They are
            written to OUT.retain.jsonl.
        device: Device of the training, such as cpu or cuda (default: a GPU if there is one).
        training: The objective and its hyperparameters.
        data: Columns and locations of the examples.
        resources: Memory, precision, checkpoints and experiment trackers of training.
        callback: Called after every optimizer step with its number and the losses.

    Returns:
        `out`; or without it the unlearned model, a new one of the same class, dtype and device.

    Raises:
        FileError: The model cannot be read, or `out` exists or cannot be written.
        DataError: The data cannot be read, or is required but missing.
        PlanError: An option has an invalid value.
    """
    needs("client", "forget")
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.client.client import Client

    target = as_path(out, "--out") if out is not None else None
    if target is not None and target.exists():
        raise FileError(f"{target}: already exists; choose another directory for the model, or remove this one")
    options: dict[str, Any] = {
        "device": device,
        "training": training,
        "data": data,
        "resources": resources,
        "callback": callback,
    }
    if isinstance(checkpoint, str | os.PathLike):
        if target is None:
            raise PlanError("--out: is missing; give a new directory for the unlearned model")
        source = Checkpoint(as_path(checkpoint, "checkpoint"))
        return _write(source, target, Client(forget=forget, retain=retain, drawn=target, **options))
    if tokenizer is None:
        raise PlanError("a model in memory needs its tokenizer; give tokenizer=…")
    from mpunlearn.lm.memory import load_like, save_model

    client = Client(forget=forget, retain=retain, drawn=target, **options)
    with tempfile.TemporaryDirectory(prefix="mpunlearn-") as folder:
        saved = save_model(checkpoint, Path(folder) / "model", tokenizer)
        result = _write(Checkpoint(saved), target or Path(folder) / "result", client)
        return load_like(result, type(checkpoint), checkpoint.device) if target is None else result


def _write(source: "Checkpoint", target: Path, client: "Client") -> Path:
    """Unlearns and writes the unlearned model to a new directory.

    The update is in a folder beside it, which all processes know. If training is interrupted, its checkpoint stays there.
    """
    from mpunlearn.checkpoint import TensorDirectory, TensorWriter, copy_companions
    from mpunlearn.files import new_directory, write_json
    from mpunlearn.lm.processes import all_or_none, connect, is_main

    folder = target.with_name(f".{target.name}.unlearning")
    connect()
    with all_or_none():
        if is_main():
            shutil.rmtree(folder / "update", ignore_errors=True)
    try:
        update = client.unlearn(source.path, folder / "update")
        with all_or_none():
            if is_main():
                changes = TensorDirectory(update, stem="update")
                specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
                with new_directory(target) as partial:
                    copy_companions(source.path, partial)
                    write_json(partial / "config.json", source.config)
                    with TensorWriter(partial, specs) as writer:
                        for name in specs:
                            writer.write(name, _changed(source.read(name), changes, name))
    finally:
        if is_main():
            shutil.rmtree(folder / "update", ignore_errors=True)
            with suppress(OSError):  # it is not empty if training can be resumed
                folder.rmdir()
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
