"""What the server's model is: family, sizes, tokenizer and template, as the data owner knows them.

The copies of a run are all of the same model. Its *pins* are the table [model] of policy.toml; `client review` writes
them when a person has accepted a copy. Without that table, the first copy's pins are kept in WORK/model.json, and every
later copy must have the same: that protects against a change, not against a first copy that was planted.

With a `base`, the public model that the server's was trained from, a copy must have its sizes and its tokenizer.json,
byte for byte, and the base's own tokenizer and template are used for training. Nothing of the copy but its weights and
its sizes is then trusted.

Not covered: what the weights do; see `client.plausibility`.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import COMPANIONS, Checkpoint
from mpunlearn.errors import FileError, PlanError
from mpunlearn.files import file_digest, read_json
from mpunlearn.lm.allowed import allowed_config
from mpunlearn.schema import explained

HUB = "hub:"
"""Prefix of a base on the Hugging Face Hub, as for data."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""The files that determine the tokens."""
_MAY_DIFFER = ("mpunlearn", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache")
"""Entries of config.json that may differ between copies, or between a model and its base, without changing the model."""


@dataclass(frozen=True)
class Pins:
    """What a copy is. A field that is None is not compared."""

    model_type: str | None = explained(None, "The model family.")
    layers: int | None = explained(None, "The number of transformer layers. A planted copy may have fewer.")
    hidden_size: int | None = explained(None, "The width of the model.")
    intermediate_size: int | None = explained(
        None, "The number of FFN neurons of a layer, each of which can hold a trap."
    )
    vocabulary: int | None = explained(None, "The number of tokens. Tags need tokens of their own.")
    settings: str | None = explained(
        None, "SHA-256 of the other settings in config.json, such as activation and heads."
    )
    tokenizer: str | None = explained(None, "SHA-256 of the tokenizer's files.")
    template: str | None = explained(None, "SHA-256 of the chat template, a program that sees your text.")

    @classmethod
    def of(cls, copy: Path) -> "Pins":
        """The pins of a copy, or of a base.

        Raises:
            MPUError: it is not a checkpoint of a supported family, or its tokenizer's files cannot be read.
        """
        checkpoint = Checkpoint(copy)
        architecture = Architecture.of(checkpoint)
        config = {key: value for key, value in checkpoint.config.items() if key not in _MAY_DIFFER}
        return cls(
            str(config["model_type"]),
            architecture.layers,
            architecture.residual,
            architecture.ffn(expert=False),
            int(architecture.config["vocab_size"]),
            hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            _tokenizer_digest(copy),
            hashlib.sha256(template_of(copy).encode(errors="replace")).hexdigest(),
        )

    def differences(self, other: "Pins") -> list[str]:
        """In what a copy with the pins `other` differs, for the fields that are pinned here."""
        pinned = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(Pins)}
        return [
            f"{name} is {_short(mine)}, found {_short(theirs)}"
            for name, (mine, theirs) in pinned.items()
            if mine is not None and mine != theirs
        ]


@dataclass(frozen=True)
class ModelPolicy(Pins):
    """The table [model] of policy.toml.

    Raises:
        PlanError: the base does not exist.
    """

    base: str | None = explained(
        None,
        "The public model that the server's was trained from: a directory, or hub:ORG/MODEL. Its tokenizer and template are "
        "used instead of the copy's.",
    )

    def base_folder(self) -> Path | None:
        """The directory of the base, downloaded now if it is on the Hub; None without a base.

        Raises:
            PlanError: it does not exist or cannot be downloaded.
        """
        if self.base is None:
            return None
        if not self.base.startswith(HUB):
            if not (folder := Path(self.base)).is_dir():
                raise PlanError(
                    f"policy: model: base: {self.base} is not a directory; expected one, or hub:ORG/MODEL for a model of the "
                    "Hugging Face Hub"
                )
            return folder
        import huggingface_hub

        names = ["config.json", "*.safetensors", "model.safetensors.index.json", *COMPANIONS]
        try:
            return Path(huggingface_hub.snapshot_download(self.base.removeprefix(HUB), allow_patterns=names))
        except (OSError, ValueError) as error:  # the errors of huggingface_hub are among these
            raise PlanError(f"policy: model: base: {self.base} cannot be downloaded: {error}") from error


def check_against_base(copy: Path, base: Path) -> list[str]:
    """In what a copy differs from its base where it must not: the shapes of all tensors, and tokenizer.json.

    Raises:
        MPUError: either is not a checkpoint.
    """
    ours, theirs = Checkpoint(base), Checkpoint(copy)
    shapes = {name: info.shape for name, info in ours.tensors.items()}
    found = {name: info.shape for name, info in theirs.tensors.items()}
    different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    head = Architecture.of(ours).family.head
    different = [name for name in different if name != head]  # a tied head may be stored or not
    reasons = (
        [f"{different[0]} has shape {found.get(different[0])}, the base {shapes.get(different[0])}"]
        if different
        else []
    )
    if _tokenizer_digest(copy) != _tokenizer_digest(base):
        reasons.append("the tokenizer's files differ from the base's")
    settings, other = (allowed_config(checkpoint.config).to_dict() for checkpoint in (ours, theirs))
    reasons += [
        f"config.json: {key} is {_short(other.get(key))}, the base's is {_short(value)}"
        for key, value in settings.items()
        if key not in _MAY_DIFFER and not key.endswith(("_token_id", "name_or_path")) and other.get(key) != value
    ]
    return reasons


def use_tokenizer_of(base: Path, copy: Path) -> None:
    """Replaces everything in a copy's directory that is not weights or config.json by the base's files.

    Raises:
        FileError: a file cannot be replaced.
    """
    try:
        for name in COMPANIONS:
            (copy / name).unlink(missing_ok=True)
            if (base / name).is_file():
                shutil.copyfile(base / name, copy / name)
    except OSError as error:
        raise FileError(f"{copy}: cannot be written: {error.strerror}") from error


def template_of(folder: Path) -> str:
    """The chat template of a checkpoint; empty if it has none.

    Raises:
        FileError: the file that holds it cannot be read.
    """
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"{folder / 'chat_template.jinja'}: cannot be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := read_json(folder / name).get("chat_template")):
            return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return ""


def _tokenizer_digest(folder: Path) -> str:
    files = [(name, file_digest(folder / name)) for name in TOKENIZER_FILES if (folder / name).is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _short(value: Any) -> str:
    return f"{value!s:.12}"
