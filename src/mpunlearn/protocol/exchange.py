"""The directories that the parties exchange: published copies and updates.

A published copy is an ordinary Hugging Face checkpoint of the perturbed model, whose config.json contains a `Card`: the
run, the round and the number of the copy. Hugging Face tools preserve unknown config entries, so a checkpoint that any
of them trains from the copy still identifies the copy.

An update is a directory with `update.json`, which contains the same card, and `update.safetensors`, which contains the
difference Δ'_k = θ'_k - θ_k between the trained model and copy k, for the trained tensors and under the names of the
copy. A matrix W can instead be given by two LoRA factors, W.lora_A (rank x inputs) and W.lora_B (outputs x rank), with
Δ'_k = lora_B · lora_A. The card is public and reveals nothing about either party's secrets.

Instead of an update, the server also accepts what other tools save: a checkpoint that was trained from a copy, or a PEFT
adapter (see `adapter`). An adapter has no place for a card. It belongs to the copy whose config.json lies in the adapter's
directory, or else to the copy that the adapter's configuration names as its base, if that is a directory on this machine.
If both are there, they must agree.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint, TensorDirectory, dtype_name, without_paths
from mpunlearn.errors import CheckpointError, FileError, SchemaError, UpdateError
from mpunlearn.files import write_json
from mpunlearn.protocol.adapter import CONFIG, Adapter, base_folder
from mpunlearn.schema import parse, read
from mpunlearn.storage import Place, StorePath, read_json

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

    @property
    def trained(self) -> Checkpoint | None:
        """The trained checkpoint, if the client sent one instead of an update."""
        return self.tensors if isinstance(self.tensors, Checkpoint) else None

    @property
    def weights(self) -> bool:
        """Whether tensors other than LoRA factors are trained weights, from which the server subtracts the copy's."""
        return isinstance(self.tensors, Checkpoint | Adapter)

    @classmethod
    def open(cls, path: str | Place, hashed: bool = False) -> "ReceivedUpdate":
        """Opens an update, a checkpoint that was trained from a published copy, or a PEFT adapter.

        Args:
            path: its directory.
            hashed: whether to compute the SHA-256 of its files while they are read.

        Raises:
            UpdateError: the directory is none of them, has no card, or holds an adapter that is not equivalent to an
                update.
        """
        path = path if isinstance(path, StorePath) else Path(path)
        tensors: TensorDirectory
        try:
            if (path / "update.json").is_file():
                card = read(UpdateManifest, path / "update.json").mpunlearn
                tensors = TensorDirectory(path, stem="update", hashed=hashed)
            elif (path / CONFIG).is_file():
                config = _copy_config(path)
                card = Card.of(config)
                tensors = Adapter(path, config, hashed)
            else:
                tensors = Checkpoint(path, hashed=hashed)
                card = Card.of(tensors.config)
        except (FileError, SchemaError) as error:
            raise UpdateError(f"{path}: neither an update nor a trained checkpoint or adapter: {error}") from error
        if card is None:
            raise UpdateError(
                f"{path}: does not say which copy it was trained from; copy the entry {CARD!r} of the published "
                "copy's config.json to its own"
            )
        return cls(card, tensors)


def _copy_config(path: Place) -> dict[str, Any]:
    """The config.json of the published copy that a PEFT adapter was trained on.

    Raises:
        UpdateError: it is not known which copy that was, or two copies are named.
        FileError: a configuration is damaged.
    """
    if any(re.fullmatch(r"model.*\.safetensors", file.name) for file in path.iterdir()):
        raise UpdateError(f"{path}: holds both an adapter and a whole model; remove the one that is not meant")
    base = base_folder(read_json(path / CONFIG))
    configs = [read_json(file) for folder in (path, base) if folder and (file := folder / "config.json").is_file()]
    named = [config for config in configs if Card.of(config) is not None]
    if not named:
        raise UpdateError(
            f"{path}: an adapter does not say which copy it was trained on; copy that copy's config.json into this "
            "directory"
        )
    if len({Card.of(config) for config in named}) > 1:
        raise UpdateError(
            f"{path}: its config.json is that of {Card.of(named[0])}, but the adapter's base {base} is "
            f"{Card.of(named[1])}; keep the config.json of the copy that it was trained on, and correct "
            f"base_model_name_or_path in {CONFIG}"
        )
    return named[0]


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
