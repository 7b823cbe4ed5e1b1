"""The server's side of a run over a network: who takes part, which jobs are out, what has come back.

The idea: everything that must outlive this process is a file that appears whole, so every step looks at what is there and
does what is missing. Killed at any point and started again, the run ends with the same bytes. Messages go through a mail
folder; who carries them (Flower, or a function in a test) is of no concern here.

    RUN/plan.json              what was agreed; pinned
    RUN/identity.key           the server's Ed25519 key
    RUN/clients.json           the clients, in the order of their numbers, and which were dropped
    RUN/state, RUN/round-N     `Rounds`
    RUN/exchange/round-N/      copies, jobs that are out, updates that were accepted
    RUN/mail/                  nodes, outbox, inbox: `protocol.flower`
    RUN/status.json            for people
    RUN/final                  the unlearned checkpoint

What arrives changes nothing until it has been checked in full: the signature, that it answers a job which is out to this
client, the digests of its files, and the update itself (`examine`). What does not pass is refused, said, and forgotten.
"""

import dataclasses
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint, checkpoint_files
from mpunlearn.errors import DamagedError, MessageError, NetworkError, PlanError, UpdateError
from mpunlearn.files import new_directory, read_json, write_bytes, write_json
from mpunlearn.progress import printable
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.identity import HEX, Identity
from mpunlearn.protocol.messages import MAX_INLINE_BYTES, Challenge, File, Finished, Hello, Job, Result, Sealed, seal
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.transfer import Store, file_of, receive
from mpunlearn.schema import parse
from mpunlearn.server.average import average
from mpunlearn.server.federation import Federation
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.state import ServerState
from mpunlearn.server.updates import examine, updated

MAX_ATTEMPTS = 3
"""How often a job is given to a client whose results do not pass, before it counts as not answering."""
UPDATE_OVERHEAD_BYTES = 200_000
"""Bytes of an update beside its tensors."""
MAX_LISTING_BYTES = 16_000_000
"""Bytes of an update's JSON files, and of its shards' headers together."""
RETRY_SECONDS = 10.0
"""Seconds until a node whose answer to a challenge was refused is asked again."""
FAREWELL_SECONDS = 30.0
"""Seconds that the end of a run waits for the clients to hear of it."""


