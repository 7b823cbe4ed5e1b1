"""The data owner's side of a run over a network: takes jobs from a spool folder, unlearns, and puts results back.

The idea: Flower runs code that the server sent. So what Flower runs here is a courier that sees one folder and nothing else;
this worker is a program that the data owner installed, is the only one that opens the forget set, and takes nothing from the
folder on trust. A job is done only if the server signed it for this client, and the owner's policy allows it.

    WORK/identity.key           the client's Ed25519 key
    WORK/run.json               the one run that this client takes part in, and its plan
    WORK/memory/                what the copies of round 1 said: `Client`
    WORK/copies/                the copy that is being worked on
    WORK/updates/               finished updates, until the round after the next begins
    WORK/copies.json            which copy was done under which numbers
    WORK/error.txt              why a training failed

A worker that is killed is started again with the same command and goes on: an update that is finished is not trained again, and
a job that was given before is answered with the same update. Another copy under the number of one that was done is refused: two
copies under one number would tell a server more than the plan says.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.resources import Resources
from mpunlearn.client.unlearn import Client
from mpunlearn.errors import (
    CheckpointError,
    MessageError,
    MPUError,
    NetworkError,
    PlanError,
    StateError,
    UnloadableError,
    UnsupportedModelError,
)
from mpunlearn.files import new_directory, read_json, write_bytes, write_json
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.identity import HEX, Identity
from mpunlearn.protocol.messages import (
    MAX_HEADER_BYTES,
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
from mpunlearn.protocol.transfer import file_of, put, receive
from mpunlearn.schema import parse

POLL_SECONDS = 0.3
RETRY_SECONDS = 10.0
"""Seconds after which a transfer that failed is tried again."""


class Worker:
    """Does the jobs of one run.

    Args:
        spool: the folder that the courier sees.
        folder: this worker's own folder, WORK.
        policy: what may be asked of it.
        forget: what to forget, as for `unlearn`.
        retain: what to keep, likewise.
        data: columns and places of the examples.
        resources: memory, precision, loggers.
        say: takes one line for people.
    """

    def __init__(
        self,
        spool: Path,
        folder: Path,
        policy: Policy,
        *,
        forget: str | Path,
        retain: str | Path | None = None,
        data: Data | None = None,
        resources: Resources | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._spool, self._folder, self._policy, self._say = spool, folder, policy, say
        self._sources: dict[str, Any] = {"forget": forget, "retain": retain, "data": data, "resources": resources}
        self._client: tuple[str, Client] | None = None
        self._refused: set[str] = set()
        self._later: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            for name in ("jobs", "results"):
                (spool / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"{error.filename}: cannot be made: {error.strerror}") from error
        self.identity = Identity.at(folder / "identity.key")

    def work(self) -> str:
        """Works until the server says that the run is over; returns how it ended."""
        while True:
            if (outcome := self.step()) is not None:
                return outcome
            time.sleep(POLL_SECONDS)

    def step(self) -> str | None:
        """Answers every message in the spool that has no answer yet; how the run ended, if it did.

        Raises:
            MPUError: the forget set or the plan is at fault, which only a person can mend.
        """
        try:
            return self._step()
        except OSError as error:
            if error.filename is not None and Path(error.filename).is_relative_to(self._spool):
                raise StateError(
                    f"{self._spool}: {error.strerror}: {error.filename}; is it what the courier left?"
                ) from error
            raise

    def _step(self) -> str | None:
        waiting = []
        for file in self._inside("jobs").iterdir():
            if file.name in self._refused or time.monotonic() < self._later.get(file.name, 0):
                continue
            if HEX.fullmatch(file.name) and not self._result(file.name).exists():
                sealed = self._open(file)
                if sealed is not None:
                    order = (sealed.message.round, sealed.message.copy) if isinstance(sealed.message, Job) else (0, 0)
                    waiting.append((order, sealed.name, sealed))
        for _, name, sealed in sorted(waiting, key=lambda item: item[:2]):
            message = sealed.message
            if isinstance(message, Challenge):
                self._say(f"connected to run {message.run[:8]}")
                self._answer(name, seal(Hello(message.run, message.nonce, message.node), self.identity))
            elif isinstance(message, Finished):
                self._answer(name, b"")
                if self._is_mine(message.run):
                    return message.outcome
            elif isinstance(message, Job):
                self._do(name, message, sealed)
        return None

    def _inside(self, name: str) -> Path:
        """One of the spool's folders, once it is known to be one and not a link to another."""
        path = self._spool / name
        path.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise StateError(f"{path}: is not a folder; somebody tampers with the spool")
        return path

    def _result(self, name: str) -> Path:
        return self._inside("results") / name

    def _open(self, file: Path) -> Sealed | None:
        """A message of the server's; None if it is not one, which is said once."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as source:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_HEADER_BYTES + MAX_INLINE_BYTES + 8:
                    raise MessageError("not a file of a message's size")
                sealed = Sealed.open(source.read(), self._policy.server_key)
            if sealed.name != file.name:
                raise MessageError("is not what its name says")
            if not isinstance(sealed.message, Challenge | Finished | Job):
                raise MessageError("expected a job")
            return sealed
        except FileNotFoundError:
            return None
        except (OSError, MessageError) as error:
            self._refused.add(file.name)
            self._say(f"refused a message: {error}")
            return None

    def _answer(self, name: str, data: bytes) -> None:
        """A result that appears whole in the folder that was looked at, whatever is put in its place meanwhile."""
        try:
            folder = os.open(self._spool / "results", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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
                f"{self._spool / 'results'}: cannot be written: {error.strerror}; somebody tampers with it, or "
                "the disk is full"
            ) from error

    def _is_mine(self, run: str) -> bool:
        """Whether this is the run that the first job was of; that first job pins it."""
        file = self._folder / "run.json"
        return file.exists() and read_json(file).get("run") == run

    def _do(self, name: str, job: Job, sealed: Sealed) -> None:
        """One job, from the check to the answer."""
        what = f"round {job.round} of {job.rounds}, copy {job.copy} of {job.copies}"
        try:
            if job.client != self.identity.public:
                raise _RefusalError("the job is for another client")
            if violations := self._policy.violations(job):
                raise _RefusalError("; ".join(violations))
            agreed = {"run": job.run, "rounds": job.rounds, "copies": job.copies, "training": job.training}
            if not (self._folder / "run.json").exists():
                write_json(self._folder / "run.json", agreed, mode=0o600)
            if not self._is_mine(job.run):
                raise _RefusalError("this client takes part in another run; for this one it needs another --work")
            if read_json(self._folder / "run.json") != agreed:
                raise _RefusalError("the plan is another than in the first job of this run")
            update = self._update(job, sealed)
        except PlanError as error:
            self._say(f"{what}: refused: {error}")
            reason = (
                str(error)
                if isinstance(error, _RefusalError)
                else "the plan cannot be followed with this client's text"
            )
            self._answer(name, seal(Result(job.run, name, refusal=reason), self.identity))
            return
        except (NetworkError, MessageError) as error:
            # Signed, yet not what it says: on the way, or by the server. It may be there later.
            self._say(f"{what}: {error}")
            self._later[name] = time.monotonic() + RETRY_SECONDS
            return
        files = sorted(update.iterdir())
        size = sum(file.stat().st_size for file in files)
        if len(files) > len(job.slots) if job.slots else size > MAX_INLINE_BYTES:
            reason = f"an update of {len(files)} files and {size / 1e6:.0f} MB does not fit where the job puts it; use a store"
            self._say(f"{what}: {reason}")
            self._answer(name, seal(Result(job.run, name, refusal=reason), self.identity))
            return
        try:
            if job.slots:
                sent = [replace(put(file, job.slots[slot]), slot=slot) for slot, file in enumerate(files)]
            else:
                sent = [file_of(file) for file in files]
        except NetworkError as error:
            self._say(f"{what}: {error}")
            self._later[name] = time.monotonic() + RETRY_SECONDS
            return
        self._answer(name, seal(Result(job.run, name, sent), self.identity, [] if job.slots else files))
        self._say(f"{what}: done")

    def _update(self, job: Job, sealed: Sealed) -> Path:
        """The update that a job asks for: trained, unless it was before.

        Raises:
            PlanError: another copy was done under these numbers, or the plan cannot be followed.
            NetworkError: the copy cannot be fetched.
        """
        updates, copies = self._folder / "updates", self._folder / "copies"
        target = updates / f"round-{job.round}-copy-{job.copy}"
        digest = hashlib.sha256(json.dumps([(file.name, file.sha256) for file in job.files]).encode()).hexdigest()
        plan = hashlib.sha256(json.dumps(job.training, sort_keys=True).encode()).hexdigest()
        mine = {"copy": digest, "training": plan}
        numbers = self._folder / "copies.json"
        done = read_json(numbers) if numbers.exists() else {}
        newest = max((int(name.split("-")[1]) for name in done), default=job.round)
        if job.round < newest - 1:
            raise _RefusalError(f"round {job.round} is over: round {newest} has begun")
        if done.setdefault(target.name, mine) != mine:
            raise _RefusalError(
                f"round {job.round}, copy {job.copy} was another copy or another plan before; expected the same again"
            )
        write_json(numbers, done, mode=0o600)
        if target.exists():
            return target
        client = self._client_for(job, plan)
        over = [old for old in updates.glob("round-*") if int(old.name.split("-")[1]) < newest - 1]
        for old in [*over, *copies.glob("*")]:
            shutil.rmtree(old, ignore_errors=True)
        copy = copies / target.name
        self._say(f"round {job.round} of {job.rounds}, copy {job.copy} of {job.copies}: fetching")
        payloads = sealed.payloads()
        with new_directory(copy, mode=0o700) as folder:
            for file in job.files:
                receive(file, payloads.get(file.name), folder / file.name)
        try:
            opened = Checkpoint(copy)
            Architecture.of(opened).tensor_roles(opened)  # what it says of itself and what it holds are one
        except (CheckpointError, UnsupportedModelError) as error:
            raise _RefusalError(f"the copy is no checkpoint of a known family: {error}") from error
        if (card := Card.of(opened.config)) != Card(job.run, job.round, job.copy, job.copies):
            raise _RefusalError(f"the copy says that it is {card}, the job says otherwise")
        self._say(f"round {job.round} of {job.rounds}, copy {job.copy} of {job.copies}: unlearning")
        try:
            client.unlearn(copy, target)
        except UnloadableError as error:
            self._say(str(error))
            raise _RefusalError("transformers cannot load the copy") from error
        except (MPUError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a senseless copy or plan leads to somewhere in a training has no one type
            self._client = None
            write_bytes(self._folder / "error.txt", traceback.format_exc().encode(errors="replace"))
            self._say(f"training failed: {type(error).__name__}; see {self._folder / 'error.txt'}")
            raise _RefusalError("training on the copy failed") from error
        shutil.rmtree(copy, ignore_errors=True)
        return target

    def _client_for(self, job: Job, plan: str) -> Client:
        """The training side, made once for all jobs of a plan."""
        if self._client is None or self._client[0] != plan:
            training = parse(Training, job.training)
            self._client = (plan, Client(memory=self._folder / "memory", training=training, **self._sources))
        return self._client[1]


class _RefusalError(PlanError):
    """Why a job is not done, in words that the server may read: they say nothing of the forget set."""
