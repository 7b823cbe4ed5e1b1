"""Makes the published copies of a round available to clients, through a store or in the messages. State: files.json."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.checkpoint import checkpoint_files
from mpunlearn.errors import PlanError
from mpunlearn.protocol.messages import MAX_INLINE_BYTES, File
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.record.artifacts import EVENT_FILE
from mpunlearn.protocol.transfer import Store, file_entry
from mpunlearn.schema import read, write
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.updates import update_bytes


@dataclass(frozen=True)
class _Files:
    """The content of files.json."""

    copies: dict[str, list[File]]
    """Files of each copy, by the name of its directory."""
    begun: float
    """When the copies became available to clients, in seconds since the epoch."""
    signed: float
    """When the URLs were signed, in seconds since the epoch."""
    format: int = 1


class Publication:
    """The published files of the copies, for each round.

    Args:
        folder: the run's directory.
        store: the store for files, or None if they are sent in the messages.
        training: the training plan, which determines the size of updates.
    """

    def __init__(self, folder: RunFolder, store: Store | None, training: Training) -> None:
        self._folder, self._store, self._training = folder, store, training

    def begun(self, number: int) -> float:
        """When the copies of a round became available to clients, in seconds since the epoch."""
        return self._read(number).begun

    def files(self, number: int, copy: int) -> list[File]:
        """The files of a copy, as listed in a job."""
        return self._read(number).copies[f"copy-{copy}"]

    def expired(self, number: int) -> bool:
        """Whether the signed URLs of a round have expired or soon will, so that new jobs with new URLs are needed."""
        if self._store is None or not self._folder.files(number).exists():
            return False
        return time.time() - self._read(number).signed > self._store.signature_seconds / 2

    def publish(self, number: int, run: str) -> int:
        """Makes the copies of a round available to clients, and renews signed URLs that have expired.

        Returns:
            The number of copies published by this call; 0 if they were already available.

        Raises:
            PlanError: a copy or its update is too large for a message, and there is no store.
            NetworkError: the store does not respond.
        """
        begun = time.time()
        if self.expired(number):
            begun = self._read(number).begun
            shutil.rmtree(self._folder.jobs(number), ignore_errors=True)
        elif self._folder.files(number).exists():
            return 0
        copies = {copy.name: self._put(number, run, copy) for copy in sorted(self._folder.copies(number).iterdir())}
        write(self._folder.files(number), _Files(copies, begun, time.time()))
        return len(copies)

    def _put(self, number: int, run: str, copy: Path) -> list[File]:
        paths = [*checkpoint_files(copy), *copy.glob(EVENT_FILE)]
        size = max(sum(path.stat().st_size for path in paths), update_bytes(copy, self._training))
        if self._store is not None:
            return [self._store.put(path, key(run, number, copy.name, path.name)) for path in paths]
        if size > MAX_INLINE_BYTES:
            raise PlanError(
                f"--store: a copy or its update has {size / 1e6:.0f} MB, but a message can carry at most "
                f"{MAX_INLINE_BYTES / 1e6:.0f} MB; give a folder or bucket that both parties can access"
            )
        return [file_entry(path) for path in paths]

    def remove(self, number: int, run: str) -> None:
        """Removes all files of a round from the store.

        Raises:
            NetworkError: the store does not respond.
        """
        if self._store is not None:
            self._store.remove(key(run, number))

    def _read(self, number: int) -> _Files:
        return read(_Files, self._folder.files(number))


def key(run: str, number: int, *parts: str) -> str:
    """The key, in the store, of a file or folder of a round."""
    return "/".join([run, f"round-{number}", *parts])
