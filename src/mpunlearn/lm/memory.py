"""Models in memory, on their way to and from checkpoint directories.

Everything else reads and writes checkpoint directories, one tensor at a time. A program that holds a model in memory gets
the same results to the last bit, because the model is saved to a temporary folder first. That costs disk space, or memory
if the folder is in a file system such as /dev/shm, but there is only one implementation of everything.

Not covered: several processes, and models whose tensors have different dtypes (they are loaded in the most common one).
"""

from pathlib import Path
from typing import Any

import transformers

from mpunlearn.errors import FileError, PlanError
from mpunlearn.files import read_json, write_json
from mpunlearn.lm.model import quiet
from mpunlearn.lm.processes import processes


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """Saves a loaded model, and the tokenizer if there is one, as a checkpoint directory.

    Raises:
        PlanError: it is not a model of transformers, it has adapters, or there are several processes.
        FileError: the folder cannot be written.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise PlanError(
            f"expected a checkpoint directory or a model of transformers, found an object of type {type(model).__name__}"
        )
    if hasattr(model, "peft_config"):
        raise PlanError("the model has adapters; merge them with `merge_and_unload()` first")
    if processes() > 1:
        raise PlanError("models in memory need a single process; save the model and give its directory instead")
    return _save(folder, model, tokenizer)


def save_trained(model: Any, folder: Path) -> Path:
    """Saves a model that was trained from a published copy; of a model with a LoRA adapter, only the adapter.

    Raises:
        PlanError: as for `save_model`.
        FileError: the folder cannot be written.
    """
    if not hasattr(model, "peft_config"):
        return save_model(model, folder)
    _save(folder, model, model.config)
    config = folder / "adapter_config.json"
    if config.is_file():  # the model's own configuration says which copy it was; PEFT's may name another one's path
        write_json(config, {**read_json(config), "base_model_name_or_path": None})
    return folder


def load_like(path: Path, kind: Any, device: Any) -> Any:
    """Loads a checkpoint directory as a model of the class `kind`, in its stored dtype, on a device."""
    with quiet():
        return kind.from_pretrained(path, dtype="auto", local_files_only=True).to(device)


def _save(folder: Path, *parts: Any) -> Path:
    try:
        with quiet():
            for part in parts:
                if part is not None:
                    part.save_pretrained(folder)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error}; free some space, or choose another folder") from error
    return folder
