"""Progress bars that say what is being done, on standard error and only where somebody looks."""

import sys
from collections.abc import Collection
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Collection[T], what: str) -> "tqdm[T]":
    """Iterates over `items` behind a bar labeled `what`."""
    return tqdm(items, desc=what, **_style())


def bar(total: int, what: str) -> "tqdm[None]":
    """A bar of `total` steps that the caller advances and closes."""
    return tqdm(total=total, desc=what, unit_scale=True, **_style())


def say(line: str) -> None:
    """Prints one line for people. What the other party wrote of it cannot move the cursor or fail to be encoded."""
    print(printable(line), flush=True)


def printable(text: str) -> str:
    """Text with what is no character for people escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _style() -> dict[str, Any]:
    return {"leave": False, "dynamic_ncols": True, "disable": not sys.stderr.isatty()}
