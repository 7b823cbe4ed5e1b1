"""The files next to a checkpoint's tensors: tokenizer, chat template, generation settings.

A checkpoint that is derived from another one needs the other's tokenizer. Only the files listed here are copied, not
everything that is not a tensor, because a training folder may also contain optimizer states or logs, which must not be
published. Paths on the owner's disk are removed from configurations.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from mpunlearn.checkpoint.reader import Checkpoint
from mpunlearn.storage import Place, read_json, read_part, size_of, write_bytes, write_json

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
"""Names of the files that are copied from a checkpoint to one that is derived from it."""


def copy_companions(source: Place, target: Place) -> None:
    """Copies the `COMPANIONS` of one checkpoint directory to another.

    Raises:
        FileError: tokenizer_config.json is not a JSON object.
        OSError: a file cannot be copied.
    """
    found = {file.name for file in source.iterdir()}
    for name in COMPANIONS:
        if name == "tokenizer_config.json" and name in found:
            write_json(target / name, without_paths(read_json(source / name)))
        elif name in found:
            write_bytes(target / name, read_part(source / name, 0, size_of(source / name)))


@overload
def checkpoint_files(path: str | Path) -> list[Path]: ...
@overload
def checkpoint_files(path: Place) -> list[Place]: ...
def checkpoint_files(path: str | Place) -> Sequence[Place]:
    """The files needed to load a checkpoint directory: config, shards and their index, and the `COMPANIONS`.

    Raises:
        CheckpointError: it is not a checkpoint directory.
    """
    checkpoint = Checkpoint(path)
    shards = {info.file for info in checkpoint.tensors.values()}
    names = {"config.json", "model.safetensors.index.json", *COMPANIONS, *shards}
    there = {file.name for file in checkpoint.place.iterdir()}
    return [checkpoint.place / name for name in sorted(names & there)]


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without entries that reveal where its owner keeps files: `name_or_path` and absolute paths."""

    def is_path(value: Any) -> bool:
        return isinstance(value, str) and (value.startswith(("/", "~")) or value[1:3] == ":\\") and len(value) > 1

    return {key: value for key, value in config.items() if key.strip("_") != "name_or_path" and not is_path(value)}
