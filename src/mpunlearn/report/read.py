"""Reads what a report shows from the JSON files of a run.

    SERVER/plan.json                               the server's plan
    SERVER/audit.json                              an audit of the copies, as `audit --out` writes it
    CLIENT/plan.json, CLIENT/run.json              digests of the client's data; a run over a network that it takes part in
    CLIENT/memory/losses.jsonl                     the losses of its training
    CLIENT/audit.json, CLIENT/audit/round-R.json   an audit of the updates, as `client audit --json` prints it
    CLIENT/answers.json                            sample answers before and after
    RUN/evaluations/LABEL.json, LABEL@ROUND.json   evaluations, as `evaluate --out` writes them; see `data` for labels

SERVER and CLIENT are RUN/server and RUN/client where both parties are on one machine, and RUN itself where there is only
one, as with a run over a network. Fields that are not shown are ignored, so that files of any version can be read.

Not covered: the server's secret state, which is never opened, checkpoints, and data sets.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mpunlearn.errors import PlanError, SchemaError, StateError
from mpunlearn.files import MAX_JSON_BYTES, read_json
from mpunlearn.report.data import (
    RETRAINED,
    THIS_RUN,
    Answer,
    AttackScore,
    BehaviorScore,
    ClientSide,
    Evaluation,
    Losses,
    ModelAudit,
    PerturbationPlan,
    PublicPlan,
    Separation,
    ServerSide,
    SpellingLeak,
    TextAudit,
    TokenLeak,
    TrainingPlan,
)
from mpunlearn.schema import parse

_NAME = re.compile(r"(?P<label>.+?)(?:@(?P<round>\d{1,6}))?", re.DOTALL)
T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Files that the user names in addition to those that are found."""

    evaluations: Sequence[str | Path] = ()
    """FILE or LABEL=FILE."""
    audit: Path | None = None
    client_audit: Path | None = None
    answers: Path | None = None


def read_run(run: Path, sources: Sources) -> tuple[ServerSide | None, ClientSide | None]:
    """Reads the sides of a run that a directory has.

    Raises:
        StateError: it has neither side.
        PlanError: an evaluation has no label.
        FileError: a file cannot be read.
        SchemaError: a file does not have the expected content.
    """
    server = next((folder for folder in (run / "server", run) if "rounds" in _content(folder / "plan.json")), None)
    client = next((folder for folder in (run / "client", run) if _is_client(folder)), None)
    if server is None and client is None:
        raise StateError(
            f"{run}: contains no run, neither a server's plan.json nor a client's run.json; give the directory of a run, or "
            "the --work of a client"
        )
    for option, value, side in (
        ("--audit", sources.audit, server),
        ("--client-audit", sources.client_audit, client),
        ("--answers", sources.answers, client),
    ):
        if value is not None and side is None:
            party = "the server's" if option == "--audit" else "the client's"
            raise PlanError(
                f"{option} {value}: is for {party} page, but {run} has no files of that party; leave it out"
            )
    evaluations = _evaluations(run, sources.evaluations)
    one = None if server is None else _server(run, server, evaluations, sources.audit)
    return one, None if client is None else _client(client, one, evaluations, sources)


def _is_client(folder: Path) -> bool:
    return "training" in _content(folder / "run.json") or "forget" in _content(folder / "plan.json")


def _server(run: Path, folder: Path, evaluations: list[Evaluation], audit: Path | None) -> ServerSide:
    file = folder / "plan.json"
    value = {**_content(file), **_content(folder / "extended.json")}  # the latter has the rounds of a run that went on
    perturbation = _picked(PerturbationPlan, value.get("perturbation"), file)
    service = value.get("service") or value  # at the top level in the first format
    federation = service.get("federation") if isinstance(service, dict) else None
    clients = federation.get("clients", 1) if isinstance(federation, dict) else 1
    return ServerSide(
        plan=_plan(value, perturbation.copies, file),
        perturbation=perturbation,
        model=Path(str(value.get("checkpoint", ""))).name,
        finished=any((place / "final").is_dir() for place in (run, folder)),
        eta=_number(value.get("eta", 1.0), file),
        base=value.get("base") is not None,
        stand_in=value.get("stand_in") is not None,
        network="host" in value or value.get("service") is not None,
        clients=int(_number(clients, file)),
        evaluations=evaluations,
        audit=_model_audit(audit or folder / "audit.json", required=audit is not None),
    )


def _client(folder: Path, server: ServerSide | None, evaluations: list[Evaluation], sources: Sources) -> ClientSide:
    file, data = folder / "run.json", _content(folder / "plan.json")
    joined = _content(file)
    rounds = [path for path in (folder / "audit").glob("round-*.json") if path.stem[6:].isdigit()]
    latest = max(rounds, key=lambda path: int(path.stem[6:]), default=folder / "audit.json")
    plan = _plan(joined, joined.get("copies"), file) if joined else server.plan if server else None
    losses = _losses(folder / "memory" / "losses.jsonl")
    return ClientSide(
        plan=plan,
        digests={name: digest for name, digest in data.items() if isinstance(digest, str) and "forget" in data},
        network=bool(joined),
        finished=server.finished if server else not losses or not plan or losses[-1].round >= plan.rounds,
        evaluations=evaluations,
        losses=losses,
        audit=_text_audit(sources.client_audit or latest, required=sources.client_audit is not None),
        answers=_answers(sources.answers or folder / "answers.json", required=sources.answers is not None),
    )


