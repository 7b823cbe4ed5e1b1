"""The main loop of the server in a run over a network.

In each round, the coordinator publishes the perturbed copies of the model, gives every client a job for each copy that
it is to unlearn on, collects the updates, and aggregates them into the next model.

The idea: all state that must survive the process is in files that are written atomically, so each step checks what
exists and does what is missing. The server can be killed and restarted at any point; the result is byte-identical.
Messages are exchanged through a mail folder, independently of the transport (Flower, or a function in a test).

A message has no effect until it has been checked in full. A message that fails a check is rejected, reported and
deleted.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpunlearn.errors import MessageError, NetworkError, PlanError
from mpunlearn.files import write_bytes
from mpunlearn.progress import say as say_line
from mpunlearn.protocol.identity import HEX, Identity
from mpunlearn.protocol.messages import Finished, Hello, Result, Sealed, seal
from mpunlearn.protocol.transfer import Store
from mpunlearn.server.average import average
from mpunlearn.server.network.deadlines import Deadlines
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.jobs import MAX_ATTEMPTS, MAX_EXAMINATIONS, Jobs
from mpunlearn.server.network.publication import Publication
from mpunlearn.server.network.results import Accepted, Declined, Rejected, Results
from mpunlearn.server.network.roster import LostClientError, Roster
from mpunlearn.server.network.status import ClientStatus, Status, StatusFile
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.state import ServerState
from mpunlearn.server.updates import changed_tensors

FAREWELL_SECONDS = 30.0
"""How long to wait at the end of a run until the clients have been notified."""
MAIL_MARGIN_SECONDS = 86400
"""How much longer than the deadline signed URLs remain valid."""


class Coordinator:
    """The server's side of a run, advanced one step at a time.

    Args:
        plan: the plan of the run, with a `Service`.
        path: the run's directory.
        say: logs one line.
        store: replaces the store of the plan, for tests.

    Raises:
        PlanError: the plan is not for a run over a network, or contradicts itself.
    """

    def __init__(
        self, plan: RunPlan, path: Path, say: Callable[[str], None] = say_line, store: Store | None = None
    ) -> None:
        if plan.service is None:
            raise PlanError(f"{path}: is a run with both parties in one process; resume it with `mpunlearn run`")
        self._plan, self.service, self._say = plan, plan.service, say
        self._federation, self._copies = plan.service.federation, plan.perturbation.copies
        if self._federation.assign == "one" and self._federation.clients != self._copies:
            raise PlanError(
                f"--assign one: expected as many --clients as --copies, found {self._federation.clients} clients and "
                f"{self._copies} copies"
            )
        if self._federation.assign == "one" and plan.perturbation.denoising == "extrapolate":
            raise PlanError(
                "--denoising extrapolate: with --assign one, two replicas that collude recover the model from copies whose "
                "noise is the same; choose harmonic"
            )
        self.folder = RunFolder(path)
        self.folder.make()
        self.identity = Identity.at(self.folder.identity)
        if store is None and self._federation.store is not None:
            store = Store(self._federation.store, self._federation.deadline + MAIL_MARGIN_SECONDS)
        trusted = [client.key for client in self.service.clients]
        self.roster = Roster(self.folder.roster, trusted, self._federation.clients)
        self.publication = Publication(self.folder, store, plan.training)
        self.jobs = Jobs(self.folder, plan, self.identity, self.publication, store)
        self._rounds = Rounds(plan, path, self.folder.final)
        self._results = Results(self.folder, self._rounds, self.jobs, store)
        self._deadlines = Deadlines(self._federation.deadline)
        self._status = StatusFile(self.folder.status)
        self._open: int | None = None
        self._run = ""
        self._has_stepped, self._trouble = False, ""

    def step(self) -> bool:
        """Does everything that can be done now.

        If the store does not respond, this is reported once and the next step tries again.

        Returns:
            Whether the run is complete.

        Raises:
            NetworkError: a client does not answer or declines its job, and the run cannot continue without it; or the
                store does not respond in the first step.
            MPUError: as raised by `preprocess` and `postprocess`.
        """
        try:
            complete = self._step()
        except NetworkError as error:
            if isinstance(error, LostClientError) or not self._has_stepped:
                raise
            self._open = None  # check the whole state again in the next step
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error}; retrying")
            return False
        self._has_stepped, self._trouble = True, ""
        return complete

    def _step(self) -> bool:
        if self._open is None:
            number = next((n for n in range(1, self._plan.rounds + 1) if not self._rounds.closed(n)), None)
            for closed in range(1, number or self._plan.rounds + 1):
                self._clear(closed)
            if number is None:
                self._run = ServerState(self._rounds.state).run
                self._show(self._plan.rounds, "complete")
                return True
            self._publish(number)
            self._open = number
        number = self._open
        if self.publication.expired(number):
            self._open = None
            return False
        now = time.time()  # taken before reading the inbox, so that answers arriving meanwhile are not late
        for file in sorted(self.folder.inbox.iterdir()):
            if not file.name.startswith("."):
                self._read(number, file)
        self._challenge_nodes()
        if self.roster.complete_since is None:
            self._show(number, "waiting for clients")
            if self._deadlines.waited_for_clients:
                raise LostClientError(
                    f"only {len(self.roster.clients)} of {self._federation.clients} clients connected before the "
                    "deadline; run `server resume` to wait again"
                )
            return False
        pairs = self.roster.pairs(self._federation.assign, self._copies)
        missing = [(client, copy) for client, copy in pairs if not self.folder.update(number, client, copy).exists()]
        for client, copy in missing:
            self.jobs.give(self._run, number, client, copy, self.roster.node_of(client))
        if not missing:
            if self._agree(number, pairs):
                self._aggregate(number, pairs)
                self._open = None
            return False
        self._show(number, "unlearning")
        self._check_deadline(number, missing, now)
        return False

    def farewell(self, outcome: str) -> None:
        """Notifies the clients that the run is over, and waits up to `FAREWELL_SECONDS` for their acknowledgments."""
        nodes = list(self.roster.nodes)
        message = seal(Finished(self._run, outcome), self.identity)
        name = Sealed.open(message).name
        for node in nodes:
            write_bytes(self.folder.outbox(node) / name, message)
        end = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < end and not all((self.folder.inbox / f"{node}-{name}").exists() for node in nodes):
            time.sleep(0.2)
        write_bytes(self.folder.done, b"")
        for file in self.folder.inbox.iterdir():
            file.unlink(missing_ok=True)

    def _publish(self, number: int) -> None:
        """Publishes the copies of a round and loads its open jobs."""
        if not self.folder.copies(number).exists():
            self._show(number, "publishing")
            self._rounds.publish(number, self.folder.copies(number))
        self._run = ServerState(self._rounds.state).run
        if published := self.publication.publish(number, self._run):
            self._say(f"round {number}: {published} copies published")
        self.jobs.load(number)
        outbox = self.folder.mail / "outbox"
        self.roster.keep_challenges({file.parent.name for file in outbox.glob("*/*")})
        for file in outbox.glob("*/*"):
            if file.parent.name in self.roster.nodes and file.name not in self.jobs.open:
                file.unlink()  # the job is no longer open

    def _challenge_nodes(self) -> None:
        """Challenges each node whose client is not known yet."""
        for node in sorted(file.name for file in self.folder.nodes.iterdir() if file.name.isdigit()):
            if (challenge := self.roster.challenge(node, self._run)) is not None:
                message = seal(challenge, self.identity)
                shutil.rmtree(self.folder.outbox(node), ignore_errors=True)
                write_bytes(self.folder.outbox(node) / Sealed.open(message).name, message)

    def _read(self, number: int, file: Path) -> None:
        """Processes or rejects one message.

        Its file is deleted before the message is examined, and the examination is counted, so that a message that ends
        this process is not examined at each start. If the process ends for another reason, the courier brings it again.
        """
        node, _, name = file.name.partition("-")
        client = self.roster.client_of(node)
        sender = client[:16] if client else f"node {node}"
        try:
            if not HEX.fullmatch(name):
                raise MessageError("its file name is not the digest of a message that it answers")
            if name in self.jobs.open and self.jobs.examinations(name) >= MAX_EXAMINATIONS:
                raise MessageError(f"the server has ended {MAX_EXAMINATIONS} times while it examined this answer")
            data = file.read_bytes()
            file.unlink()
            if name in self.jobs.open:
                self.jobs.begin_examination(name)
            sealed = Sealed.open(data)
            if isinstance(sealed.message, Hello):
                self._enroll(node, sealed, name)
            elif isinstance(sealed.message, Result):
                self._take(number, client, sealed)
            else:
                raise MessageError("expected a result")
        except MessageError as error:
            self._say(f"rejected a message from {sender}: {error}")
            if name in self.jobs.open and self.jobs.open[name].job.client == client:
                self._ask_again(name)
            elif client is None and HEX.fullmatch(name):
                (self.folder.outbox(node) / name).unlink(missing_ok=True)
                self.roster.refuse_answer(node)
        except LostClientError:
            raise
        except NetworkError as error:  # not the client's fault; the courier will deliver the message again
            if client is not None:
                self._deadlines.excuse(client)
            self._say(f"cannot process a message from {sender} now: {error}")
        finally:
            file.unlink(missing_ok=True)
            if name in self.jobs.open:
                self.jobs.end_examination(name)

    def _enroll(self, node: str, sealed: Sealed, name: str) -> None:
        """Processes a client's answer to a challenge."""
        for old in self.roster.enroll(sealed.message, self._run, node, sealed.sender):
            shutil.rmtree(self.folder.outbox(old), ignore_errors=True)
        (self.folder.outbox(node) / name).unlink(missing_ok=True)
        self._say(f"client {sealed.sender[:16]} is connected")

    def _take(self, number: int, client: str | None, sealed: Sealed) -> None:
        """Acts on the verdict on a result."""
        match self._results.check(sealed, client, number):
            case Accepted(name, job):
                self.jobs.withdraw(name)
                self._say(f"round {number}: update of copy {job.copy} of {job.copies} from client {job.client[:16]}")
            case Declined(job, reason):
                self.jobs.withdraw_all(job.client)  # if the run is resumed with this client, it gets new jobs
                self._drop({job.client: f"declined copy {job.copy} of round {job.round}: {reason}"})
            case Rejected(reason):
                raise MessageError(reason)

    def _ask_again(self, name: str) -> None:
        """Reissues a job whose result was rejected, up to `MAX_ATTEMPTS` times."""
        job = self.jobs.open[name].job
        if not self.jobs.ask_again(name):
            reason = f"sent {MAX_ATTEMPTS} results for copy {job.copy} of round {job.round} that were rejected"
            self._drop({job.client: reason})

    def _agree(self, number: int, pairs: list[tuple[str, int]]) -> bool:
        """Checks whether all updates change the same tensors, and drops the clients that differ from the majority.

        Raises:
            LostClientError: too few clients would be left.
        """
        tensors: dict[str, set[frozenset[str]]] = {}
        for client, copy in pairs:
            path = self.folder.update(number, client, copy)
            tensors.setdefault(client, set()).add(frozenset(changed_tensors(path)))
        votes = Counter(next(iter(names)) for names in tensors.values() if len(names) == 1)
        majority = {names for names, count in votes.items() if 2 * count > len(tensors)}
        if outliers := [client for client, names in tensors.items() if names != majority]:
            self._drop(dict.fromkeys(outliers, f"trained different tensors than the others in round {number}"))
            for client in outliers:  # only now: if the run cannot go on without them, nothing is lost
                shutil.rmtree(self.folder.updates(number, client))
        return not outliers

    def _check_deadline(self, number: int, missing: list[tuple[str, int]], now: float) -> None:
        """Drops all late clients together, or none of them."""
        complete = self.roster.complete_since or 0.0
        begun = self.publication.begun(number)
        if late := self._deadlines.late(missing, complete=complete, begun=begun, now=now):
            seconds = self._federation.deadline
            self._drop(
                {
                    client: f"did not answer for copy {', '.join(map(str, copies))} of round {number} in {seconds:g} s"
                    for client, copies in late.items()
                }
            )

    def _drop(self, reasons: dict[str, str]) -> None:
        """Drops clients, on all copies, for the rest of the run.

        Raises:
            LostClientError: too few clients would be left; in this case none is dropped.
        """
        self.roster.drop(reasons, self._federation.quorum)
        for client, reason in reasons.items():
            self.jobs.withdraw_all(client)
            self._say(f"continuing without client {client[:16]}: it {reason}")

    def _aggregate(self, number: int, pairs: list[tuple[str, int]]) -> None:
        """Averages the updates of each copy over clients, computes the next model, and closes the round."""
        self._show(number, "aggregating")
        shutil.rmtree(self.folder.averages(number), ignore_errors=True)
        clients = self.roster.clients
        weights = dict(zip(clients, self._federation.weights or [1.0] * len(clients), strict=True))
        updates = []
        sent = [(copy, self.folder.update(number, client, copy)) for client, copy in pairs]
        for copy in range(1, self._copies + 1):
            senders = [client for client, assigned in pairs if assigned == copy]
            paths = [self.folder.update(number, client, copy) for client in senders]
            if len(paths) > 1:
                target = self.folder.averages(number) / f"copy-{copy}"
                paths = [average(paths, [weights[client] for client in senders], target)]
            updates += paths
        self._rounds.aggregate(number, updates, sent)
        self._clear(number)
        self._say(f"round {number} of {self._plan.rounds} is complete")

    def _clear(self, number: int) -> None:
        """Removes the files of a closed round."""
        self._rounds.tidy(number)
        if not self.folder.exchange(number).exists():
            return
        self.jobs.withdraw_all()
        self._run = ServerState(self._rounds.state).run
        self.publication.remove(number, self._run)
        shutil.rmtree(self.folder.exchange(number))

    def _show(self, number: int, phase: str) -> None:
        """Writes the current status to status.json."""
        pairs, dropped = self.roster.pairs(self._federation.assign, self._copies), self.roster.dropped
        clients = {}
        for client in self.roster.clients:
            updates = sorted(self.folder.updates(number, client).glob("copy-*"))
            node = self.roster.node_of(client)
            clients[client] = ClientStatus(
                connected=node is not None,
                dropped=dropped.get(client),
                updates=len(updates),
                of=sum(party == client for party, _ in pairs),
                bytes=sum(file.stat().st_size for update in updates for file in update.iterdir()),
                node=node,
            )
        copies = self.folder.copies(number)
        size = sum(file.stat().st_size for file in copies.rglob("*") if file.is_file()) if copies.exists() else 0
        self._status.show(
            Status(self._run, number, self._plan.rounds, phase, clients, self._federation.clients, self._copies, size)
        )
