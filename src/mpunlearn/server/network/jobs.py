"""The open jobs. A job asks one client to unlearn on one copy of a round.

Each job is signed once, stored on disk, and linked into the outbox of the node that currently relays messages for the
client.
"""

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from mpunlearn.files import write_bytes
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import Job, Sealed, seal
from mpunlearn.protocol.transfer import Store
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.publication import Publication, key
from mpunlearn.server.plan import RunPlan

MAX_ATTEMPTS = 3
"""How often a job is issued to a client whose results are rejected before the client is dropped."""

MAX_EXAMINATIONS = 2
"""How often the examination of an answer may end the server before the answer is rejected."""


@dataclass(frozen=True)
class OpenJob:
    """A job that a client has not answered yet."""

    job: Job
    file: Path


class Jobs:
    """Issues and withdraws jobs.

    Args:
        folder: the run's directory.
        plan: the run's plan.
        identity: the server's key, which signs the jobs.
        publication: the published files of the copies.
        store: where clients upload updates, or None if updates are sent in the results.
    """

    def __init__(
        self, folder: RunFolder, plan: RunPlan, identity: Identity, publication: Publication, store: Store | None
    ) -> None:
        self._folder, self._plan, self._identity = folder, plan, identity
        self._publication, self._store = publication, store
        self._open: dict[str, OpenJob] = {}

    @property
    def open(self) -> dict[str, OpenJob]:
        """The open jobs by name, which is the SHA-256 of the signed message."""
        return dict(self._open)

    def load(self, number: int) -> None:
        """Reads the open jobs of a round from disk, and withdraws those whose update has already been accepted.

        All other files in the outboxes of known nodes are obsolete; the caller should remove them.
        """
        self._open = {}
        for file in sorted(self._folder.jobs(number).glob("*-copy-*")):
            if not file.name.startswith("."):
                sealed = Sealed.open(file.read_bytes(), self._identity.public)
                self._open[sealed.name] = OpenJob(sealed.message, file)
                if self._folder.update(number, sealed.message.client, sealed.message.copy).exists():
                    self.withdraw(sealed.name)

    def give(self, run: str, number: int, client: str, copy: int, node: str | None) -> None:
        """Ensures that a job is open, and that it is in the outbox of the client's node if there is one."""
        wanted = (number, client, copy)
        matching = (
            name for name, entry in self._open.items() if (entry.job.round, entry.job.client, entry.job.copy) == wanted
        )
        name = next(matching, None)
        if name is None:
            name = self._seal(run, number, client, copy, attempt=1)
        if node is not None and not (target := self._folder.outbox(node) / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._open[name].file, target)

    def ask_again(self, name: str) -> bool:
        """Replaces a job whose result was rejected; returns False if it was the last attempt."""
        job = self._open[name].job
        self.withdraw(name)
        if job.attempt >= MAX_ATTEMPTS:
            return False
        self._seal(job.run, job.round, job.client, job.copy, job.attempt + 1)
        return True

    def examinations(self, name: str) -> int:
        """How often an answer to a job was examined without an end."""
        count = self._count(name)
        return int(count.read_text()) if count.exists() else 0

    def begin_examination(self, name: str) -> None:
        """Counts an examination before it begins."""
        write_bytes(self._count(name), str(self.examinations(name) + 1).encode())

    def end_examination(self, name: str) -> None:
        """Forgets the examinations of an answer, since one has come to its end."""
        self._count(name).unlink(missing_ok=True)

    def _count(self, name: str) -> Path:
        file = self._open[name].file
        return file.with_name(f".{file.name}.examined")

    def withdraw(self, name: str) -> None:
        """Closes a job."""
        self.end_examination(name)
        entry = self._open.pop(name)
        for file in (self._folder.mail / "outbox").glob(f"*/{name}"):
            file.unlink(missing_ok=True)
        entry.file.unlink(missing_ok=True)

    def withdraw_all(self, client: str | None = None) -> None:
        """Closes all jobs, or all jobs of a client."""
        for name in [name for name, entry in self._open.items() if client is None or entry.job.client == client]:
            self.withdraw(name)

    def slot(self, job: Job, slot: int) -> str:
        """The key, in the store, of an upload slot of a job."""
        return key(job.run, job.round, "updates", job.client, f"copy-{job.copy}-{job.attempt}", str(slot))

    def _seal(self, run: str, number: int, client: str, copy: int, attempt: int) -> str:
        """Creates, signs and stores a job; returns its name."""
        files = self._publication.files(number, copy)
        job = Job(
            run=run,
            client=client,
            round=number,
            rounds=self._plan.rounds,
            copy=copy,
            copies=self._plan.perturbation.copies,
            training=self._plan.training.to_json(),
            files=files,
            attempt=attempt,
            nonce=secrets.token_hex(16),
        )
        if self._store is not None:
            slots = range(5 + 4 * sum(file.size for file in files) // 5_000_000_000)
            job = replace(job, slots=[self._store.slot(self.slot(job, slot)) for slot in slots])
        payloads = [self._folder.copy(number, copy) / file.name for file in files if file.url is None]
        data = seal(job, self._identity, payloads)
        file = self._folder.jobs(number) / f"{client}-copy-{copy}"
        write_bytes(file, data)
        name = Sealed.open(data).name
        self._open[name] = OpenJob(job, file)
        return name
