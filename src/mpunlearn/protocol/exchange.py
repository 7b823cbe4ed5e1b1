"""What crosses between the parties: published copies and updates.

A published copy is an ordinary checkpoint whose config.json carries a `Card`: run, round and number of the copy. Hugging Face
tools keep unknown config entries, so a checkpoint that any of them trained from the copy still says which copy it came from.

An update is a directory with `update.json`, which holds the same card, and `update.safetensors` with Δ'_k = θ'_k - θ_k of the
trained tensors under the copy's names. A tensor W may instead be given by two factors, W.lora_A (rank x inputs) and W.lora_B
(outputs x rank), whose product lora_B · lora_A is its Δ'_k. The card is public and says nothing about either party's secrets.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint, TensorDirectory, dtype_name, without_paths
from mpunlearn.errors import CheckpointError, FileError, SchemaError, UpdateError
from mpunlearn.files import write_json
from mpunlearn.schema import parse, read

FACTORS = (".lora_A", ".lora_B")
"""Suffixes of the names of an update's factors."""
CARD = "mpunlearn"
"""The entry of config.json and of update.json that holds the card."""


@dataclass(frozen=True)
class Card:
    """Which copy of which round of which run."""

    run: str
    """A random identifier of the run, hexadecimal."""
    round: int
    """Counted from 1."""
    copy: int
    """Counted from 1."""
    copies: int
    """Number m of copies."""

    def __post_init__(self) -> None:
        if not (self.round > 0 and 0 < self.copy <= self.copies):
            raise SchemaError(f"Card: impossible numbers, {self}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Card | None":
        """The card in the content of a config.json, or None if it has no valid one."""
        try:
            return parse(cls, config.get(CARD))
        except SchemaError:
            return None

    def entry(self) -> dict[str, Any]:
        """The card as an entry of config.json."""
        return {CARD: dataclasses.asdict(self)}

    def __str__(self) -> str:
        return f"copy {self.copy} of {self.copies}, round {self.round}, run {self.run[:8]}"


@dataclass(frozen=True)
class UpdateManifest:
    """The content of update.json. Format 1."""

    mpunlearn: Card | None = None
    """None: an update of an ordinary checkpoint, which no server accepts."""
    format: int = 1

    def save(self, folder: Path) -> None:
        """Writes FOLDER/update.json."""
        entry = {} if self.mpunlearn is None else self.mpunlearn.entry()
        write_json(folder / "update.json", {"format": self.format, **entry})


@dataclass(frozen=True)
class ReceivedUpdate:
    """What the client sent back. Nothing of it is trusted yet but its card and its file format."""

    card: Card
    tensors: TensorDirectory
    trained: Checkpoint | None
    """The checkpoint, if a trained checkpoint was sent instead of an update; the server then computes the difference."""

    @classmethod
    def open(cls, path: str | Path) -> "ReceivedUpdate":
        """Opens an update, or a checkpoint that was trained from a published copy.

        Raises:
            UpdateError: it is neither, or does not say which copy it belongs to.
        """
        path = Path(path)
        try:
            if (path / "update.json").is_file():
                card = read(UpdateManifest, path / "update.json").mpunlearn
                tensors, trained = TensorDirectory(path, stem="update"), None
            else:
                tensors = trained = Checkpoint(path)
                card = Card.of(trained.config)
        except (FileError, SchemaError) as error:
            raise UpdateError(f"{path}: neither an update nor a trained checkpoint: {error}") from error
        if card is None:
            raise UpdateError(
                f"{path}: does not say which copy it was made from; expected the entry {CARD!r} of the published copy's "
                "config.json in its own config.json, copy it over"
            )
        return cls(card, tensors, trained)


def derived_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], card: Card | None = None
) -> dict[str, Any]:
    """The config.json of a checkpoint that is made from another.

    It names the dtype that most tensors have, carries the card if one is given, and no paths of the server's machine.

    Args:
        config: the other checkpoint's config.json.
        specs: dtype and shape of every tensor of the new checkpoint.
        card: of a published copy.

    Raises:
        CheckpointError: there are no tensors.
    """
    if not specs:
        raise CheckpointError("a checkpoint needs at least one tensor")
    kept = {key: value for key, value in without_paths(config).items() if key != CARD}
    dtypes = [dtype for dtype, _ in specs.values()]
    kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = dtype_name(max(dtypes, key=dtypes.count))
    return {**kept, **(card.entry() if card else {})}
