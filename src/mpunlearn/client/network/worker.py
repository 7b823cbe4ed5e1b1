"""The client's worker in a run over a network: takes jobs from the spool folder, unlearns, and returns results.

A job is the server's request to unlearn on one copy of its model. Flower runs code that the server sent: the courier,
which passes messages between the network and the spool folder and needs nothing else. The worker, in contrast, is a
program that the data owner installed. Only the worker opens the forget set, and it trusts nothing in the spool folder:
it does a job only if the server signed it for this client and the data owner's policy allows it. It does not touch a copy
itself, but leaves that to a process of its own (see `process` and `handling`), so that no job can end the worker.

    WORK/identity.key           the client's Ed25519 key
    WORK/run.json               the run that this client takes part in, with its plan
    WORK/record.json            the record of the run, with WORK/commitments.json (see `client.recording`)
    WORK/memory/                what the client keeps from round 1 (see `client.reference`)
    WORK/copies/                the copy that is being trained
    WORK/updates/               finished updates, until the round after next begins
    WORK/audit/                 what the updates would tell the server, if the policy limits it (see `auditing`)
    WORK/copies.json            which copy was trained for which round and copy number
    WORK/model.json             what the first copy was, if the policy does not say what the model is (see `pins`)
    WORK/review/                a copy that a person has to review, if the policy says so
    WORK/error.txt              why a training or an audit failed

A killed worker can be restarted with the same command. A finished update is not trained again, and a repeated job gets
the same update as its answer. A different copy with a number that was already used is refused, because two copies with
one number would tell the server more than the plan allows.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpunlearn.client.network.auditing import UpdateAudit
from mpunlearn.client.network.handling import Handling
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.process import Process
from mpunlearn.client.network.spool import Spool
from mpunlearn.client.plausibility.examine import Texts
from mpunlearn.client.recording import Recording, check_published
from mpunlearn.client.resources import Resources
from mpunlearn.errors import MessageError, MPUError, NetworkError, PlanError, RefusalError
from mpunlearn.files import as_path, new_directory
from mpunlearn.lm.records import Record, read_records, record_text
from mpunlearn.lm.sources import Data
from mpunlearn.progress import say as say_line
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import (
    MAX_INLINE_BYTES,
    Challenge,
    Finished,
    Hello,
    Job,
    Result,
    Sealed,
    seal,
)
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.record.artifacts import EVENT_FILE
from mpunlearn.protocol.record.commitments import text_digest
from mpunlearn.protocol.transfer import file_entry, put, receive
from mpunlearn.schema import older, parse, read, write

POLL_SECONDS = 0.3
RETRY_SECONDS = 10.0
"""A failed transfer is retried after this long."""


@dataclass(frozen=True)
class JoinedRun:
    """The content of WORK/run.json: the run that this client takes part in, as its first job described it."""

    run: str
    rounds: int
    copies: int
    training: Training
    begun_by_older: bool = older(absent=True, default=False, compare=False)
    """Whether a version that always trained the token-local weights wrote this file."""
    format: int = 1


@dataclass(frozen=True)
class _Done:
    """Identifies a copy that was accepted for training."""

    copy: str
    """SHA-256 (hex) over the names and digests of the copy's files."""


@dataclass(frozen=True)
class Ledger:
    """The content of WORK/copies.json: which copy was trained for which round and copy number. Format 2."""

    copies: dict[str, _Done] = field(default_factory=dict)
    """Keyed by "round-R-copy-K"."""
    format: int = 2


def _upgrade(value: dict[str, Any]) -> dict[str, Any]:
    """Converts a ledger's JSON to the current format. Format 1 was only the dictionary, with the plan's digest added."""
    if "format" in value:
        return value
    return {"copies": {name: {"copy": entry["copy"]} for name, entry in value.items()}, "format": 2}


