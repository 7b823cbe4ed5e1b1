"""The jobs that are open: sealed once, kept on disk, and linked into the outbox of whichever node carries for the client."""

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
"""How often a job is given to a client whose results are refused, before the client counts as not answering."""


@dataclass(frozen=True)
class OpenJob:
    """A job that a client has not answered yet."""

    job: Job
    file: Path


class Jobs:
    """The open jobs.

    Args:
        folder: the run's.
        plan: the run's.
        identity: signs the jobs.
        publication: where the copies' files are.
        store: where updates are put, or None if they travel in the results.
    """

    def __init__(
        self, folder: RunFolder, plan: RunPlan, identity: Identity, publication: Publication, store: Store | None
    ) -> None:
        self._folder, self._plan, self._identity = folder, plan, identity
        self._publication, self._store = publication, store
        self._open: dict[str, OpenJob] = {}

    @property
    def open(self) -> dict[str, OpenJob]:
        """The open jobs by name, the SHA-256 of the sealed job."""
        return dict(self._open)

    def load(self, number: int) -> None:
        """Reads the open jobs of a round from disk; those whose update has been accepted are withdrawn.

        Everything else that is in the outboxes of known nodes belongs to no open job and should be removed by the caller.
        """
        self._open = {}
        for file in sorted(self._folder.jobs(number).glob("*-copy-*")):
            if not file.name.startswith("."):
                sealed = Sealed.open(file.read_bytes(), self._identity.public)
                self._open[sealed.name] = OpenJob(sealed.message, file)
                if self._folder.update(number, sealed.message.client, sealed.message.copy).exists():
                    self.withdraw(sealed.name)

    def give(self, run: str, number: int, client: str, copy: int, node: str | None) -> None:
        """Makes sure that a job is open, and is in the outbox of the client's node if it has one."""
        wanted = (number, client, copy)
        name = next(
            (name for name, out in self._open.items() if (out.job.round, out.job.client, out.job.copy) == wanted), None
        )
        if name is None:
            name = self._seal(run, number, client, copy, attempt=1)
        if node is not None and not (target := self._folder.outbox(node) / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._open[name].file, target)

    def ask_again(self, name: str) -> bool:
        """Replaces a job whose result was refused by a new one; returns False if that was the last attempt."""
        job = self._open[name].job
        self.withdraw(name)
        if job.attempt >= MAX_ATTEMPTS:
            return False
        self._seal(job.run, job.round, job.client, job.copy, job.attempt + 1)
        return True

    def withdraw(self, name: str) -> None:
        """Closes a job."""
        out = self._open.pop(name)
        for file in (self._folder.mail / "outbox").glob(f"*/{name}"):
            file.unlink(missing_ok=True)
        out.file.unlink(missing_ok=True)

    def withdraw_all(self, client: str | None = None) -> None:
        """Closes all jobs, or all jobs of a client."""
        for name in [name for name, out in self._open.items() if client is None or out.job.client == client]:
            self.withdraw(name)

    def slot(self, job: Job, slot: int) -> str:
        """Where in the store one of a job's slots is."""
        return key(job.run, job.round, "updates", job.client, f"copy-{job.copy}-{job.attempt}", str(slot))

    def _seal(self, run: str, number: int, client: str, copy: int, attempt: int) -> str:
        """Makes a job and keeps it; returns its name."""
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
            slots = range(4 + 4 * sum(file.size for file in files) // 5_000_000_000)
            job = replace(job, slots=[self._store.slot(self.slot(job, slot)) for slot in slots])
        payloads = [self._folder.copy(number, copy) / file.name for file in files if file.url is None]
        data = seal(job, self._identity, payloads)
        file = self._folder.jobs(number) / f"{client}-copy-{copy}"
        write_bytes(file, data)
        name = Sealed.open(data).name
        self._open[name] = OpenJob(job, file)
        return name
