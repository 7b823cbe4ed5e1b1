"""Public knowledge about model families: which hidden space every axis of every weight lives in."""

from mpunlearn.architecture.architecture import Architecture, Heads, TensorRole
from mpunlearn.architecture.families import FAMILIES
from mpunlearn.architecture.spaces import Family

__all__ = ["FAMILIES", "Architecture", "Family", "Heads", "TensorRole"]
