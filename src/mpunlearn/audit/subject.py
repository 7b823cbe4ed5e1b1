"""What is audited: the server's model and the copies that were published from it, by round.

Copies are given one by one, or found in a run's directory. A run deletes each copy once its update exists, so the run
has to keep them (`--keep-exchange`), or still be in the round. The server's state, if there is one, adds the control:
a known key must give everything away.

Not covered: the model of later rounds, which a run replaces. Everything is compared with the model that the first of
the given rounds was published from, from which later models differ only by what was unlearned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import PlanError, StateError
from mpunlearn.protocol.exchange import Card
from mpunlearn.server.plan import RunPlan
from mpunlearn.server.state import RoundRecord, ServerState


@dataclass(frozen=True)
class Subject:
    """The model and the copies of an audit."""

    model: Path
    copies: dict[int, list[Path]]
    """Round → its copies. Copies without a card count as round 1."""
    base: Path | None = None
    state: ServerState | None = None

    @property
    def record(self) -> RoundRecord | None:
        """The record of the first audited round, if the server's state is known."""
        return self.state.rounds[min(self.copies) - 1] if self.state else None


def of_paths(model: Path, copies: Sequence[Path], base: Path | None) -> Subject:
    """An audit of copies that are given one by one.

    Raises:
        PlanError: no copy is given, a copy is given twice, or they are from several runs.
        CheckpointError: a copy cannot be read.
    """
    if not copies:
        raise PlanError("--copies: expected at least one copy, found none")
    if len({path.resolve() for path in copies}) < len(copies):
        raise PlanError("--copies: a copy is given twice; give each copy of a round once")
    by_round: dict[int, list[Path]] = {}
    runs = set()
    for path in copies:
        card = Card.of(Checkpoint(path).config)
        runs.add(card.run if card else None)
        by_round.setdefault(card.round if card else 1, []).append(path)
    if len(runs) > 1:
        raise PlanError("--copies: from several runs; audit the copies of one run at a time")
    return Subject(model, dict(sorted(by_round.items())), base)


def of_run(run: Path) -> Subject:
    """An audit of a run, in one process or over a network, by its directory.

    Raises:
        StateError: there is no run, or its copies are gone.
        FileError: its plan or its state cannot be read.
    """
    server = run / "server" if (run / "server" / "plan.json").is_file() else run
    plan = RunPlan.read(server / "plan.json")
    state = ServerState(server / "state")
    copies: dict[int, list[Path]] = {}
    for record in state.rounds:
        folder = run / "exchange" / f"round-{record.round}" / "copies"
        if found := [path for path in sorted(folder.glob("copy-*")) if (path / "config.json").is_file()]:
            copies[record.round] = found
    if not copies:
        raise StateError(
            f"{run}: none of the published copies is in {run / 'exchange'}; a run deletes each once its update exists, so "
            "repeat it with --keep-exchange, or give the copies with --model and --copies"
        )
    first = min(copies)
    model = Path(plan.checkpoint) if first == 1 else server / f"round-{first - 1}"
    if not model.is_dir():
        raise StateError(
            f"{run}: the model that round {first} was published from is gone ({model}); give the model and the copies with "
            "--model and --copies, or repeat the run with --keep-exchange"
        )
    return Subject(model, copies, Path(plan.base) if plan.base is not None else None, state)
