"""What a client puts into the record of a run: which update it made of which copy.

    FOLDER/record.json         the events that this client has seen or signed
    FOLDER/commitments.json    the salts of its commitments to the forget set and the retain set; secret
    FOLDER/identity.key        the key that signs

The commitments are made before the first update and stay the same for the whole run, so the client can later prove which
text it had forgotten (`mpunlearn record open`), and the server learns neither the texts nor their number. A copy of a
server that keeps no record has no event, and neither has its update.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpunlearn.errors import RecordError, RefusalError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record import commitments
from mpunlearn.protocol.record.artifacts import EVENT_FILE
from mpunlearn.protocol.record.events import SignedEvent
from mpunlearn.protocol.record.log import FILE, Log, event_of, read_event


class Recording:
    """A client's part of a run's record.

    Args:
        folder: the client's own folder.
        texts: SHA-256 (hex) of each text of each set, as `Client.text_digests`.
        plan: file of the client's plan of the run, if it has one.
    """

    def __init__(self, folder: Path, texts: Mapping[str, Sequence[str]], plan: Path | None = None) -> None:
        self._folder, self._texts, self._plan = folder, texts, plan

    def updated(self, copy: Path, update: Path) -> SignedEvent | None:
        """Signs an update, unless that has been done; its event is put into its directory.

        Args:
            copy: directory of the copy that it was made of. It is not needed if the update is signed already.
            update: directory of the update.

        Returns:
            The event; None if the server keeps no record.

        Raises:
            RecordError: the event of the copy or of the update does not verify.
            StateError: the client has committed to other texts in this folder.
        """
        if (update / EVENT_FILE).is_file():
            return read_event(update / EVENT_FILE)
        published = event_of(copy)
        if published is None:
            return None
        content, event = published.event.content, published.event
        if event.kind != "published":
            raise RecordError(f"{copy / EVENT_FILE}: is about something else than a published copy")
        sets = dict(self._texts)
        if self._plan is not None:
            sets[commitments.PLAN] = commitments.plan_set(self._plan)
        roots = commitments.Commitments.pinned(self._folder / commitments.FILE, sets).roots()
        log = Log(self._folder / FILE, Identity.at(self._folder / "identity.key"), event.run, event.server)
        facts: dict[str, Any] = {name: content[name] for name in ("round", "copy") if name in content}
        return log.attest("updated", update, {**facts, "commitments": roots}, [published])


def check_published(copy: Path, server: str, run: str, number: int, copy_number: int) -> None:
    """Checks that the event of a copy, if it has one, is the server's and about this copy of this round of the run.

    Raises:
        RefusalError: it is not.
    """
    try:
        event = event_of(copy)
    except RecordError as error:
        raise RefusalError("the copy's event does not verify") from error
    if event is None:
        return
    content = event.event.content
    found = (event.event.kind, event.event.signer, event.event.run, content.get("round"), content.get("copy"))
    if found != ("published", server, run, number, copy_number):
        raise RefusalError("the copy's event does not match the job")
