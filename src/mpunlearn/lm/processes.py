"""Processes."""

import os


def processes() -> int:
    """How many processes train together (`torchrun`, `accelerate launch`)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes what all of them have made."""
    return int(os.environ.get("RANK", "0")) == 0
