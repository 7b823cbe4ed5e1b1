"""Unlearning between a model owner and a data owner, neither of whom shows the other what it holds.

The verbs are `preprocess`, `postprocess` and `describe` (the server's), `unlearn` (the client's), `run` (both, in one process),
`evaluate` and `demo`. Names are imported when they are first used, so that `mpunlearn.server` and `mpunlearn.client` load
nothing of each other.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Client": "mpunlearn.client",
    "Data": "mpunlearn.client",
    "MPUError": "mpunlearn.errors",
    "Perturbation": "mpunlearn.server",
    "Resources": "mpunlearn.client",
    "Training": "mpunlearn.protocol.plan",
    "describe": "mpunlearn.server",
    "evaluate": "mpunlearn.evaluation",
    "postprocess": "mpunlearn.server",
    "preprocess": "mpunlearn.server",
    "run": "mpunlearn.local",
    "unlearn": "mpunlearn.client",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpunlearn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
