"""The errors a user can cause, each a sentence that says what, where, expected and found, and what to do next.

Everything derives from `MPUError`, so that the command line can turn any of them into one line and exit code 2, while a
bug in the program still shows its traceback.
"""


class MPUError(Exception):
    """Base of every error that is about the input, not about the program."""


class DisclosureWarning(UserWarning):
    """What was done is less protected than it may seem."""


class CheckpointError(MPUError):
    """A directory is not a readable safetensors checkpoint, or cannot be written."""


class UnloadableError(CheckpointError):
    """A checkpoint that transformers cannot load."""


class UnsupportedModelError(MPUError):
    """A readable checkpoint whose family, tensors or number format the program does not handle exactly."""


class PlanError(MPUError):
    """An option has an impossible value, or two options contradict each other."""


class StateError(MPUError):
    """The server's state does not fit what is asked of it."""


class UpdateError(MPUError):
    """What came back from the client cannot be an update of this round's copies."""


class DataError(MPUError):
    """An example file cannot be read as examples."""


class MessageError(MPUError):
    """What arrived over the network is damaged, forged, or not what it should be."""


class NetworkError(MPUError):
    """The network, a store or another program of the run does not do its part."""


class DamagedError(NetworkError):
    """A file is not there, or not what its sender signed."""
