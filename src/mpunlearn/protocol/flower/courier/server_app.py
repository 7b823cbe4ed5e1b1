"""The server's end: carries whatever lies in the mail folder, for as long as the run lives.

    MAIL/nodes/NODE                a node that was seen
    MAIL/outbox/NODE/NAME          put there for that node; the same NAME stays until its result has been accepted
    MAIL/inbox/NODE-NAME           its result
    MAIL/generation, MAIL/alive    which run of this app is the one that counts; when it last did something

It has no state of its own, so it may be killed and started again at any moment.
"""

import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .spool import MOST_BYTES, NAME, put

WAIT = 20.0
"""Seconds that a node may wait for results before it answers with those it has."""
SILENCE = 120.0
"""Seconds after which a message without an answer is given up."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carries until another run takes over, or the mail folder says that all is done."""
    mail, generation = Path(str(context.run_config["mail"])), str(context.run_config["generation"])
    courier = Courier(mail)
    asked: dict[str, tuple[int, float]] = {}
    while (mail / "generation").read_text() == generation and not (mail / "done").exists():
        put(mail / "alive", str(time.time()).encode())
        busy = {node for node, _ in asked.values()}
        for node in grid.get_node_ids():
            put(mail / "nodes" / str(node), b"")
            if node not in busy and (record := courier.load(str(node))):
                content = RecordDict({"mail": ConfigRecord(record)})
                message = Message(content=content, dst_node_id=node, message_type="query", ttl=SILENCE)
                asked |= {identity: (node, time.monotonic()) for identity in grid.push_messages([message])}
        for reply in grid.pull_messages(list(asked)) if asked else []:
            node, _ = asked.pop(reply.metadata.reply_to_message_id, (0, 0.0))
            if node and reply.has_content():
                courier.unload(str(node), dict(reply.content["mail"]))
        asked = {identity: (node, at) for identity, (node, at) in asked.items() if time.monotonic() - at < SILENCE}
        time.sleep(0.3)


class Courier:
    """What is in the mail folder, as the records of messages and back.

    Args:
        mail: the folder.
    """

    def __init__(self, mail: Path) -> None:
        self._mail = mail
        self._delivered: set[tuple[str, str]] = set()

    def load(self, node: str) -> dict[str, list[str] | list[bytes] | float] | None:
        """The next message to a node; None if there is nothing for it."""
        wanted = sorted(file.name for file in (self._mail / "outbox" / node).glob("*") if NAME.fullmatch(file.name))
        if not wanted:
            return None
        names: list[str] = []
        jobs: list[bytes] = []
        for name in wanted:
            if (node, name) in self._delivered:
                continue
            try:
                job = (self._mail / "outbox" / node / name).read_bytes()
            except FileNotFoundError:  # accepted meanwhile
                continue
            if jobs and sum(map(len, jobs)) + len(job) > MOST_BYTES:
                break
            names.append(name)
            jobs.append(job)
            self._delivered.add((node, name))  # if it gets lost, the node will miss it
        everything = all((node, name) in self._delivered for name in wanted)
        return {"names": names, "jobs": jobs, "wanted": wanted, "wait": WAIT if everything else 0.0}

    def unload(self, node: str, record: dict[str, object]) -> None:
        """Puts a node's results into the inbox, as far as they were asked for."""
        wanted = {file.name for file in (self._mail / "outbox" / node).glob("*")}
        names, results, missing = (record[key] for key in ("names", "results", "missing"))
        if not (isinstance(names, list) and isinstance(results, list) and isinstance(missing, list)):
            return
        self._delivered -= {(node, name) for name in missing}
        for name, data in zip(names, results, strict=False):
            if name in wanted and isinstance(data, bytes):
                put(self._mail / "inbox" / f"{node}-{name}", data)
