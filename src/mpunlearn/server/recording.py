"""What the server puts into the record of a run: which copies it published, and what it made of which updates.

The record and the salts of the server's commitments are in the state's directory:

    STATE/record.json         the events so far, its own and its clients'; nothing in it is secret
    STATE/commitments.json    the salts of its commitment to its plan; secret
    STATE/identity.key        the key that signs, unless the caller names another

Noise levels and scales are secret. The record therefore has the plan of training, which the clients know, and a salted
commitment to the whole plan. An event is written before the directory that it is about becomes visible. A step that is
repeated after an interruption gives the same bytes, and so finds its event.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import RecordError, UpdateError
from mpunlearn.files import read_json
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.record import artifacts, commitments
from mpunlearn.protocol.record.artifacts import FileDigest, artifact_digest, artifact_files, file_digests
from mpunlearn.protocol.record.canonical import canonical, stringified
from mpunlearn.protocol.record.events import SignedEvent
from mpunlearn.protocol.record.log import FILE, IDENTITY, Log, event_of, read_event
from mpunlearn.storage import Place

if TYPE_CHECKING:
    from mpunlearn.server.perturbation import Perturbation


class Recording:
    """The server's part of a run's record.

    Args:
        state: the state's directory.
        run: the run's identifier.
        identity: file of the key that signs (default: STATE/identity.key). It is created if it does not exist.
        plan: file of the run's plan, if it has one.
    """

    def __init__(self, state: Path, run: str, identity: Path | None = None, plan: Path | None = None) -> None:
        self._state, self._plan = state, plan
        key = Identity.at(identity or state / IDENTITY)
        self._log = Log(state / FILE, key, run, key.public)

    def published(
        self,
        folders: Sequence[Place],
        number: int,
        models: Mapping[str, Place],
        perturbation: "Perturbation",
        known: Sequence[Mapping[str, str]],
        known_models: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Records the copies of a round.

        Args:
            folders: directories of the copies, in order.
            number: the round, starting at 1.
            models: the model and, if there are any, the base and the stand-in, which are recorded in round 1 only.
            perturbation: what was done to the copies.
            known: for each copy, SHA-256 of files that was computed when they were written, by name.
            known_models: the same for each of the models, as they were read.
        """
        from mpunlearn.checkpoint import checkpoint_files

        recorded = {name: path for name, path in models.items() if number == 1 or name == "model"}
        files = {name: file_digests(checkpoint_files(path), known_models.get(name)) for name, path in recorded.items()}
        common: dict[str, Any] = {
            "round": number,
            "copies": len(folders),
            "software": _software(),
            "commitments": self._commit(perturbation).roots(),
            **{name: artifact_digest(listed) for name, listed in files.items()},
        }
        if self._plan is not None:
            plan = read_json(self._plan)
            common["plan"] = stringified({"rounds": plan["rounds"], "training": plan["training"]})
        for copy, folder in enumerate(folders, start=1):
            materials = {name: [asdict(file) for file in listed] for name, listed in files.items()}
            first = {"materials": materials} if copy == number == 1 else {}
            self._log.attest("published", folder, {**common, **first, "copy": copy}, known=known[copy - 1])

    def aggregated(
        self,
        out: Place,
        number: int,
        updates: Sequence[tuple[int, Place]],
        known: Mapping[Place, Mapping[str, str]],
    ) -> None:
        """Records the result of a round.

        Args:
            out: directory of the result.
            number: the round.
            updates: for each update that a client sent, the number of its copy and its directory.
            known: for each directory, SHA-256 of files that was computed when they were read or written, by name.

        Raises:
            UpdateError: an update is not what its client signed.
        """
        events, used = [], []
        for copy, path in updates:
            files = file_digests(artifact_files(path), known.get(path))
            event = self._signed(path, number, copy, files)
            client = {"client": event.event.signer} if event is not None else {}
            used.append({"copy": copy, "digest": artifact_digest(files), **client})
            events += [event] if event is not None else []
        self._log.attest("aggregated", out, {"round": number, "updates": used}, events, known.get(out))

    def _signed(self, update: Place, number: int, copy: int, files: Sequence[FileDigest]) -> SignedEvent | None:
        """The event that a client signed with its update, if it did. A copy that was trained in place has the server's."""
        try:
            path = update / artifacts.EVENT_FILE
            listed = [(file.name, file.sha256) for file in files]
            event = event_of(update, listed) if path.is_file() and read_event(path).event.kind == "updated" else None
        except RecordError as error:
            raise UpdateError(f"{update}: not what the client signed: {error}; ask for the update again") from error
        published = [
            one.id
            for one in self._log.bundle.of_kind("published")
            if (one.event.content.get("round"), one.event.content.get("copy")) == (number, copy)
        ]
        if event is not None and not (
            belongs(event, self._log.run, number, copy) and event.event.after == published[-1:]
        ):
            raise UpdateError(
                f"{update}: {artifacts.EVENT_FILE} is not about copy {copy} of round {number} of this run; remove that file "
                "if the client did not sign this update"
            )
        return event

    def _commit(self, perturbation: "Perturbation") -> commitments.Commitments:
        settings = commitments.text_digest(canonical(stringified(perturbation.to_json())).decode())
        sets = {"perturbation": [settings]}
        if self._plan is not None:
            sets = {commitments.PLAN: commitments.plan_set(self._plan)}
        path = self._state / commitments.FILE
        return commitments.Commitments.pinned(path, sets)


def belongs(event: SignedEvent, run: str, number: int, copy: int) -> bool:
    """Whether an event is about the update of a copy of a round of a run."""
    content = event.event.content
    found = (event.event.kind, event.event.run, content.get("round"), content.get("copy"))
    return found == ("updated", run, number, copy)


def _software() -> dict[str, str]:
    """Versions of what computed."""
    import torch

    from mpunlearn.version import __version__

    return {"mpunlearn": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
