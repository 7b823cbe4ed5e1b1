"""The spool folder, through which the worker and the courier exchange messages, from the worker's side.

The courier is the Flower app that carries messages between the server and this folder. It runs code that the server
sent, and other programs may write to the folder, too, so nothing in it is trusted. A message is read only if it is a
regular file within the size limit that has the server's signature. Links are not followed, and answers are written into
the folder that was opened, even if something else takes its place in the meantime.
"""

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mpunlearn.errors import MessageError, PlanError, StateError
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.messages import MAX_HEADER_BYTES, MAX_INLINE_BYTES, Challenge, Finished, Job, Sealed

MESSAGES = Challenge | Finished | Job
"""The kinds of message that a server may send."""


def make(folder: Path) -> None:
    """Creates a spool folder that only its owner can enter; one that exists keeps its permissions.

    Raises:
        OSError: it cannot be created.
    """
    for path in (folder, folder / "jobs", folder / "results"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


def outcome(folder: Path, server_key: str) -> str | None:
    """How the run ended, once the server has said so and the program that does the jobs has noticed it.

    Args:
        folder: the spool folder.
        server_key: the server's public key.
    """
    for file in (folder / "jobs").iterdir():
        if HEX.fullmatch(file.name) and (folder / "results" / file.name).exists() and file.stat().st_size < 10_000:
            with suppress(OSError, MessageError):
                message = Sealed.open(file.read_bytes(), server_key).message
                if isinstance(message, Finished):
                    return message.outcome
    return None


class Spool:
    """A spool folder.

    Args:
        folder: the spool folder. Its subfolders `jobs` and `results` are created if they do not exist.
        server_key: the server's public key. Messages signed with any other key are ignored.
        say: reports one line to the user.

    Raises:
        PlanError: the folder cannot be created.
    """

    def __init__(self, folder: Path, server_key: str, say: Callable[[str], None]) -> None:
        self._folder, self._server_key, self._say = folder, server_key, say
        self._refused: set[str] = set()
        try:
            make(folder)
        except OSError as error:
            raise PlanError(f"{error.filename}: cannot be created: {error.strerror}") from error

    def unanswered(self) -> list[Sealed]:
        """The server's messages that have no answer yet. Anything else is reported once and then ignored.

        Raises:
            StateError: the folder was tampered with, or cannot be read.
        """
        try:
            names = [file.name for file in self._inside("jobs").iterdir() if HEX.fullmatch(file.name)]
            waiting = [name for name in names if name not in self._refused and not self._result(name).exists()]
        except OSError as error:
            raise StateError(
                f"{error.filename}: cannot be read: {error.strerror}; check whether the spool folder was removed"
            ) from error
        messages = [self._open(self._folder / "jobs" / name) for name in waiting]
        return [sealed for sealed in messages if sealed is not None]

    def answer(self, name: str, data: bytes) -> None:
        """Writes an answer into the folder atomically.

        Raises:
            StateError: the folder was tampered with, or the disk is full.
        """
        try:
            folder = os.open(self._folder / "results", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                part = f".{name}.{secrets.token_hex(8)}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                mode = 0o600 | os.fstat(folder).st_mode & 0o060  # for the group only if the folder is
                with open(os.open(part, flags, mode, dir_fd=folder), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StateError(
                f"{self._folder / 'results'}: cannot be written: {error.strerror}; either the disk is full, or another "
                "program may have tampered with the spool folder"
            ) from error

    def _inside(self, name: str) -> Path:
        """One of the two subfolders, after checking that it is a folder and not a link."""
        path = self._folder / name
        path.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise StateError(
                f"{path}: expected a folder, found a link; another program may have tampered with the spool folder"
            )
        return path

    def _result(self, name: str) -> Path:
        return self._inside("results") / name

    def _open(self, file: Path) -> Sealed | None:
        """Opens a message from the server; None if it is not a valid one."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as source:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_HEADER_BYTES + MAX_INLINE_BYTES + 8:
                    raise MessageError("not a regular file, or too large for a message")
                sealed = Sealed.open(source.read(), self._server_key)
            if sealed.name != file.name:
                raise MessageError("the name of its file is not its digest")
            if not isinstance(sealed.message, MESSAGES):
                raise MessageError("expected a job")
            return sealed
        except FileNotFoundError:
            return None
        except (OSError, MessageError) as error:
            self._refused.add(file.name)
            self._say(f"refused a message: {error}")
            return None
