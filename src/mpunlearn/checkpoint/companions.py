"""The files beside the tensors."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint.reader import Checkpoint
from mpunlearn.files import read_json, write_json

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files carried from a checkpoint to what is made of it. A list of names, not "everything else": a training folder may
also hold optimizer states or logs, which must not be published."""


def copy_companions(source: Path, target: Path) -> None:
    """Carries tokenizer, chat template and generation settings from one checkpoint directory to another."""
    for name in COMPANIONS:
        if name == "tokenizer_config.json" and (source / name).is_file():
            write_json(target / name, without_paths(read_json(source / name)))
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def checkpoint_files(path: str | Path) -> list[Path]:
    """The files that make a checkpoint directory loadable: config, shards and their index, tokenizer, generation settings."""
    checkpoint = Checkpoint(path)
    shards = {info.file for info in checkpoint.tensors.values()}
    names = {"config.json", "model.safetensors.index.json", *COMPANIONS, *shards}
    return [file for name in sorted(names) if (file := checkpoint.path / name).is_file()]


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the entries that name where its owner keeps things: absolute paths, and `name_or_path`."""

    def path(value: Any) -> bool:
        return isinstance(value, str) and (value.startswith(("/", "~")) or value[1:3] == ":\\") and len(value) > 1

    return {key: value for key, value in config.items() if key.strip("_") != "name_or_path" and not path(value)}
