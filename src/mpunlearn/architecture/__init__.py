"""What each axis of each weight means, for every supported model family. Public knowledge: nothing here is secret."""

from mpunlearn.architecture.architecture import Architecture, Heads, TensorRole
from mpunlearn.architecture.families import FAMILIES
from mpunlearn.architecture.spaces import Family

__all__ = ["FAMILIES", "Architecture", "Family", "Heads", "TensorRole"]
