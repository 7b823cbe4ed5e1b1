"""The mail folder on the server, through which the courier exchanges messages with the coordinator.

    MAIL/nodes/NODE                a node that has been seen
    MAIL/outbox/NODE/NAME          a message for the node; it stays until its result has been accepted
    MAIL/inbox/NODE-NAME           the result of the message NAME
    MAIL/generation, MAIL/alive    identifier of the current Flower run of this app, and its heartbeat

The courier does not look into the messages. Files whose names are not digests are ignored.
"""

from pathlib import Path

from .spool import MAX_MESSAGE_BYTES, NAME, put

WAIT_SECONDS = 20.0
"""How long a node waits for results before it answers with those that are ready."""


class Mail:
    """Converts the files of the mail folder to Flower message records and back.

    Args:
        mail: the mail folder.
    """

    def __init__(self, mail: Path) -> None:
        self._mail = mail
        self._delivered: set[tuple[str, str]] = set()

    def load(self, node: str) -> dict[str, list[str] | list[bytes] | float] | None:
        """The content of the next message to a node; None if there is nothing to send."""
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
            except FileNotFoundError:  # its result has been accepted in the meantime
                continue
            if jobs and sum(map(len, jobs)) + len(job) > MAX_MESSAGE_BYTES:
                break
            names.append(name)
            jobs.append(job)
            self._delivered.add((node, name))  # if it gets lost, the node reports it as missing
        all_delivered = all((node, name) in self._delivered for name in wanted)
        return {"names": names, "jobs": jobs, "wanted": wanted, "wait": WAIT_SECONDS if all_delivered else 0.0}

    def unload(self, node: str, record: dict[str, object]) -> None:
        """Writes the results from a node to the inbox, ignoring those that were not requested."""
        wanted = {file.name for file in (self._mail / "outbox" / node).glob("*")}
        names, results, missing = (record.get(key) for key in ("names", "results", "missing"))
        if not (isinstance(names, list) and isinstance(results, list) and isinstance(missing, list)):
            return
        self._delivered -= {(node, name) for name in missing}
        for name, data in zip(names, results, strict=False):
            if name in wanted and isinstance(data, bytes) and len(data) <= MAX_MESSAGE_BYTES:
                put(self._mail / "inbox" / f"{node}-{name}", data)
