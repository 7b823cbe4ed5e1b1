"""Checks the results that clients send, and returns a verdict on each.

A result must answer an open job of its client, its files must match the signed digests, and the update must be valid
for the copy (see `server.updates.examine`). An accepted update is stored in the run's directory; a rejected one leaves
no trace.
"""

from dataclasses import dataclass
from pathlib import Path

from mpunlearn.errors import DamagedError, MessageError, RecordError, UpdateError
from mpunlearn.files import new_directory
from mpunlearn.progress import printable
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.messages import Job, Result, Sealed
from mpunlearn.protocol.record.artifacts import EVENT_FILE
from mpunlearn.protocol.record.log import event_of
from mpunlearn.protocol.transfer import Store, receive
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.jobs import Jobs
from mpunlearn.server.recording import belongs
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.updates import examine, planned_tensors, update_bytes

MAX_LISTING_BYTES = 16_000_000
"""Maximum size of each JSON file of an update, and of all its safetensors headers together."""
SHARD_BYTES = 1_000_000_000
"""A safetensors file of an update has at least this size on average if there are several."""
MAX_REFUSAL = 300
"""Maximum number of characters shown of a client's reason for declining a job."""


@dataclass(frozen=True)
class Accepted:
    """The update was accepted."""

    name: str
    job: Job


@dataclass(frozen=True)
class Declined:
    """The client declined the job."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Rejected:
    """The result failed a check."""

    reason: str


Verdict = Accepted | Declined | Rejected


class Results:
    """Checks results.

    Args:
        folder: the run's directory.
        rounds: the models of the run, whose norms limit the norms of updates, and the plan.
        jobs: the open jobs.
        store: where clients upload updates, or None if updates are sent in the results.
    """

    def __init__(self, folder: RunFolder, rounds: Rounds, jobs: Jobs, store: Store | None) -> None:
        self._folder, self._rounds, self._jobs, self._store = folder, rounds, jobs, store

    def check(self, sealed: Sealed, client: str | None, number: int) -> Verdict:
        """Checks a result, and stores its update if it is accepted.

        Args:
            sealed: the message.
            client: the client that the sending node relays messages for, if it is known.
            number: the open round.

        Raises:
            NetworkError: the store does not respond.
            FileError: the update cannot be written to this machine's disk.
        """
        result: Result = sealed.message
        if client is None or sealed.sender != client:
            return Rejected(f"signed by {sealed.sender[:16]}, a client that this node does not relay messages for")
        open_job = self._jobs.open.get(result.job)
        job = open_job.job if open_job is not None else None
        if job is None or (job.client, job.run, job.round) != (client, result.run, number):
            return Rejected("does not answer any open job of this client; the job may have been answered before")
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
                event = event_of(folder, [(file.name, file.sha256) for file in result.files])
                if event is not None and not (
                    event.event.signer == client and belongs(event, job.run, number, job.copy)
                ):
                    raise MessageError(f"{EVENT_FILE} is not this client's, or not about this update")
        except (MessageError, UpdateError, DamagedError, RecordError) as error:
            return Rejected(str(error))
        return Accepted(result.job, job)

    def _fetch(self, job: Job, sealed: Sealed, folder: Path) -> None:
        """Fetches the files of a result into a folder, after checking that they can be those of an update.

        Raises:
            MessageError: they are not, or are larger than the plan of the run makes them.
        """
        files = sealed.message.files
        limit = update_bytes(self._folder.copy(job.round, job.copy), self._rounds.plan.training) + MAX_LISTING_BYTES
        if sum(file.size for file in files) > limit:
            raise MessageError(f"announces more than {limit} bytes, the maximum size of an update")
        for file in files:
            if file.size > MAX_LISTING_BYTES and file.name.endswith(".json"):
                raise MessageError(f"{file.name}: has {file.size} bytes, expected at most {MAX_LISTING_BYTES}")
            if file.url is not None or (file.slot is None) == (self._store is not None):
                raise MessageError(f"{file.name}: is not at the location that the job specified")
            if file.slot is not None and not 0 <= file.slot < len(job.slots):
                raise MessageError(f"{file.name}: the job has no upload slot {file.slot}")
        slots = [file.slot for file in files if file.slot is not None]
        if len(set(slots)) != len(slots):
            raise MessageError("two files use the same upload slot")
        _check_names([file.name for file in files], 1 + limit // SHARD_BYTES)
        payloads = sealed.payloads()
        for file in files:
            if self._store is None:
                receive(file, payloads[file.name], folder / file.name)
            else:
                self._store.fetch(self._jobs.slot(job, file.slot), file, folder / file.name)


def _check_names(names: list[str], most: int) -> None:
    """Checks that files are update.json, one safetensors file or an index and all of its shards, and perhaps the event.

    Args:
        names: names of the files.
        most: maximum number of shards.

    Raises:
        MessageError: one is missing or unexpected, or there are too many.
    """
    names = [name for name in names if name != EVENT_FILE]
    shards = len(names) - 2
    complete = {"update.json", "update.safetensors.index.json"}
    complete |= {f"update-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, min(shards, most) + 1)}
    if set(names) != {"update.json", "update.safetensors"} and not (0 < shards <= most and set(names) == complete):
        raise MessageError(
            f"lists {len(names)} files, expected update.json and update.safetensors, or an index and up to {most} shards"
        )


def _check_headers(folder: Path) -> None:
    """Checks the total size of the safetensors headers, which are read into memory.

    Raises:
        MessageError: it exceeds `MAX_LISTING_BYTES`.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total += length if length <= path.stat().st_size else 0  # otherwise `examine` rejects the file
    if total > MAX_LISTING_BYTES:
        raise MessageError(f"safetensors headers of {total} bytes, expected at most {MAX_LISTING_BYTES}")
