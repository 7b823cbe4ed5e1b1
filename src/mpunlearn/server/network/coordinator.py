"""The server's side of a run over a network: a loop over small objects, each of which looks after one thing.

The idea: everything that must outlive this process is a file that is written atomically, so every step looks at what is there
and does what is missing. Killed at any point and started again, the run ends with the same bytes. Messages go through a mail
folder; it does not matter here who carries them (Flower, or a function in a test).

Whatever arrives changes nothing until it has been checked in full. What does not pass is refused, reported, and forgotten.
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
from mpunlearn.server.network.jobs import MAX_ATTEMPTS, Jobs
from mpunlearn.server.network.publication import Publication
from mpunlearn.server.network.results import Accepted, Declined, Rejected, Results
from mpunlearn.server.network.roster import LostClientError, Roster
from mpunlearn.server.network.status import ClientStatus, Status, StatusFile
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.rounds import Rounds
from mpunlearn.server.state import ServerState
from mpunlearn.server.updates import changed_tensors

FAREWELL_SECONDS = 30.0
"""How long the end of a run waits for the clients to hear of it."""
MAIL_MARGIN_SECONDS = 86400
"""How much longer than the deadline signed URLs are valid."""


class Coordinator:
    """A run's server side, advanced a step at a time.

    Args:
        plan: the run's, with a `Service`.
        path: the run's directory.
        say: reports one line to people.
        store: in place of the plan's, for tests.

    Raises:
        PlanError: the plan contradicts itself.
    """

    def __init__(
        self, plan: RunPlan, path: Path, say: Callable[[str], None] = say_line, store: Store | None = None
    ) -> None:
        if plan.service is None:
            raise PlanError(f"{path}: is a run of both parties in one process; go on with `mpunlearn run`")
        self._plan, self.service, self._say = plan, plan.service, say
        self._federation, self._copies = plan.service.federation, plan.perturbation.copies
        if self._federation.assign == "one" and self._federation.clients != self._copies:
            raise PlanError(
                f"--assign one: expected as many --clients as --copies, {self._copies}, found {self._federation.clients}"
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
        """Does what can be done now. If the store does not respond, that is reported, and the next step tries again.

        Returns:
            Whether the run is complete.

        Raises:
            NetworkError: a client does not answer, or refuses, and the run cannot go on without it; or the store did not
                respond at the very first step.
            MPUError: as `preprocess` and `postprocess` do.
        """
        try:
            complete = self._step()
        except NetworkError as error:
            if isinstance(error, LostClientError) or not self._has_stepped:
                raise
            self._open = None  # look at everything again
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
        now = time.time()  # what arrives while the inbox is read is in time
        for file in sorted(self.folder.inbox.iterdir()):
            if not file.name.startswith("."):
                self._read(number, file)
        self._challenge_nodes()
        if self.roster.complete_since is None:
            self._show(number, "waiting for clients")
            if self._deadlines.waited_for_clients:
                raise LostClientError(
                    f"only {len(self.roster.clients)} of {self._federation.clients} clients have come"
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
        """Tells the clients that the run is over, and waits a little until they have heard."""
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
        """Publishes the round's copies, and takes up the jobs that are open."""
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
                file.unlink()  # it belongs to a job that is no longer open

    def _challenge_nodes(self) -> None:
        """Asks every node that has not said so which client it carries for."""
        for node in sorted(file.name for file in self.folder.nodes.iterdir() if file.name.isdigit()):
            if (challenge := self.roster.challenge(node, self._run)) is not None:
                message = seal(challenge, self.identity)
                shutil.rmtree(self.folder.outbox(node), ignore_errors=True)
                write_bytes(self.folder.outbox(node) / Sealed.open(message).name, message)

    def _read(self, number: int, file: Path) -> None:
        """Takes one message, or refuses it; either way it is gone afterwards."""
        node, _, name = file.name.partition("-")
        client = self.roster.client_of(node)
        sender = client[:16] if client else f"node {node}"
        try:
            if not HEX.fullmatch(name):
                raise MessageError("does not answer any message")
            sealed = Sealed.open(file.read_bytes())
            if isinstance(sealed.message, Hello):
                self._enroll(node, sealed, name)
            elif isinstance(sealed.message, Result):
                self._take(number, client, sealed)
            else:
                raise MessageError("expected a result")
        except MessageError as error:
            self._say(f"refused a message of {sender}: {error}")
            if name in self.jobs.open and self.jobs.open[name].job.client == client:
                self._ask_again(name)
            elif client is None and HEX.fullmatch(name):
                (self.folder.outbox(node) / name).unlink(missing_ok=True)
                self.roster.refuse_answer(node)
        except LostClientError:
            raise
        except NetworkError as error:  # not the client's fault: the courier will bring the message again
            if client is not None:
                self._deadlines.excuse(client)
            self._say(f"cannot take a message of {sender} now: {error}")
        finally:
            file.unlink(missing_ok=True)

    def _enroll(self, node: str, sealed: Sealed, name: str) -> None:
        """Takes a client's answer to a challenge."""
        for old in self.roster.enroll(sealed.message, self._run, node, sealed.sender):
            shutil.rmtree(self.folder.outbox(old), ignore_errors=True)
        (self.folder.outbox(node) / name).unlink(missing_ok=True)
        self._say(f"client {sealed.sender[:16]} is connected")

    def _take(self, number: int, client: str | None, sealed: Sealed) -> None:
        """Acts on a result."""
        match self._results.check(sealed, client, number):
            case Accepted(name, job):
                self.jobs.withdraw(name)
                self._say(f"round {number}: update of copy {job.copy} of {job.copies} from {job.client[:16]}")
            case Declined(job, reason):
                self.jobs.withdraw_all(job.client)  # once it is settled, the client is asked again
                self._drop({job.client: f"refuses copy {job.copy} of round {job.round}: {reason}"})
            case Rejected(reason):
                raise MessageError(reason)

    def _ask_again(self, name: str) -> None:
        """Gives a job again whose result was refused, but not forever."""
        job = self.jobs.open[name].job
        if not self.jobs.ask_again(name):
            reason = f"sent {MAX_ATTEMPTS} results for copy {job.copy} of round {job.round} that were refused"
            self._drop({job.client: reason})

    def _agree(self, number: int, pairs: list[tuple[str, int]]) -> bool:
        """Whether all updates are of the same tensors. Clients that differ from the majority are dropped.

        Raises:
            LostClientError: too few would be left.
        """
        tensors: dict[str, set[frozenset[str]]] = {}
        for client, copy in pairs:
            path = self.folder.update(number, client, copy)
            tensors.setdefault(client, set()).add(frozenset(changed_tensors(path)))
        votes = Counter(next(iter(names)) for names in tensors.values() if len(names) == 1)
        usual = {names for names, count in votes.items() if 2 * count > len(tensors)}
        if odd := [client for client, names in tensors.items() if names != usual]:
            for client in odd:  # if the run goes on with them after all, then with other updates
                shutil.rmtree(self.folder.updates(number, client))
            self._drop(dict.fromkeys(odd, f"trained other tensors than the others in round {number}"))
        return not odd

    def _check_deadline(self, number: int, missing: list[tuple[str, int]], now: float) -> None:
        """Drops the clients that are late, all of them or none."""
        complete = self.roster.complete_since or 0.0
        begun = self.publication.begun(number)
        if late := self._deadlines.late(missing, complete=complete, begun=begun, now=now):
            seconds = self._federation.deadline
            self._drop(
                {
                    client: f"has not answered for copy {', '.join(map(str, copies))} of round {number} in {seconds:g} s"
                    for client, copies in late.items()
                }
            )

    def _drop(self, reasons: dict[str, str]) -> None:
        """Goes on without some clients, in all copies, for the rest of the run.

        Raises:
            LostClientError: too few would be left; then nobody is dropped.
        """
        self.roster.drop(reasons, self._federation.quorum)
        for client, reason in reasons.items():
            self.jobs.withdraw_all(client)
            self._say(f"goes on without client {client[:16]}: it {reason}")

    def _aggregate(self, number: int, pairs: list[tuple[str, int]]) -> None:
        """Averages over clients, makes the next model, and closes the round."""
        self._show(number, "aggregating")
        shutil.rmtree(self.folder.averages(number), ignore_errors=True)
        clients = self.roster.clients
        weights = dict(zip(clients, self._federation.weights or [1.0] * len(clients), strict=True))
        updates = []
        for copy in range(1, self._copies + 1):
            mine = [client for client, given in pairs if given == copy]
            paths = [self.folder.update(number, client, copy) for client in mine]
            if len(paths) > 1:
                target = self.folder.averages(number) / f"copy-{copy}"
                paths = [average(paths, [weights[client] for client in mine], target)]
            updates += paths
        self._rounds.aggregate(number, updates)
        self._clear(number)
        self._say(f"round {number} of {self._plan.rounds} is complete")

    def _clear(self, number: int) -> None:
        """Removes what a closed round has left."""
        self._rounds.tidy(number)
        if not self.folder.exchange(number).exists():
            return
        self.jobs.withdraw_all()
        self._run = ServerState(self._rounds.state).run
        self.publication.remove(number, self._run)
        shutil.rmtree(self.folder.exchange(number))

    def _show(self, number: int, phase: str) -> None:
        """Writes status.json."""
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
