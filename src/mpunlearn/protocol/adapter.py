"""LoRA adapters as PEFT saves them, read as the update that they stand for.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`. PEFT adds scale · lora_B · lora_A to a
weight, where scale is lora_alpha / r, or lora_alpha / √r with `use_rslora`. So an adapter that was trained on a
published copy is an update in factored form, and merging it first would only cost precision and space. Weights that were
trained in full (`modules_to_save`, biases) are saved along with the factors.

An adapter is accepted only if its tensors alone say what it changes. Variants of LoRA that compute something else (DoRA,
aLoRA, …), initializations that change the base weights (PiSSA, OLoRA, …), and options that this module does not know are
rejected. A base that was quantized for training (QLoRA) is fine: the factors are the update nevertheless.

The files are read without PEFT, since the server does not depend on training libraries. Not covered: adapters of merged
expert weights (`target_parameters`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import TensorDirectory
from mpunlearn.errors import SchemaError, UnsupportedModelError, UpdateError
from mpunlearn.schema import typed
from mpunlearn.storage import Place, read_json

CONFIG = "adapter_config.json"
"""The file that marks a directory as a PEFT adapter."""
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""
_IRRELEVANT = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora""".split()
)
"""Options of `LoraConfig` that are read elsewhere, or that change nothing about what the saved tensors mean."""


class Adapter(TensorDirectory):
    """The tensors of a PEFT adapter, with the names and the form that they have in an update.

    `lora_A` and `lora_B` become `NAME.lora_A` (rank x inputs) and `NAME.lora_B` (outputs x rank, multiplied by the scale),
    where NAME is the name of the weight in the checkpoint. Any other tensor is a trained weight, not a difference.

    Args:
        path: the adapter directory.
        copy: the config.json of the published copy that it was trained on.
        hashed: as for `TensorDirectory`.

    Raises:
        UpdateError: the adapter is not equivalent to an update of the model's weights.
        FileError: the files are missing or damaged.
    """

    def __init__(self, path: Place, copy: Mapping[str, Any], hashed: bool = False) -> None:
        super().__init__(path, stem="adapter_model", hashed=hashed)
        try:
            architecture = Architecture(FAMILIES[str(copy.get("model_type"))], copy)
        except (KeyError, UnsupportedModelError) as error:
            raise UpdateError(f"{path}: belongs to a copy of an unknown model: {error}") from None
        self._config = read_json(path / CONFIG)
        try:
            self._check_config()
            self._alpha: float = typed(float, self._config.get("lora_alpha"), "lora_alpha")
            self._alphas: dict[str, float] = typed(
                dict[str, float], self._config.get("alpha_pattern") or {}, "alpha_pattern"
            )
        except SchemaError as error:
            raise UpdateError(f"{path / CONFIG}: {error}") from None
        self._scales: dict[str, float] = {}
        self._transposed: set[str] = set()
        stored, self.tensors = self.tensors, {}
        for name, info in sorted(stored.items()):
            module = name.removeprefix(_PREFIX)
            if (match := _FACTOR.fullmatch(module)) is None:
                weight = module.replace(".base_layer.", ".")
                if f"{_PREFIX}{module.removesuffix('.base_layer.weight')}.lora_embedding_A" not in stored:
                    self.tensors[_stored_name(weight, architecture)] = info
                continue  # PEFT saves the embedding along with its factors, although it is not trained
            which, embedding = match["factor"], match["embedding"] is not None
            weight = _stored_name(f"{match['module']}.weight", architecture)
            if embedding:  # PEFT adds the transpose of lora_B · lora_A to an embedding
                which = "AB"["BA".index(which)]
                info = replace(info, shape=info.shape[::-1])
                self._transposed.add(f"{weight}.lora_{which}")
            self.tensors[f"{weight}.lora_{which}"] = info
            if which == "B":
                self._scales[f"{weight}.lora_B"] = self._scale(match["module"], info.shape[-1] if info.shape else 0)
        self._check_ties(architecture)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor. The factor lora_B is multiplied by its scale, in float32 or its own dtype if that is wider."""
        info = self._info(name)
        value = self._read(info, name, 0, info.nbytes)
        value = (
            value.reshape(info.shape[::-1]).T.contiguous() if name in self._transposed else value.reshape(info.shape)
        )
        if name in self._scales:
            value = value.to(torch.promote_types(value.dtype, torch.float32)) * self._scales[name]
        return value

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Reads rows of a tensor that is no LoRA factor; factors are small enough to be read whole."""
        if name in self._scales or name in self._transposed:
            raise ValueError(f"{name}: is a LoRA factor; use `read`")
        return super().read_rows(name, start, stop, out)

    def _check_config(self) -> None:
        """Rejects an adapter whose tensors alone do not say what it changes."""
        config, where = self._config, self.place / CONFIG
        advice = (
            "merge it into the copy (`merge_and_unload()`, `save_pretrained(...)`) and give that checkpoint instead"
        )
        if config.get("peft_type") != "LORA":
            raise UpdateError(f"{where}: expected peft_type LORA, found {config.get('peft_type')!r:.40}; {advice}")
        unknown = sorted(key for key, value in config.items() if value and key not in _IRRELEVANT)
        if unknown:
            raise UpdateError(
                f"{where}: {unknown[0]} is {config[unknown[0]]!r:.60}, so the adapter is not, or may not be, the product "
                f"of its two factors; {advice}"
            )
        if config.get("init_lora_weights", True) not in _INITIALIZATIONS:
            raise UpdateError(
                f"{where}: init_lora_weights is {config['init_lora_weights']!r:.40}, which changes the base weights, so the "
                f"adapter does not belong to the published copy; {advice}"
            )

    def _scale(self, module: str, rank: int) -> float:
        """The factor by which PEFT multiplies the product of a module's two factors."""
        if rank < 1:
            raise UpdateError(f"{self.place}: a LoRA factor of {module} has rank 0; expected at least 1")
        try:
            special = [alpha for key, alpha in self._alphas.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)]
        except re.error as error:
            raise UpdateError(f"{self.place / CONFIG}: alpha_pattern: {error}; expected regular expressions") from None
        alpha = special[0] if special else self._alpha
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check_ties(self, architecture: Architecture) -> None:
        """Rejects a change of an embedding that the LM head shares: PEFT changes only one of the two."""
        embedding = architecture.family.embedding
        if architecture.tied and {embedding, f"{embedding}.lora_A"} & set(self.tensors):
            raise UpdateError(
                f"{self.place}: changes {embedding}, which the LM head shares, but the adapter changes only one of the two; "
                "leave the embedding out of target_modules and modules_to_save"
            )


def _stored_name(name: str, architecture: Architecture) -> str:
    """The name of a weight in the checkpoint, given its name in the loaded model; only that of the LM head can differ."""
    return architecture.family.head if name == "lm_head.weight" else name


def base_folder(config: Mapping[str, Any]) -> Path | None:
    """The local directory that an adapter's configuration names as its base, or None if there is none."""
    base = config.get("base_model_name_or_path")
    try:
        return Path(base) if isinstance(base, str) and base and Path(base).is_dir() else None
    except OSError:  # no possible path
        return None