def _plan(value: Mapping[str, Any], copies: Any, file: Path) -> PublicPlan:
    training = _picked(TrainingPlan, value.get("training"), file)
    return _picked(PublicPlan, {"rounds": value.get("rounds"), "copies": copies, "training": training}, file)


def _evaluations(run: Path, named: Sequence[str | Path]) -> list[Evaluation]:
    """The evaluations in RUN/evaluations, and those that the user named, which replace others of the same name."""
    files = {path.stem: path for path in sorted((run / "evaluations").glob("*.json"))}
    for text in map(str, named):
        label, separator, file = text.partition("=") if not Path(text).exists() else ("", "", "")
        if separator and not label:
            raise PlanError(f"--evaluation {text}: expected FILE or LABEL=FILE, found no label before the =")
        files[label if separator else THIS_RUN] = Path(file if separator else text)
    found: list[Evaluation] = []
    retrained: list[Evaluation] = []
    for name, path in files.items():
        value = read_json(path)
        match = _NAME.fullmatch(name)
        if match is None or not isinstance(value.get("metrics"), dict):
            raise SchemaError(
                f"{path}: expected an evaluation, as `mpunlearn evaluate --out` writes it; it has no metrics"
            )
        number = None if match["round"] is None else int(match["round"])
        found.append(_evaluation(match["label"], value["metrics"], value, number, path))
        if value.get("retrained") is not None:
            retrained.append(_evaluation(RETRAINED, value["retrained"], value, None, path))
    named_so = any(item.label == RETRAINED for item in found)
    return found if named_so else [*found, *retrained[:1]]


def _evaluation(label: str, metrics: Any, value: Mapping[str, Any], number: int | None, path: Path) -> Evaluation:
    """One model's metrics, without those that are null, as of a model that diverged."""
    numbers = {name: _number(item, path) for name, item in _mapping(metrics, path).items() if item is not None}
    sets = value.get("per_example")
    forget = sets.get("forget") if isinstance(sets, dict) else None
    lists = [item for item in forget.values() if isinstance(item, list)] if isinstance(forget, dict) else []
    return Evaluation(label, numbers, number, len(lists[0]) if lists else None)


def _model_audit(path: Path, required: bool) -> ModelAudit | None:
    if not required and not path.is_file():
        return None
    value = read_json(path)
    if "attacks" not in value:
        raise SchemaError(f"{path}: expected an audit, as `mpunlearn audit --out` writes it; it has no attacks")
    parts = {name: _each(AttackScore, value.get(name, {}), path) for name in ("attacks", "baselines")}
    if not parts["attacks"]:
        raise SchemaError(f"{path}: expected at least one attack, found none")
    return _picked(
        ModelAudit, {**value, **parts, "behaviors": _each(BehaviorScore, value.get("behaviors"), path)}, path
    )


def _text_audit(path: Path, required: bool) -> TextAudit | None:
    if not required and not path.is_file():
        return None
    value = read_json(path)
    if "separations" not in value:
        raise SchemaError(
            f"{path}: expected an audit, as `mpunlearn client audit --json` prints it; it has no separations"
        )
    separations = {
        score: _each(Separation, groups, path) for score, groups in _mapping(value["separations"], path).items()
    }
    layers = value.get("spelling")
    spelling = [_picked(SpellingLeak, layer, path) for layer in layers] if isinstance(layers, list) else []
    tokens = _each(TokenLeak, value.get("tokens"), path)
    return _picked(TextAudit, {**value, "separations": separations, "tokens": tokens, "spelling": spelling}, path)


def _answers(path: Path, required: bool) -> list[Answer]:
    if not required and not path.is_file():
        return []
    value = read_json(path).get("answers")
    if not isinstance(value, list):
        raise SchemaError(f"{path}: expected sample answers in a field 'answers', found {value!r:.60}")
    return [_picked(Answer, item, path) for item in value]


def _losses(path: Path) -> list[Losses]:
    """The losses of the client's trainings; of a repeated training, those of the last time."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return []
    found: dict[tuple[int, int], Losses] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = _picked(Losses, json.loads(line), path)
        except (ValueError, SchemaError):  # a line that a killed process cut off, or of a version without probabilities
            continue
        found[entry.round, entry.copy] = entry
    return [found[key] for key in sorted(found)]


def _each(kind: type[T], value: Any, path: Path) -> dict[str, T]:
    return {name: _picked(kind, item, path) for name, item in _mapping(value or {}, path).items()}


def _picked(kind: type[T], value: Any, path: Path) -> T:
    """Builds a dataclass from those fields of a JSON object that it has."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    try:
        return parse(kind, {name: item for name, item in _mapping(value, path).items() if name in names})
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SchemaError(f"{path}: expected an object, found {value!r:.60}")
    return value


def _number(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SchemaError(f"{path}: expected a finite number, found {value!r:.60}")
    return float(value)


def _content(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}
