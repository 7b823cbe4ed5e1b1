"""The folder through which the worker and the courier speak, from the worker's side.

The courier runs code that the server sent, and other programs may write to the folder, too. So nothing in it is trusted: a
message is read only if it is a regular file of a possible size with the server's signature, links are not followed, and answers
are written into the folder that was opened, whatever is put in its place in the meantime.
"""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from mpunlearn.errors import MessageError, PlanError, StateError
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.messages import MAX_HEADER_BYTES, MAX_INLINE_BYTES, Challenge, Finished, Job, Sealed

MESSAGES = Challenge | Finished | Job
"""What a server may send."""


class Spool:
    """A spool folder.

    Args:
        folder: with `jobs` and `results`; created if they do not exist.
        server_key: the only key whose messages are read.
        say: reports one line to people.

    Raises:
        PlanError: the folder cannot be created.
    """

    def __init__(self, folder: Path, server_key: str, say: Callable[[str], None]) -> None:
        self._folder, self._server_key, self._say = folder, server_key, say
        self._refused: set[str] = set()
        try:
            for name in ("jobs", "results"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"{error.filename}: cannot be created: {error.strerror}") from error

    def unanswered(self) -> list[Sealed]:
        """The server's messages that have no answer yet. What is not such a message is reported once and ignored.

        Raises:
            StateError: the folder was tampered with, or cannot be read.
        """
        try:
            names = [file.name for file in self._inside("jobs").iterdir() if HEX.fullmatch(file.name)]
            waiting = [name for name in names if name not in self._refused and not self._result(name).exists()]
        except OSError as error:
            raise StateError(f"{self._folder}: {error.strerror}: {error.filename}; has somebody removed it?") from error
        messages = [self._open(self._folder / "jobs" / name) for name in waiting]
        return [sealed for sealed in messages if sealed is not None]

    def answer(self, name: str, data: bytes) -> None:
        """Puts an answer into the folder, atomically.

        Raises:
            StateError: the folder was tampered with, or the disk is full.
        """
        try:
            folder = os.open(self._folder / "results", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                part = f".{name}.{secrets.token_hex(8)}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with open(os.open(part, flags, 0o660, dir_fd=folder), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StateError(
                f"{self._folder / 'results'}: cannot be written: {error.strerror}; somebody tampers with it, or the disk is "
                "full"
            ) from error

    def _inside(self, name: str) -> Path:
        """One of the two folders, after checking that it is one and not a link to another."""
        path = self._folder / name
        path.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise StateError(f"{path}: is not a folder; somebody tampers with the spool")
        return path

    def _result(self, name: str) -> Path:
        return self._inside("results") / name

    def _open(self, file: Path) -> Sealed | None:
        """A message of the server's; None if it is not one."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as source:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_HEADER_BYTES + MAX_INLINE_BYTES + 8:
                    raise MessageError("not a regular file, or too large for a message")
                sealed = Sealed.open(source.read(), self._server_key)
            if sealed.name != file.name:
                raise MessageError("its name is not its digest")
            if not isinstance(sealed.message, MESSAGES):
                raise MessageError("expected a job")
            return sealed
        except FileNotFoundError:
            return None
        except (OSError, MessageError) as error:
            self._refused.add(file.name)
            self._say(f"refused a message: {error}")
            return None