class Coordinator:
    """A run's server side, advanced a step at a time.

    Args:
        rounds: the models and the passes over them; `rounds.folder` is the run's directory.
        federation: who takes part.
        training: the plan of the clients' training.
        trusted: public keys of the clients, in order; none: whoever comes first, up to the number of clients.
        say: takes one line for people.
    """

    def __init__(
        self,
        rounds: Rounds,
        federation: Federation,
        training: Training,
        trusted: list[str],
        say: Callable[[str], None] = print,
    ) -> None:
        self._rounds, self._federation, self._say = rounds, federation, say
        self._training = training.plain()
        self.folder = rounds.folder
        self.mail = self.folder / "mail"
        for name in ("nodes", "outbox", "inbox"):
            (self.mail / name).mkdir(parents=True, exist_ok=True)
        self.identity = Identity.at(self.folder / "identity.key")
        self._trusted = trusted
        self._store = Store(federation.store, federation.deadline + 86400) if federation.store else None
        copies = rounds.perturbation.copies
        if federation.assign == "one" and federation.clients != copies:
            raise PlanError(
                f"--assign one: expected as many --clients as --copies, {copies}, found {federation.clients}"
            )
        self._started = time.time()
        self._open: int | None = None
        self._run = ""
        self._out: dict[str, _Out] = {}
        self._shown: dict[str, Any] = {}
        self._going = False
        self._unfetched: set[str] = set()
        self._refused: dict[str, float] = {}
        self._trouble = ""

    # What is kept.

    def _roster(self) -> dict[str, Any]:
        file = self.folder / "clients.json"
        return (
            read_json(file)
            if file.exists()
            else {"clients": list(self._trusted), "dropped": {}, "nodes": {}, "asked": {}}
        )

    def _keep(self, roster: dict[str, Any]) -> None:
        write_json(self.folder / "clients.json", roster, mode=0o600)

    def _exchange(self, number: int) -> Path:
        return self.folder / "exchange" / f"round-{number}"

    def _update(self, number: int, client: str, copy: int) -> Path:
        return self._exchange(number) / "updates" / client / f"copy-{copy}"

    def _pairs(self, roster: dict[str, Any]) -> list[tuple[str, int]]:
        """(client, copy) of every update that the round needs."""
        clients = [client for client in roster["clients"] if client not in roster["dropped"]]
        if self._federation.assign == "one":
            return list(zip(clients, range(1, self._rounds.perturbation.copies + 1), strict=False))
        return [(client, copy) for client in clients for copy in range(1, self._rounds.perturbation.copies + 1)]

    # One step.

    def step(self) -> bool:
        """Does what can be done now. If the store does not answer, that is said, and the next step tries again.

        Returns:
            Whether the run is complete.

        Raises:
            NetworkError: a client does not answer, or refuses, and the run cannot go on without it; or the store did not answer
                at the very first step.
            MPUError: as `preprocess` and `postprocess` do.
        """
        try:
            complete = self._step()
        except NetworkError as error:
            if isinstance(error, _LostError) or not self._going:
                raise
            self._open = None  # look at all that is there again
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error}; trying on")
            return False
        self._going, self._trouble = True, ""
        return complete

    def _step(self) -> bool:
        number = self._open
        if number is None:
            number = next((n for n in range(1, self._rounds.rounds + 1) if not self._rounds.closed(n)), None)
            for done in range(1, number or self._rounds.rounds + 1):
                self._clear(done)
            if number is None:
                self._run = ServerState(self._rounds.state).run
                self._show(self._rounds.rounds, "complete")
                return True
            self._publish(number)
            self._open = number
        if self._signatures_run_out(number):
            self._open = None
            return False
        now = time.time()  # what arrives while the inbox is read has come in time
        for file in sorted((self.mail / "inbox").iterdir()):
            if not file.name.startswith("."):
                self._read(number, file)
        self._greet()
        roster = self._roster()
        if len(roster["clients"]) < self._federation.clients:
            self._show(number, "waiting for clients")
            if time.time() - self._started > self._federation.deadline:
                raise _LostError(f"only {len(roster['clients'])} of {self._federation.clients} clients have come")
            return False
        pairs = self._pairs(roster)
        missing = [(client, copy) for client, copy in pairs if not self._update(number, client, copy).exists()]
        for client, copy in missing:
            self._give(number, client, copy, roster)
        if not missing:
            if self._agree(number, pairs):
                self._aggregate(number, pairs, roster)
                self._open = None
            return False
        self._show(number, "unlearning")
        self._check_deadline(number, missing, now)
        return False

    def farewell(self, outcome: str) -> None:
        """Tells the clients that the run is over, and waits a little until they have heard."""
        nodes = list(self._roster()["nodes"])
        message = seal(Finished(self._run, outcome), self.identity)
        name = Sealed.open(message).name
        for node in nodes:
            write_bytes(self.mail / "outbox" / node / name, message)
        end = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < end and not all((self.mail / "inbox" / f"{node}-{name}").exists() for node in nodes):
            time.sleep(0.2)
        write_bytes(self.mail / "done", b"")
        for file in (self.mail / "inbox").iterdir():
            file.unlink(missing_ok=True)

    def _publish(self, number: int) -> None:
        """The round's copies, in the store where there is one."""
        folder = self._exchange(number)
        if not (folder / "copies").exists():
            self._show(number, "publishing")
            self._rounds.publish(number, folder / "copies")
        self._run = ServerState(self._rounds.state).run
        begun = time.time()
        if self._signatures_run_out(number):
            begun = float(read_json(folder / "files.json")["begun"])
            shutil.rmtree(folder / "jobs", ignore_errors=True)
            self._out = {}
        if not (folder / "files.json").exists() or self._signatures_run_out(number):
            copies = {}
            for copy in sorted((folder / "copies").iterdir()):
                paths = checkpoint_files(copy)
                size = max(sum(path.stat().st_size for path in paths), self._update_size(number, copy))
                if self._store is None and size > MAX_INLINE_BYTES:
                    raise PlanError(
                        f"--store: a copy or its update has {size / 1e6:.0f} MB and a message carries at most "
                        f"{MAX_INLINE_BYTES / 1e6:.0f} MB; name a folder or bucket that both sides reach"
                    )
                files = [
                    self._store.put(path, self._key(number, copy.name, path.name)) if self._store else file_of(path)
                    for path in paths
                ]
                copies[copy.name] = [dataclasses.asdict(file) for file in files]
            write_json(folder / "files.json", {"copies": copies, "begun": begun, "signed": time.time()}, mode=0o600)
            self._say(f"round {number}: {len(copies)} copies published")
        for file in sorted((folder / "jobs").glob("*-copy-*")):
            if not file.name.startswith("."):
                sealed = Sealed.open(file.read_bytes(), self.identity.public)
                self._out[sealed.name] = _Out(sealed.message, file)
                if self._update(number, sealed.message.client, sealed.message.copy).exists():
                    self._withdraw(sealed.name)
        roster = self._roster()
        roster["asked"] = {
            node: nonce for node, nonce in roster["asked"].items() if any((self.mail / "outbox" / node).glob("*"))
        }
        self._keep(roster)
        for file in (self.mail / "outbox").glob("*/*"):
            if file.parent.name in roster["nodes"] and file.name not in self._out:
                file.unlink()  # of a job that is no longer out

    def _signatures_run_out(self, number: int) -> bool:
        """Whether signed URLs have run out, or soon will: then there are new ones, in new jobs."""
        if self._store is None or not (file := self._exchange(number) / "files.json").exists():
            return False
        return time.time() - float(read_json(file)["signed"]) > self._store.lasts / 2

    def _update_size(self, number: int, copy: Path) -> int:
        """Bytes of a dense update of a copy; of factors they are few."""
        tensors = Checkpoint(copy).tensors
        names = self._planned(copy) or set(tensors)
        entries = sum(tensors[name].nbytes // tensors[name].dtype.itemsize for name in names)
        itemsize = FLOAT_DTYPES[self._training["update_dtype"]].itemsize
        return 0 if self._training["lora_rank"] else entries * itemsize + UPDATE_OVERHEAD_BYTES

    def _key(self, number: int, *parts: str) -> str:
        """Where something lies in the store."""
        return "/".join([self._run, f"round-{number}", *parts])

    def _slot(self, job: Job, slot: int) -> str:
        return self._key(job.round, "updates", job.client, f"copy-{job.copy}-{job.attempt}", str(slot))

    # Who is there.

    def _greet(self) -> None:
        """Asks every node that nobody has answered for which party it carries for."""
        roster = self._roster()
        for node in sorted(file.name for file in (self.mail / "nodes").iterdir() if file.name.isdigit()):
            wait = time.monotonic() - self._refused.get(node, -RETRY_SECONDS) < RETRY_SECONDS
            if node not in roster["nodes"] and node not in roster["asked"] and not wait:
                nonce = secrets.token_hex(16)
                message = seal(Challenge(self._run, nonce, node), self.identity)
                shutil.rmtree(self.mail / "outbox" / node, ignore_errors=True)
                write_bytes(self.mail / "outbox" / node / Sealed.open(message).name, message)
                roster["asked"][node] = nonce
                self._keep(roster)

    def _enrol(self, node: str, sealed: Sealed, name: str) -> None:
        """Takes a client's answer to a challenge."""
        hello, roster = sealed.message, self._roster()
        if (hello.run, hello.node, hello.nonce) != (self._run, node, roster["asked"].get(node)):
            raise MessageError("answers another challenge")
        if sealed.sender not in roster["clients"]:
            if self._trusted or len(roster["clients"]) >= self._federation.clients:
                raise MessageError(f"client {sealed.sender[:16]} is not one of this run's")
            roster["clients"].append(sealed.sender)
        for old in [old for old, client in roster["nodes"].items() if client == sealed.sender]:
            del roster["nodes"][old]
            shutil.rmtree(self.mail / "outbox" / old, ignore_errors=True)
        roster["nodes"][node] = sealed.sender
        if len(roster["clients"]) == self._federation.clients:
            roster.setdefault("complete", time.time())
        del roster["asked"][node]
        self._keep(roster)
        (self.mail / "outbox" / node / name).unlink(missing_ok=True)
        self._say(f"client {sealed.sender[:16]} is there")

    # Jobs and results.

    def _give(self, number: int, client: str, copy: int, roster: dict[str, Any]) -> None:
        """Makes sure that a job is out to a client's node."""
        name = next((name for name, out in self._out.items() if out.of(number, client, copy)), None)
        if name is None:
            name = self._seal(number, client, copy, 1)
        node = next((node for node, party in roster["nodes"].items() if party == client), None)
        if node is not None and not (target := self.mail / "outbox" / node / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._out[name].file, target)

    def _seal(self, number: int, client: str, copy: int, attempt: int) -> str:
        """Makes a job and keeps it; returns its name."""
        folder = self._exchange(number)
        files = [parse(File, file) for file in read_json(folder / "files.json")["copies"][f"copy-{copy}"]]
        job = Job(
            run=self._run,
            client=client,
            round=number,
            rounds=self._rounds.rounds,
            copy=copy,
            copies=self._rounds.perturbation.copies,
            training=self._training,
            files=files,
            attempt=attempt,
            nonce=secrets.token_hex(16),
        )
        if self._store is not None:
            entries = sum(file.size for file in files)
            slots = range(4 + 4 * entries // 5_000_000_000)
            job = dataclasses.replace(job, slots=[self._store.slot(self._slot(job, slot)) for slot in slots])
        payloads = [folder / "copies" / f"copy-{copy}" / file.name for file in files if file.url is None]
        data = seal(job, self.identity, payloads)
        file = folder / "jobs" / f"{client}-copy-{copy}"
        write_bytes(file, data)
        name = Sealed.open(data).name
        self._out[name] = _Out(job, file)
        return name

    def _read(self, number: int, file: Path) -> None:
        """Takes one message, or refuses it; either way it is gone afterwards."""
        node, _, name = file.name.partition("-")
        roster = self._roster()
        client = roster["nodes"].get(node)
        try:
            if not HEX.fullmatch(name):
                raise MessageError("answers nothing")
            sealed = Sealed.open(file.read_bytes())
            if isinstance(sealed.message, Hello):
                self._enrol(node, sealed, name)
            elif isinstance(sealed.message, Result):
                self._accept(number, client, sealed, roster)
            else:
                raise MessageError("expected a result")
        except _LostError:
            raise
        except (MessageError, UpdateError, DamagedError) as error:
            self._say(f"refused a message of {client[:16] if client else f'node {node}'}: {error}")
            if name in self._out and self._out[name].job.client == client:
                self._ask_again(name)
            elif client is None and HEX.fullmatch(
                name
            ):  # a challenge that was answered badly is put anew, a little later
                (self.mail / "outbox" / node / name).unlink(missing_ok=True)
                roster = self._roster()
                if roster["asked"].pop(node, None) is not None:
                    self._refused[node] = time.monotonic()
                    self._keep(roster)
        except NetworkError as error:  # not the client's fault: the courier will bring the message again
            self._unfetched |= {client} if client is not None else set()
            self._say(f"cannot take a message of {client[:16] if client else f'node {node}'} now: {error}")
        finally:
            file.unlink(missing_ok=True)

    def _accept(self, number: int, client: str | None, sealed: Sealed, roster: dict[str, Any]) -> None:
        """Checks a result in full and keeps its update.

        Raises:
            MessageError: it answers no job that is out to that client.
            DamagedError: its files are not there, or not what was signed.
            UpdateError: it is not an update of that copy.
            NetworkError: the store does not answer.
            CheckpointError: this machine cannot write it.
        """
        result = sealed.message
        out = self._out.get(result.job)
        if client is None or sealed.sender != client:
            raise MessageError(f"signed by {sealed.sender[:16]}, which this node does not carry for")
        if out is None or out.job.client != client or out.job.run != result.run or out.job.round != number:
            raise MessageError("answers no job that is out to this client: of another round or run, or answered before")
        job = out.job
        if result.refusal is not None:
            for name in [name for name, other in self._out.items() if other.job.client == client]:
                self._withdraw(name)  # once it is settled, the client is asked again
            self._drop({client: f"refuses copy {job.copy} of round {job.round}: {printable(result.refusal[:300])}"})
            return
        card = Card(job.run, job.round, job.copy, job.copies)
        with new_directory(self._update(number, client, job.copy), mode=0o700) as folder:
            self._fetch(job, sealed, folder)
            copy = self._exchange(number) / "copies" / f"copy-{job.copy}"
            _check_headers(folder)
            theta, factored = self._rounds.theta(number - 1), bool(self._training["lora_rank"])
            examine(folder, copy, theta, card, factored=factored, expected=self._planned(copy))
        self._withdraw(result.job)
        self._say(f"round {number}: update of copy {job.copy} of {job.copies} from {client[:16]}")

    def _ask_again(self, name: str) -> None:
        """Gives a job anew whose result did not pass; not for ever."""
        job = self._out[name].job
        self._withdraw(name)
        if job.attempt < MAX_ATTEMPTS:
            self._seal(job.round, job.client, job.copy, job.attempt + 1)
        else:
            reason = f"sent {MAX_ATTEMPTS} results for copy {job.copy} of round {job.round} that do not pass"
            self._drop({job.client: reason})

    def _planned(self, copy: Path) -> set[str] | None:
        """The tensors that an update must be of, where the plan says it in the checkpoint's names."""
        if self._training["lora_rank"] or self._training["train"] not in ("blocks", "all"):
            return None
        checkpoint = Checkpoint(copy)
        places = Architecture.of(checkpoint).tensor_roles(checkpoint)
        return {name for name, place in places.items() if place.layer is not None or self._training["train"] == "all"}

    def _agree(self, number: int, pairs: list[tuple[str, int]]) -> bool:
        """Whether all updates are of the same tensors. Clients that differ from more than half are gone on without.

        Raises:
            NetworkError: too few would be left.
        """
        found: dict[str, set[frozenset[str]]] = {}
        for client, copy in pairs:
            found.setdefault(client, set()).add(frozenset(updated(self._update(number, client, copy))))
        votes = Counter(next(iter(names)) for names in found.values() if len(names) == 1)
        usual = {names for names, count in votes.items() if 2 * count > len(found)}
        if odd := [client for client, names in found.items() if names != usual]:
            for client in odd:  # should they be gone on with, then with other updates
                shutil.rmtree(self._exchange(number) / "updates" / client)
            self._drop(dict.fromkeys(odd, f"trained other tensors than the others in round {number}"))
        return not odd

    def _fetch(self, job: Job, sealed: Sealed, folder: Path) -> None:
        """Brings the files of a result into a folder, never more than an update can have."""
        copy = Checkpoint(self._exchange(job.round) / "copies" / f"copy-{job.copy}")
        most = sum(4 * info.nbytes // info.dtype.itemsize for info in copy.tensors.values()) + 10_000_000
        if sum(file.size for file in sealed.message.files) > most:
            raise MessageError(f"announces more than the {most} bytes that an update can have")
        for file in sealed.message.files:
            if file.size > MAX_LISTING_BYTES and file.name.endswith(".json"):
                raise MessageError(f"{file.name}: has {file.size} bytes, expected at most {MAX_LISTING_BYTES}")
        slots = [file.slot for file in sealed.message.files if file.slot is not None]
        if len(set(slots)) != len(slots):
            raise MessageError("two files are in the same slot")
        payloads = sealed.payloads()
        for file in sealed.message.files:
            if file.url is not None or (file.slot is None) == (self._store is not None):
                raise MessageError(f"{file.name}: is not where the job said")
            if self._store is None:
                receive(file, payloads[file.name], folder / file.name)
                continue
            if not 0 <= file.slot < len(job.slots):
                raise MessageError(f"{file.name}: the job has no slot {file.slot}")
            self._store.fetch(self._slot(job, file.slot), file, folder / file.name)

    def _withdraw(self, name: str) -> None:
        """A job is no longer out."""
        out = self._out.pop(name)
        for file in (self.mail / "outbox").glob(f"*/{name}"):
            file.unlink(missing_ok=True)
        out.file.unlink(missing_ok=True)

    # Who is not there.

    def _check_deadline(self, number: int, missing: list[tuple[str, int]], now: float) -> None:
        complete = float(self._roster().get("complete", 0.0))
        begun = max(self._started, complete, float(read_json(self._exchange(number) / "files.json")["begun"]))
        late: dict[str, str] = {}
        for client in dict.fromkeys(client for client, _ in missing):
            # Whose answer came while the store was away has as much time again, and not for ever.
            if now - begun <= self._federation.deadline * (2 if client in self._unfetched else 1):
                continue
            copies = ", ".join(str(copy) for party, copy in missing if party == client)
            late[client] = f"has not answered for copy {copies} of round {number} in {self._federation.deadline:g} s"
        if late:
            self._drop(late)

    def _drop(self, reasons: dict[str, str]) -> None:
        """Goes on without some clients, in all copies, for the rest of the run.

        Args:
            reasons: client → why.

        Raises:
            NetworkError: too few would be left; then nobody is dropped.
        """
        roster = self._roster()
        left = [party for party in roster["clients"] if party not in roster["dropped"] and party not in reasons]
        quorum = self._federation.quorum
        if quorum is None or len(left) < quorum:
            allowed = "every client" if quorum is None else f"at least {quorum} clients"
            named = "; ".join(f"client {client[:16]} {reason}" for client, reason in reasons.items())
            raise _LostError(f"{named}; the plan needs {allowed}. Settle it with them, then `server resume`")
        roster["dropped"] |= reasons
        self._keep(roster)
        for name in [name for name, out in self._out.items() if out.job.client in reasons]:
            self._withdraw(name)
        for client, reason in reasons.items():
            self._say(f"goes on without client {client[:16]}: it {reason}")

    # The end of a round.

    def _aggregate(self, number: int, pairs: list[tuple[str, int]], roster: dict[str, Any]) -> None:
        self._show(number, "aggregating")
        folder = self._exchange(number) / "average"
        shutil.rmtree(folder, ignore_errors=True)
        weights = dict(zip(roster["clients"], self._federation.weights or [1.0] * len(roster["clients"]), strict=True))
        updates = []
        for copy in range(1, self._rounds.perturbation.copies + 1):
            clients = [client for client, mine in pairs if mine == copy]
            paths = [self._update(number, client, copy) for client in clients]
            if len(paths) > 1:
                paths = [average(paths, [weights[client] for client in clients], folder / f"copy-{copy}")]
            updates += paths
        self._rounds.aggregate(number, updates)
        self._clear(number)
        self._say(f"round {number} of {self._rounds.rounds} is complete")

    def _clear(self, number: int) -> None:
        """Removes what a closed round has left."""
        self._rounds.tidy(number)
        if not self._exchange(number).exists():
            return
        for name in list(self._out):
            self._withdraw(name)
        if self._store is not None:
            self._run = ServerState(self._rounds.state).run
            self._store.remove(self._key(number))
        shutil.rmtree(self._exchange(number))

    # For people.

    def _show(self, number: int, phase: str) -> None:
        """Writes status.json, where something has changed."""
        roster = self._roster()
        clients = {}
        for client in roster["clients"]:
            updates = sorted((self._exchange(number) / "updates" / client).glob("copy-*"))
            clients[client] = {
                "connected": client in roster["nodes"].values(),
                "dropped": roster["dropped"].get(client),
                "updates": len(updates),
                "of": sum(party == client for party, _ in self._pairs(roster)),
                "bytes": sum(file.stat().st_size for update in updates for file in update.iterdir()),
            }
        sent = self._exchange(number) / "copies"
        shown = {
            "run": self._run,
            "round": number,
            "rounds": self._rounds.rounds,
            "phase": phase,
            "clients": clients,
            "expected_clients": self._federation.clients,
            "copies": self._rounds.perturbation.copies,
            "copy_bytes": sum(file.stat().st_size for file in sent.rglob("*") if file.is_file())
            if sent.exists()
            else 0,
        }
        if shown != self._shown:
            self._shown = shown
            write_json(self.folder / "status.json", {**shown, "at": time.time()}, mode=0o600)


def _check_headers(folder: Path) -> None:
    """Refuses an update whose lists of tensors alone would fill the memory.

    Raises:
        MessageError: its safetensors headers are together larger than `MAX_LISTING_BYTES`.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total += length if length <= path.stat().st_size else 0  # if not, it is no such file, as `examine` will say
    if total > MAX_LISTING_BYTES:
        raise MessageError(f"headers of {total} bytes, expected at most {MAX_LISTING_BYTES}")


@dataclass(frozen=True)
class _Out:
    """A job that is out."""

    job: Job
    file: Path

    def of(self, number: int, client: str, copy: int) -> bool:
        return (self.job.round, self.job.client, self.job.copy) == (number, client, copy)


class _LostError(NetworkError):
    """The run cannot go on without a client."""
