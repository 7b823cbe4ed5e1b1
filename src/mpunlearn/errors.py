"""The errors a user can cause. Each message says what is wrong, where, what was expected and found, and what to do next.

All of them derive from `MPUError`: the command line prints such an error as one line and exits with code 2. Anything else is
a bug and shows its traceback.
"""


class MPUError(Exception):
    """Base class of every error that is about the input, not about the program."""


class DisclosureWarning(UserWarning):
    """Something is less protected than it may seem."""


class NothingUnlearnedWarning(UserWarning):
    """A training finished, but hardly moved the forget loss."""


class FileError(MPUError):
    """A file or directory is missing, damaged, already there, or cannot be written."""


class CheckpointError(FileError):
    """A directory is not a readable safetensors checkpoint, or cannot be written as one."""


class UnloadableError(CheckpointError):
    """A checkpoint that transformers cannot load."""


class UnsupportedModelError(MPUError):
    """A readable checkpoint whose family, tensors or number format cannot be handled exactly."""


class SchemaError(MPUError):
    """A file or message lacks a field, has an unknown one, or holds a value of the wrong type."""


class PlanError(MPUError):
    """An option has an impossible value, or two options contradict each other."""


class StateError(MPUError):
    """The server's state, or a party's working directory, does not allow what is asked of it."""


class UpdateError(MPUError):
    """What the client sent back cannot be an update of this round's copies."""


class DataError(MPUError):
    """A data file cannot be read as examples."""


class MessageError(MPUError):
    """A message from the network is damaged, forged, or not of the expected kind."""


class NetworkError(MPUError):
    """The network, a store or another program of the run does not respond."""


class DamagedError(NetworkError):
    """A transferred file is missing, or is not the one that its sender signed."""
