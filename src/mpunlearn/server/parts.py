"""The copies of a round, written by several invocations of `preprocess` on machines that share a folder or a store.

Each invocation with --shard I/N writes its share of the shards; which one a machine gets does not matter, and writing a
shard twice changes nothing. The first that comes measures the model and opens the round, while the others wait for it. The
copies appear when all shards are there and --finish is called. Until then, they are in

    .OUT.shards/           beside OUT, on a disk; in a store, the files are in OUT, without their manifests
      copy-1 … copy-m      the shards
      .shards/job.json     what all invocations have in common
      .shards/00001.json   one per shard that is complete: its digests, and how much of its noise survived rounding
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import FileError, PlanError, StateError
from mpunlearn.files import appear, exclusive, json_bytes
from mpunlearn.schema import read
from mpunlearn.server.copies import Copies, WrittenShard
from mpunlearn.server.publication import Digests, Publication
from mpunlearn.server.state import RoundingLeakage, RoundRecord, ServerState, locked
from mpunlearn.storage import Place, StorePath, size_of, write_bytes

FOLDER = ".shards"


@dataclass(frozen=True)
class _Job:
    """The content of job.json."""

    inputs: str
    """The digest of the inputs of the open round."""
    options: dict[str, Any]
    """What all invocations must be given alike."""
    models: Digests
    """SHA-256 of the files of the models, by name."""
    format: int = 1


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of --shard I/N.

    Raises:
        PlanError: it has another form, or I is not from 1 to N.
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 0 < int(first) <= int(second)):
        raise PlanError(f"--shard: expected I/N, such as 1/8, with I from 1 to N; found {text!r:.40}")
    return int(first), int(second)


def write_part(publication: Publication, shard: str) -> tuple[RoundRecord, list[int], int]:
    """Writes the shards of one invocation that are not there yet.

    Args:
        publication: the publication.
        shard: I/N, which share of the shards.

    Returns:
        The record of the round, the numbers of the shards of this invocation, starting at 1, and the number of all.

    Raises:
        StateError: the round is open with other inputs.
        FileError: the copies are there already.
    """
    part, parts = parse_shard(shard)
    pending = _pending(publication.out)
    with _opening(publication):
        if not (pending / FOLDER / "job.json").is_file() and publication.out.exists():
            raise FileError(f"{publication.out}: already exists; choose another directory for the copies, or remove it")
        server = ServerState(publication.state)
        record, _ = _open(publication, server, pending)
    copies = publication.copies(server, record, pending)
    numbers = list(range(part - 1, len(copies.shards), parts))
    try:
        for number in numbers:
            if _result(copies, number) is None:
                done = copies.write(number)
                write_bytes(_file(copies.folder, number), json_bytes(dataclasses.asdict(done)))
    except OSError as error:
        raise FileError(
            f"{pending}: cannot be written: {error.strerror or error}; fix this and repeat the command"
        ) from error
    return record, [number + 1 for number in numbers], len(copies.shards)


def finish_parts(publication: Publication) -> tuple[RoundRecord, dict[str, RoundingLeakage]]:
    """Makes the copies appear, once all shards are there.

    Raises:
        FileError: a shard is missing.
        StateError: the round is open with other inputs.
    """
    pending = _pending(publication.out)
    with _opening(publication):
        if not (pending / FOLDER / "job.json").is_file():
            raise FileError(f"{publication.out}: no shard was written yet; run `preprocess --shard I/N` first")
        server = ServerState(publication.state)
        record, models = _open(publication, server, pending)
        copies = publication.copies(server, record, pending)
        written = [_result(copies, number) for number in range(len(copies.shards))]
        complete = [one for one in written if one is not None]
        if len(complete) < len(written):
            missing = [str(number) for number, one in enumerate(written, start=1) if one is None]
            raise FileError(
                f"{publication.out}: {len(missing)} of {len(written)} shards are missing ({', '.join(missing[:10])}); run "
                "`preprocess --shard I/N` again for every I that failed, then --finish"
            )
        rounding = publication.finish(server, copies, complete, models)
        if isinstance(pending, Path) and isinstance(publication.out, Path):
            appear(pending, publication.out)
            shutil.rmtree(publication.out / FOLDER)
        elif isinstance(pending, StorePath):
            for name in (pending / FOLDER).below():
                (pending / FOLDER / name).unlink()
        server.measured(rounding)
    return record, rounding


@contextmanager
def _opening(publication: Publication) -> Iterator[None]:
    """Waits until no other invocation opens or finishes the round."""
    state = publication.state
    with exclusive(state.parent / f".{state.name}.lock"), locked(state):
        yield


def _open(publication: Publication, server: ServerState, pending: Place) -> tuple[RoundRecord, Digests]:
    """Opens the round, or finds it open; returns its record and the digests of the models."""
    path, options = pending / FOLDER / "job.json", _options(publication)
    if path.is_file():
        job, record = read(_Job, path), server.open_round
        if changed := sorted(name for name in options if job.options.get(name) != options[name]):
            raise StateError(
                f"{pending}: was begun with {changed[0].replace('_', '-')} {job.options.get(changed[0])}, found "
                f"{options[changed[0]]}; use the same options for all shards, or remove that directory"
            )
        if record is None or record.inputs != job.inputs:
            raise StateError(f"{pending}: belongs to another round than {server.path}; remove that directory")
        return record, job.models
    record, models = publication.open(server)
    record = server.begin(record)
    if isinstance(pending, Path):
        (pending / FOLDER).mkdir(parents=True)
    write_bytes(path, json_bytes(dataclasses.asdict(_Job(record.inputs, options, models))))
    return record, models


def _options(publication: Publication) -> dict[str, Any]:
    """What all invocations must be given alike."""
    places = ("checkpoint", "base", "stand_in", "lineage")
    given = {name: getattr(publication, name) for name in places}
    return {
        **{name: str(place.resolve()) if place is not None else None for name, place in given.items()},
        "perturbation": publication.perturbation.to_json(),
        "max_shard_size": publication.max_shard_bytes / 1e9,
    }


def _pending(out: Place) -> Place:
    return out if isinstance(out, StorePath) else out.parent / f".{out.name}.shards"


def _file(pending: Place, number: int) -> Place:
    return pending / FOLDER / f"{number + 1:05d}.json"


def _result(copies: Copies, number: int) -> WrittenShard | None:
    """What is known of a shard that is complete; None if it is not."""
    file, shard = _file(copies.folder, number), copies.shards[number]
    if not file.is_file():
        return None
    places = [folder / shard.file for folder in copies.folders]
    complete = all(place.is_file() and size_of(place) == shard.size for place in places)
    return read(WrittenShard, file) if complete else None
