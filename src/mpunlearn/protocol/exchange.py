"""What crosses between the parties: a published copy, and an update.

A published copy is an ordinary checkpoint whose config.json carries a `Card`: run, round and number of the copy. Hugging
Face tools keep unknown config entries, so a checkpoint that any of them trained from the copy still says which copy it is.
An update is a directory with `update.json` (the same card) and `update.safetensors`: Δ'_k = θ'_k - θ_k of the trained tensors,
under the copy's names, or of a weight W its two factors W.lora_A (rank x inputs) and W.lora_B (outputs x rank), whose product
lora_B · lora_A is Δ'_k. The card is public: it names nothing of either party's secrets.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint, TensorDirectory, dtype_name, without_paths
from mpunlearn.errors import CheckpointError, UpdateError
from mpunlearn.files import read_json

FACTORS = (".lora_A", ".lora_B")
"""What the names of an update's factors end with."""
CARD = "mpunlearn"
"""The entry of config.json, and the file update.json's, that holds the card."""


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
    """m."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Card | None":
        """The card in a config.json or update.json, or None if there is none that makes sense."""
        entry = config.get(CARD)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or set(entry) != names or not isinstance(entry["run"], str):
            return None
        numbers = (entry["round"], entry["copy"], entry["copies"])
        return cls(**entry) if all(type(n) is int and n > 0 for n in numbers) else None

    def entry(self) -> dict[str, Any]:
        return {CARD: dataclasses.asdict(self)}

    def __str__(self) -> str:
        return f"copy {self.copy} of {self.copies}, round {self.round}, run {self.run[:8]}"


@dataclass(frozen=True)
class ReceivedUpdate:
    """One thing the client sent back, not yet trusted beyond its card and its file format."""

    card: Card
    tensors: TensorDirectory
    trained: Checkpoint | None
    """The checkpoint, where a trained checkpoint came instead of an update: its difference is the server's to take."""

    @classmethod
    def open(cls, path: str | Path) -> "ReceivedUpdate":
        """Opens an update directory, or a checkpoint that was trained from a published copy.

        Raises:
            UpdateError: it is neither, or does not say which copy it belongs to.
        """
        path = Path(path)
        try:
            if (path / "update.json").is_file():
                card = Card.of(read_json(path / "update.json"))
                tensors, trained = TensorDirectory(path, stem="update"), None
            else:
                tensors = trained = Checkpoint(path)
                card = Card.of(trained.config)
        except CheckpointError as error:
            raise UpdateError(f"{path}: neither an update nor a trained checkpoint: {error}") from error
        if card is None:
            raise UpdateError(
                f"{path}: does not say which copy it was made from; expected the {CARD!r} entry of the published copy's "
                "config.json in its config.json, copy it over"
            )
        return cls(card, tensors, trained)


def derived_config(
    config: Mapping[str, Any], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], card: Card | None = None
) -> dict[str, Any]:
    """The config.json of a checkpoint made from another: the dtype that most of its tensors have, the card of a copy or none,
    and no path of the server's.
    """
    kept = {key: value for key, value in without_paths(config).items() if key != CARD}
    dtypes = [dtype for dtype, _ in specs.values()]
    kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = dtype_name(max(dtypes, key=dtypes.count))
    return {**kept, **(card.entry() if card else {})}
