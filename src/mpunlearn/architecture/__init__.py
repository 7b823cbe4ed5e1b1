"""Public knowledge about model families: which hidden space each axis of each weight belongs to."""

from mpunlearn.architecture.architecture import Architecture, Heads, TensorRole
from mpunlearn.architecture.families import FAMILIES
from mpunlearn.architecture.spaces import Family

__all__ = ["FAMILIES", "Architecture", "Family", "Heads", "TensorRole"]
