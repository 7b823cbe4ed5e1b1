"""Which entries of a checkpoint's JSON files reach transformers.

transformers hands every entry of tokenizer_config.json to the tokenizer's constructor as a keyword argument. Some of
these are paths that are then opened, wherever they lead, such as `gguf_file`. An entry is therefore passed on only if it
is in a list here. Entries that are not listed are dropped, not rejected: honest checkpoints carry harmless ones that
other programs left there. Of config.json, the entries are passed on that the family's own configuration class has.

Not covered: what the listed entries and tokenizer.json itself say. A tokenizer can still be a trap; see
`client.plausibility`.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from mpunlearn.checkpoint import COMPANIONS
from mpunlearn.files import read_json, write_json

TOKENIZER_ENTRIES = frozenset(
    """add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens backend bos_token
    chat_template clean_up_tokenization_spaces cls_token do_lower_case eos_token errors extra_special_tokens legacy
    mask_token model_input_names model_max_length model_type normalization pad_token padding_side sep_token
    split_special_tokens spaces_between_special_tokens strip_accents tokenizer_class truncation_side trim_offsets
    unk_token use_default_system_prompt""".split()
)
"""The entries of tokenizer_config.json and special_tokens_map.json."""
OLDER_CONFIG_ENTRIES = frozenset(
    """torch_dtype rope_theta rope_scaling rope_local_base_freq partial_rotary_factor rotary_pct rotary_emb_base
    sliding_window_pattern hidden_activation""".split()
)
"""Entries of config.json that transformers still reads, although no class has them as an attribute anymore."""
CHECKED = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of which only `TOKENIZER_ENTRIES` are passed on."""


def allowed_config(config: Mapping[str, Any]) -> Any:
    """The transformers configuration of a checkpoint, from the allowed entries of its config.json.

    Raises:
        Exception: whatever transformers raises for a model type that it does not know, and for values of a wrong type.
    """
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    known = {*kind().to_dict(), *inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    return kind.from_dict({key: value for key, value in config.items() if key in known | OLDER_CONFIG_ENTRIES})


def link_tokenizer(source: Path, target: Path) -> None:
    """Puts what a tokenizer is loaded from into a directory: links to its files, and the allowed entries of the JSON ones.

    Args:
        source: the checkpoint directory.
        target: an empty directory.

    Raises:
        FileError: one of the `CHECKED` files is not a JSON object.
    """
    for name in COMPANIONS:
        if name in CHECKED and (source / name).is_file():
            entries = {key: value for key, value in read_json(source / name).items() if key in TOKENIZER_ENTRIES}
            write_json(target / name, entries)
        elif (source / name).is_file() and name != "generation_config.json":
            (target / name).symlink_to((source / name).resolve())
    config = allowed_config(read_json(source / "config.json"))
    config.save_pretrained(target)
