"""What a client puts into the record of a run: which update it made of which copy.

    FOLDER/record.json         the events that this client has seen or signed
    FOLDER/commitments.json    the salts of its commitments to the forget set and the retain set; secret
    FOLDER/identity.key        the key that signs

The commitments are made before the first update and stay the same for the whole run, so the client can later prove which
text it had forgotten (`mpunlearn record open`), and the server learns neither the texts nor their number. A copy of a
server that keeps no record has no event, and neither has its update.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpunlearn.errors import RecordError, RefusalError
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record import commitments
from mpunlearn.protocol.record.artifacts import EVENT_FILE
from mpunlearn.protocol.record.events import SignedEvent
from mpunlearn.protocol.record.log import FILE, IDENTITY, Log, event_of, read_event


class Recording:
    """A client's part of a run's record.

    Args:
        folder: the client's own folder.
        texts: SHA-256 (hex) of each text of each set, as `Client.text_digests`.
        plan: file of the client's plan of the run, if it has one.
    """

    def __init__(self, folder: Path, texts: Mapping[str, Sequence[str]], plan: Path | None = None) -> None:
        self._folder, self._texts, self._plan = folder, texts, plan

    def begin(self, published: SignedEvent | None) -> None:
        """Commits to the texts, and checks that the record in this folder is of this run; to be called before training.

        Args:
            published: the event of a copy; None if the server keeps no record.

        Raises:
            RecordError: the event is not about a copy, or the folder has the record of another run.
            StateError: the client has committed to other texts in this folder.
        """
        if published is None:
            return
        event = published.event
        if event.kind != "published":
            raise RecordError(f"expected the event of a published copy, found one of kind {event.kind}")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = self._log(published)
        if any(one.event.run != event.run for one in log.bundle.events):
            raise RecordError(f"{log.path}: is the record of another run; give each run a folder of its own")
        self._commitments()

    def updated(self, published: SignedEvent | None, update: Path) -> SignedEvent | None:
        """Signs an update, unless that has been done; its event is put into its directory.

        Args:
            published: the event of the copy that it was made of; None if the server keeps no record.
            update: directory of the update.

        Returns:
            The event; None if the server keeps no record.

        Raises:
            RecordError: the event of the update does not verify; also as for `begin`.
            StateError: as for `begin`.
        """
        if (update / EVENT_FILE).is_file():
            return read_event(update / EVENT_FILE)
        if published is None:
            return None
        self.begin(published)
        content = published.event.content
        facts: dict[str, Any] = {name: content[name] for name in ("round", "copy") if name in content}
        facts["commitments"] = self._commitments().roots()
        return self._log(published).attest("updated", update, facts, [published])

    def _commitments(self) -> commitments.Commitments:
        sets = dict(self._texts)
        if self._plan is not None:
            sets[commitments.PLAN] = commitments.plan_set(self._plan)
        return commitments.Commitments.pinned(self._folder / commitments.FILE, sets)

    def _log(self, published: SignedEvent) -> Log:
        event = published.event
        return Log(self._folder / FILE, Identity.at(self._folder / IDENTITY), event.run, event.server)


def check_published(
    copy: Path, known: Iterable[tuple[str, str]], server: str, run: str, number: int, copy_number: int
) -> SignedEvent | None:
    """The event of a copy, if it has one, after a check that it is the server's and about this copy of this round.

    Args:
        copy: directory of the copy.
        known: names and SHA-256 of its files, which have been checked.
        server: public key of the server.
        run: the run.
        number: the round.
        copy_number: number of the copy.

    Raises:
        RefusalError: it is not.
    """
    try:
        event = event_of(copy, known)
    except RecordError as error:
        raise RefusalError("the copy's event does not verify") from error
    if event is None:
        return None
    content = event.event.content
    found = (event.event.kind, event.event.signer, event.event.run, content.get("round"), content.get("copy"))
    if found != ("published", server, run, number, copy_number):
        raise RefusalError("the copy's event does not match the job")
    return event
