"""Results that arrive: checked in full before anything changes, and answered with a verdict.

A result must answer a job that is open to that client, its files must be what was signed, and the update must belong to the
copy (`server.updates.examine`). What is accepted is in the run's folder afterwards; of what is refused, nothing is left.
"""

from dataclasses import dataclass
from pathlib import Path

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import DamagedError, MessageError, UpdateError
from mpunlearn.files import new_directory
from mpunlearn.progress import printable
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.messages import Job, Result, Sealed
from mpunlearn.protocol.transfer import Store, receive
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.jobs import Jobs
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.updates import examine, planned_tensors

MAX_LISTING_BYTES = 16_000_000
"""Maximum size of an update's JSON files, and of its shards' headers together."""
MAX_REFUSAL = 300
"""Characters of a client's refusal that are shown."""


@dataclass(frozen=True)
class Accepted:
    """The update was accepted."""

    name: str
    job: Job


@dataclass(frozen=True)
class Declined:
    """The client refuses to do the job."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Rejected:
    """The result is not acceptable."""

    reason: str


Verdict = Accepted | Declined | Rejected


class Results:
    """Checks results.

    Args:
        folder: the run's.
        rounds: the models, with whose norms updates are compared, and the plan.
        jobs: the open jobs.
        store: where updates are, or None if they are in the results.
    """

    def __init__(self, folder: RunFolder, rounds: Rounds, jobs: Jobs, store: Store | None) -> None:
        self._folder, self._rounds, self._jobs, self._store = folder, rounds, jobs, store

    def check(self, sealed: Sealed, client: str | None, number: int) -> Verdict:
        """Checks a result and keeps its update if it is accepted.

        Args:
            sealed: the message.
            client: the client that the node carries for, if it is known.
            number: the open round.

        Raises:
            NetworkError: the store does not respond.
            FileError: this machine cannot write the update.
        """
        result: Result = sealed.message
        if client is None or sealed.sender != client:
            return Rejected(f"signed by {sealed.sender[:16]}, which this node does not carry for")
        out = self._jobs.open.get(result.job)
        if out is None or (out.job.client, out.job.run, out.job.round) != (client, result.run, number):
            return Rejected("does not answer any job that is open to this client; it may have been answered before")
        job = out.job
        if result.refusal is not None:
            return Declined(job, printable(result.refusal[:MAX_REFUSAL]))
        try:
            with new_directory(self._folder.update(number, client, job.copy), mode=0o700) as folder:
                self._fetch(job, sealed, folder)
                _check_headers(folder)
                copy, training = self._folder.copy(number, job.copy), self._rounds.plan.training
                examine(
                    folder,
                    copy,
                    self._rounds.theta(number - 1),
                    Card(job.run, job.round, job.copy, job.copies),
                    factored=bool(training.lora_rank),
                    expected=planned_tensors(copy, training),
                )
        except (MessageError, UpdateError, DamagedError) as error:
            return Rejected(str(error))
        return Accepted(result.job, job)

    def _fetch(self, job: Job, sealed: Sealed, folder: Path) -> None:
        """Brings the files of a result into a folder, at most as many bytes as an update can have."""
        files = sealed.message.files
        copy = Checkpoint(self._folder.copy(job.round, job.copy))
        limit = sum(4 * info.nbytes // info.dtype.itemsize for info in copy.tensors.values()) + 10_000_000
        if sum(file.size for file in files) > limit:
            raise MessageError(f"announces more than the {limit} bytes that an update can have")
        for file in files:
            if file.size > MAX_LISTING_BYTES and file.name.endswith(".json"):
                raise MessageError(f"{file.name}: has {file.size} bytes, expected at most {MAX_LISTING_BYTES}")
        slots = [file.slot for file in files if file.slot is not None]
        if len(set(slots)) != len(slots):
            raise MessageError("two files are in the same slot")
        payloads = sealed.payloads()
        for file in files:
            if file.url is not None or (file.slot is None) == (self._store is not None):
                raise MessageError(f"{file.name}: is not where the job said")
            if self._store is None:
                receive(file, payloads[file.name], folder / file.name)
                continue
            if not 0 <= file.slot < len(job.slots):
                raise MessageError(f"{file.name}: the job has no slot {file.slot}")
            self._store.fetch(self._jobs.slot(job, file.slot), file, folder / file.name)


def _check_headers(folder: Path) -> None:
    """Refuses an update whose lists of tensors alone would fill the memory.

    Raises:
        MessageError: its safetensors headers together exceed `MAX_LISTING_BYTES`.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total += length if length <= path.stat().st_size else 0  # otherwise `examine` refuses the file
    if total > MAX_LISTING_BYTES:
        raise MessageError(f"headers of {total} bytes, expected at most {MAX_LISTING_BYTES}")
