"""The directories that the parties exchange: published copies and updates.

A published copy is an ordinary Hugging Face checkpoint of the perturbed model, whose config.json contains a `Card`: the
run, the round and the number of the copy. Hugging Face tools preserve unknown config entries, so a checkpoint that any
of them trains from the copy still identifies the copy.

An update is a directory with `update.json`, which contains the same card, and `update.safetensors`, which contains the
difference Δ'_k = θ'_k - θ_k between the trained model and copy k, for the trained tensors and under the names of the
copy. A matrix W can instead be given by two LoRA factors, W.lora_A (rank x inputs) and W.lora_B (outputs x rank), with
Δ'_k = lora_B · lora_A. The card is public and reveals nothing about either party's secrets.
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
"""Suffixes of the names of LoRA factors in an update."""
CARD = "mpunlearn"
"""Key of the card in config.json and update.json."""


@dataclass(frozen=True)
class Card:
    """Identifies a copy: its run, its round and its number."""

    run: str
    """Random identifier of the run, hexadecimal."""
    round: int
    """Starts at 1."""
    copy: int
    """Starts at 1."""
    copies: int
    """Number m of copies."""

    def __post_init__(self) -> None:
        if not (self.round > 0 and 0 < self.copy <= self.copies):
            raise SchemaError(f"Card: invalid numbers: {self}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Card | None":
        """The card in the content of a config.json, or None if there is no valid card."""
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
    """The card; None for an update of an ordinary checkpoint, which no server accepts."""
    format: int = 1

    def save(self, folder: Path) -> None:
        """Writes FOLDER/update.json."""
        entry = {} if self.mpunlearn is None else self.mpunlearn.entry()
        write_json(folder / "update.json", {"format": self.format, **entry})


@dataclass(frozen=True)
class ReceivedUpdate:
    """An update as received from a client. Only its card and its file format have been validated."""

    card: Card
    tensors: TensorDirectory
    trained: Checkpoint | None
    """The trained checkpoint, if the client sent one instead of an update; the server then computes the difference."""

    @classmethod
    def open(cls, path: str | Path) -> "ReceivedUpdate":
        """Opens an update, or a checkpoint that was trained from a published copy.

        Raises:
            UpdateError: the directory is neither, or has no card.
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
                f"{path}: does not say which copy it was trained from; copy the entry {CARD!r} of the published "
                "copy's config.json to its own"
            )
        return cls(card, tensors, trained)


def derived_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], card: Card | None = None
) -> dict[str, Any]:
    """Creates the config.json of a checkpoint that is derived from another one.

    It has the most common dtype of the tensors, the card if one is given, and no paths on the server's machine.

    Args:
        config: the config.json of the original checkpoint.
        specs: dtype and shape of every tensor of the new checkpoint.
        card: the card of a published copy.

    Raises:
        CheckpointError: there are no tensors.
    """
    if not specs:
        raise CheckpointError("a checkpoint needs at least one tensor")
    derived = {key: value for key, value in without_paths(config).items() if key != CARD}
    dtypes = [dtype for dtype, _ in specs.values()]
    derived["torch_dtype" if "torch_dtype" in derived else "dtype"] = dtype_name(max(dtypes, key=dtypes.count))
    return {**derived, **(card.entry() if card else {})}
