"""Settings of the server for tests of the paper's method alone."""

from typing import Any

from mpunlearn import Perturbation


def without_offset(**options: Any) -> Perturbation:
    """Settings without common noise, which is on by default."""
    return Perturbation(**{"common_noise": 0, **options})