class Worker:
    """Does the jobs of one run.

    Args:
        spool: the spool folder.
        folder: this worker's own folder, WORK.
        policy: limits on what the server may ask for.
        forget: what to forget, as for `unlearn`.
        retain: what to keep, in the same form.
        decoys: what to unlearn along with the forget set, in the same form.
        data: how to read the examples.
        resources: memory, precision, trackers.
        say: reports one line to the user.

    Raises:
        PlanError: a folder cannot be created, or the policy's audit needs texts that are not given.
        DataError: texts cannot be read.
    """

    def __init__(
        self,
        spool: Path,
        folder: Path,
        policy: Policy,
        *,
        forget: str | Path,
        retain: str | Path | None = None,
        decoys: str | Path | None = None,
        data: Data | None = None,
        resources: Resources | None = None,
        say: Callable[[str], None] = say_line,
    ) -> None:
        self._spool = Spool(spool, policy.server_key, say)
        self._folder, self._policy, self._say = folder, policy, say
        texts = {"forget": forget, "retain": retain, "decoys": decoys}
        given = {name: _records(source, data, name) for name, source in texts.items()}
        self._unlearned = [*given["forget"], *given["decoys"]]
        self._audit = audit = None
        if policy.audit is not None:
            self._audit = audit = UpdateAudit(folder / "audit", policy.audit, texts, data, say)
        examined = Texts(self._unlearned, given["retain"])
        options: dict[str, Any] = {**texts, "data": data, "resources": resources}
        self._process = Process(
            lambda report: Handling(folder, policy, examined, options, audit, report), policy.process, say
        )
        sets = {name: [text_digest(record_text(record)) for record in given[name]] for name in ("forget", "retain")}
        self._recording = Recording(folder, sets, folder / "run.json")
        self._retry_at: dict[str, float] = {}
        self.connected = False
        """Whether a message from the server has arrived."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        except OSError as error:
            raise PlanError(f"{folder}: cannot be created: {error.strerror}") from error
        self.identity = Identity.at(folder / "identity.key")

    def step(self) -> str | None:
        """Answers every unanswered message in the spool folder; returns how the run ended, or None if it has not.

        Raises:
            MPUError: something is wrong that only the user can fix, such as an unreadable forget set.
        """
        waiting = [
            sealed for sealed in self._spool.unanswered() if time.monotonic() >= self._retry_at.get(sealed.name, 0)
        ]
        for sealed in sorted(waiting, key=_order):
            self.connected = True
            message = sealed.message
            if isinstance(message, Challenge):
                self._say(f"connected to run {message.run[:8]}")
                self._answer(sealed, Hello(message.run, message.nonce, message.node))
            elif isinstance(message, Finished):
                self._spool.answer(sealed.name, b"")
                joined = self._joined()
                if joined is not None and joined.run == message.run:
                    return message.outcome
            elif isinstance(message, Job):
                self._do(sealed, message)
        return None

    def _answer(self, sealed: Sealed, message: Hello | Result, payloads: list[Path] | None = None) -> None:
        self._spool.answer(sealed.name, seal(message, self.identity, payloads or []))

    def _joined(self) -> JoinedRun | None:
        """The run that this client takes part in; None before its first job."""
        file = self._folder / "run.json"
        return read(JoinedRun, file) if file.exists() else None

    def _do(self, sealed: Sealed, job: Job) -> None:
        """Handles one job, from the checks to the answer."""
        what = f"round {job.round} of {job.rounds}, copy {job.copy} of {job.copies}"
        try:
            self._check(job)
            update = self._update(job, sealed, what)
            if self._audit is not None and (failed := self._audit.failures(update.name)):
                raise RefusalError(f"the update fails the client's audit: {', '.join(failed)}")
            sent, payloads = self._send(job, update)
        except RefusalError as refusal:
            self._say(f"{what}: refused: {refusal}")
            self._answer(sealed, Result(job.run, sealed.name, refusal=str(refusal)))
        except PlanError as error:  # the server must not learn anything about the text, so it gets no details
            self._say(f"{what}: refused: {error}")
            reason = "the plan cannot be followed with this client's text"
            self._answer(sealed, Result(job.run, sealed.name, refusal=reason))
        except _WaitingError as error:
            self._say(f"{what}: {error}")
            self._retry_at[sealed.name] = math.inf
        except (NetworkError, MessageError) as error:
            # The files are missing or are not the ones that the server signed. They may arrive later.
            self._say(f"{what}: {error}")
            self._retry_at[sealed.name] = time.monotonic() + RETRY_SECONDS
        else:
            self._answer(sealed, Result(job.run, sealed.name, sent), payloads)
            self._say(f"{what}: done")

    def _check(self, job: Job) -> None:
        """Refuses a job for another client, one that the policy forbids, and one whose plan differs from the first job's.

        Raises:
            RefusalError: the job must not be done.
            PlanError: the same, for a reason that the server must not learn.
        """
        if job.client != self.identity.public:
            raise RefusalError("the job is for another client")
        joined = self._joined()
        if violations := self._policy.violations(job, joined is not None and joined.begun_by_older):
            raise RefusalError("; ".join(violations))
        training = parse(Training, job.training)
        reason = self._policy.plan.too_few_steps(training, len(self._unlearned))
        if reason is not None and not (joined is not None and joined.begun_by_older):
            raise PlanError(reason)
        requested = JoinedRun(job.run, job.rounds, job.copies, training)
        if joined is None:
            write(self._folder / "run.json", requested)
        elif joined.run != job.run:
            raise RefusalError("this client takes part in another run; for this one it needs another --work")
        elif joined != requested:
            raise RefusalError("the plan differs from the first job's")

    def _send(self, job: Job, update: Path) -> tuple[list[Any], list[Path]]:
        """Uploads an update to the job's upload slots, if it has any.

        Returns:
            The entries of the update's files, and the files that travel in the message itself.
        """
        files = sorted(update.iterdir())
        size = sum(file.stat().st_size for file in files)
        if len(files) > len(job.slots) if job.slots else size > MAX_INLINE_BYTES:
            raise RefusalError(
                f"the update has {len(files)} files and {size / 1e6:.0f} MB, more than the job has room for; "
                "use a store"
            )
        if job.slots:
            return [replace(put(file, job.slots[slot]), slot=slot) for slot, file in enumerate(files)], []
        return [file_entry(file) for file in files], files

    def _update(self, job: Job, sealed: Sealed, what: str) -> Path:
        """The update that a job asks for, trained and audited now if that has not been done yet.

        Raises:
            RefusalError: another copy was trained under this number, or the copy or its training is refused.
            NetworkError: the copy cannot be downloaded.
        """
        updates = self._folder / "updates"
        target = updates / f"round-{job.round}-copy-{job.copy}"
        newest = self._register(job, target.name)
        signed = (target / EVENT_FILE).exists() or all(file.name != EVENT_FILE for file in job.files)
        if target.exists() and signed and (self._audit is None or self._audit.measured(target.name)):
            return target
        old = [update for update in updates.glob("round-*") if int(update.name.split("-")[1]) < newest - 1]
        for path in [*old, *(self._folder / "copies").glob("*")]:
            shutil.rmtree(path, ignore_errors=True)
        copy = self._fetch(job, sealed, what)
        limits, training = self._policy.process, json.dumps(job.training)
        card = json.dumps(asdict(Card(job.run, job.round, job.copy, job.copies)))
        self._process.call("examine", limits.examine_minutes * 60, str(copy), card, training)
        known = [(file.name, file.sha256) for file in job.files]
        published = check_published(copy, known, self._policy.server_key, job.run, job.round, job.copy)
        if not target.exists():
            self._recording.begin(published)
            self._say(f"{what}: unlearning")
            self._process.call("train", limits.train_hours * 3600, str(copy), str(target), training)
        self._recording.updated(published, target)
        if self._audit is not None:
            self._say(f"{what}: auditing the update")
            max_length = str(parse(Training, job.training).max_length)
            self._process.call("audit", limits.train_hours * 3600, str(copy), str(target), max_length)
        shutil.rmtree(copy, ignore_errors=True)
        return target

    def _register(self, job: Job, name: str) -> int:
        """Records which copy is trained under a number; returns the newest round."""
        file = self._folder / "copies.json"
        ledger = read(Ledger, file, _upgrade) if file.exists() else Ledger()
        newest = max((int(number.split("-")[1]) for number in ledger.copies), default=job.round)
        if job.round < newest - 1:
            raise RefusalError(f"round {job.round} is over: round {newest} has begun")
        listed = json.dumps([(entry.name, entry.sha256) for entry in job.files])
        current = _Done(hashlib.sha256(listed.encode()).hexdigest())
        if ledger.copies.get(name, current) != current:
            raise RefusalError(f"round {job.round}, copy {job.copy} was another copy before; expected the same again")
        write(file, Ledger({**ledger.copies, name: current}))
        return newest

    def _fetch(self, job: Job, sealed: Sealed, what: str) -> Path:
        """Downloads the copy, which is not looked at yet.

        Raises:
            _WaitingError: a person has to review it first.
        """
        name = f"round-{job.round}-copy-{job.copy}"
        unreviewed = self._policy.review and self._policy.model is None
        copy = self._folder / ("review" if unreviewed else "copies") / name
        if not copy.exists():
            self._say(f"{what}: fetching")
            payloads = sealed.payloads()
            with new_directory(copy, mode=0o700) as folder:
                for file in job.files:
                    receive(file, payloads.get(file.name), folder / file.name)
        if unreviewed:
            raise _WaitingError(
                f"the policy wants a review first: `mpunlearn client review {copy} --policy POLICY --accept` writes [model] "
                "into the policy; then start this command again"
            )
        return copy

    def close(self) -> None:
        """Ends the process that handles copies."""
        self._process.stop()


def _records(source: str | Path | None, data: Data | None, name: str) -> list[Record]:
    """The texts of a source; empty without one."""
    if source is None:
        return []
    return read_records(as_path(source, f"--{name}"), data, "retain" if name == "retain" else "forget")


def _order(sealed: Sealed) -> tuple[int, int, str]:
    """Sort key: jobs by round and copy, after all other messages."""
    job = sealed.message
    return (job.round, job.copy, sealed.name) if isinstance(job, Job) else (0, 0, sealed.name)


class _WaitingError(MPUError):
    """A job waits for the user."""
