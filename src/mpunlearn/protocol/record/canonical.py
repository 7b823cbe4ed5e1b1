"""Canonical JSON (RFC 8785) and the number of a record.

Records contain strings and integers only. For those, RFC 8785 agrees with `json.dumps(…, sort_keys=True,
separators=(",", ":"), ensure_ascii=False)`, which is the canonical form of the Pith open graph, as long as no key has a
character beyond U+FFFF. Floating-point numbers are written as strings, so that no reader can round them.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mpunlearn.errors import RecordError

NUMBER_CHARACTERS = 26
"""Length of a record's number: 130 of the 256 bits of the digest."""
SHORT_CHARACTERS = 8


def canonical(value: Any) -> bytes:
    """The canonical form of a JSON value, in UTF-8.

    Raises:
        RecordError: it contains a floating-point number, or something that is not JSON.
    """
    import rfc8785

    _check(value)
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise RecordError(f"cannot be written as canonical JSON: {error}") from error


def file_bytes(value: Any) -> bytes:
    """The bytes of the JSON files of a record: indented for people, in one form only, so that any change is noticed."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical form of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def number(sha256: str) -> str:
    """The number of a record: the first 26 characters of the base32 form of its SHA-256 (hex)."""
    return base64.b32encode(bytes.fromhex(sha256)).decode()[:NUMBER_CHARACTERS]


def stringified(value: Any) -> Any:
    """A JSON value with its floating-point numbers as strings, and without entries that are None."""
    if isinstance(value, Mapping):
        return {key: stringified(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [stringified(item) for item in value]
    return repr(value) if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else value


def _check(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecordError(f"a record has strings as keys, found {key!r:.40}")
            _check(item)
    elif isinstance(value, list):
        for item in value:
            _check(item)
    elif not (isinstance(value, str) or type(value) is int):
        raise RecordError(f"a record contains strings and integers only, found {value!r:.40}")
