"""Errors that a user can cause.

Each message says what is wrong, where, what was expected and found, and what to do next. All errors derive from
`MPUError`. The command line prints such an error as one line and exits with its `exit_code`. Any other exception is a
bug and shows its traceback.
"""

from typing import Any


class MPUError(Exception):
    """Base class of all errors that are caused by the input or the environment, not by a bug."""

    exit_code = 2
    """Exit code of the command line."""


class DisclosureWarning(UserWarning):
    """Something is less well protected than the settings suggest."""


class NothingUnlearnedWarning(UserWarning):
    """A training run finished but hardly changed the forget loss."""


class FileError(MPUError):
    """A file or directory is missing, is damaged, already exists, or cannot be written."""


class CheckpointError(FileError):
    """A directory is not a readable safetensors checkpoint, or cannot be written as one."""


class UnloadableError(CheckpointError):
    """A checkpoint cannot be loaded by transformers."""


class UnsupportedModelError(MPUError):
    """A readable checkpoint has a model family, tensors or a number format that cannot be handled exactly."""


class SchemaError(MPUError):
    """A file or message is missing a field, has an unknown field, or has a value of the wrong type."""


class PlanError(MPUError):
    """An option has an invalid value, or two options contradict each other."""


class MissingPackageError(MPUError):
    """A package of an extra is needed and not installed."""


class RefusalError(MPUError):
    """A client refuses a job. The message is safe to send to the server: it reveals nothing about the forget set."""


class StateError(MPUError):
    """The server's state, or a party's working directory, does not allow the requested operation."""


class UpdateError(MPUError):
    """What the client sent back is not a valid update of this round's copies."""


class DataError(MPUError):
    """A data file cannot be read as examples."""


class MessageError(MPUError):
    """A message from the network is damaged, forged, or not of the expected kind."""


class NetworkError(MPUError):
    """The network, a store, or another program of the run does not respond."""


class DamagedError(NetworkError):
    """A transferred file is missing or differs from the one that its sender signed."""


class ReportedError(MPUError):
    """A check failed, and there is a report of it.

    Args:
        message: what failed.
        report: the report, which the command line prints before the message.
    """

    exit_code = 3

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class AuditError(ReportedError):
    """An audit measured a value beyond a limit that the user set."""


class RecordError(ReportedError):
    """A record, or a file that it lists, does not verify."""


class NotReadyError(ReportedError):
    """A check of `doctor` found something that prevents a run."""

    exit_code = 4
