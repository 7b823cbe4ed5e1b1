"""The server's end of the courier: a folder with what is to be sent to each node, and what came back.

    MAIL/nodes/NODE                a node that was seen
    MAIL/outbox/NODE/NAME          put there for that node; the same NAME stays until its result has been accepted
    MAIL/inbox/NODE-NAME           its result
    MAIL/generation, MAIL/alive    which run of this app is the one that counts; when it last did something

What is in the messages is between their two ends; names that are no digests are passed over.
"""

from pathlib import Path

from .spool import MAX_MESSAGE_BYTES, NAME, put

WAIT = 20.0
"""Seconds that a node may wait for results before it answers with those it has."""


class Mail:
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
            if jobs and sum(map(len, jobs)) + len(job) > MAX_MESSAGE_BYTES:
                break
            names.append(name)
            jobs.append(job)
            self._delivered.add((node, name))  # if it gets lost, the node will miss it
        everything = all((node, name) in self._delivered for name in wanted)
        return {"names": names, "jobs": jobs, "wanted": wanted, "wait": WAIT if everything else 0.0}

    def unload(self, node: str, record: dict[str, object]) -> None:
        """Puts a node's results into the inbox, as far as they were asked for."""
        wanted = {file.name for file in (self._mail / "outbox" / node).glob("*")}
        names, results, missing = (record.get(key) for key in ("names", "results", "missing"))
        if not (isinstance(names, list) and isinstance(results, list) and isinstance(missing, list)):
            return
        self._delivered -= {(node, name) for name in missing}
        for name, data in zip(names, results, strict=False):
            if name in wanted and isinstance(data, bytes) and len(data) <= MAX_MESSAGE_BYTES:
                put(self._mail / "inbox" / f"{node}-{name}", data)
