"""Both parties in one process, apart on disk, and resumable.

    RUN/server/      the server's alone: plan, secret state, θ between rounds
    RUN/client/      the client's alone: its memory of the round-1 copies
    RUN/exchange/    what crosses between them: round-1/copies/copy-1 …, round-1/updates/copy-1 …
    RUN/final/       the unlearned checkpoint

The journal is the tree itself: every directory appears by one rename when it is whole, and a round is closed in the server's
state after its result has its name. So a run killed anywhere goes on with what is missing, and ends with the same bytes,
since secrets come from the state and training is a function of the plan. Between rounds θ is kept in float32.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import read_json, write_json
from mpunlearn.client.unlearn import resolve, unlearn
from mpunlearn.errors import DataError, PlanError
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation, ServerState, postprocess, preprocess


def run(
    checkpoint: str | Path,
    *,
    forget: str | Path,
    out: str | Path,
    retain: str | Path | None = None,
    base: str | Path | None = None,
    rounds: int = 5,
    eta: float = 1.0,
    keep_exchange: bool = False,
    perturbation: Perturbation | None = None,
    training: Training | None = None,
) -> Path:
    """Unlearns under MPU: `rounds` times preprocess, unlearn on every copy, and postprocess.

    Args:
        checkpoint: the server's model, a checkpoint directory.
        forget: JSON lines to forget.
        out: the run's directory. If it holds an unfinished run with the same arguments, that run goes on.
        retain: JSON lines to keep; objectives with a retain term need them.
        base: the public checkpoint that the model was trained from; the noise is then relative to the task vector.
        rounds: number R of rounds.
        eta: server step size η.
        keep_exchange: keep every round's copies and updates instead of deleting them when the round is closed.
        perturbation: number of copies, noise level, reparameterisation.
        training: objective and hyper-parameters.

    Returns:
        The unlearned checkpoint, OUT/final.

    Raises:
        PlanError: `out` holds a run with other arguments, or an option has an impossible value.
        MPUError: as `preprocess`, `unlearn` and `postprocess` do.
    """
    out = Path(out)
    perturbation, training = perturbation or Perturbation(), training or Training()
    if rounds < 1:
        raise PlanError(f"--rounds: expected at least 1, found {rounds}")
    resolve(training)
    plan = {
        "checkpoint": str(Path(checkpoint).resolve()),
        "base": str(Path(base).resolve()) if base is not None else None,
        "forget": _file_digest(forget),
        "retain": _file_digest(retain) if retain is not None else None,
        "rounds": rounds,
        "eta": eta,
        "perturbation": dataclasses.asdict(perturbation),
        "training": dataclasses.asdict(training),
    }
    server, exchange, final = out / "server", out / "exchange", out / "final"
    _pin(server / "plan.json", plan)
    state = server / "state"

    def theta(number: int) -> Path:
        """The model after round `number`; 0 is the model that was given."""
        return Path(checkpoint) if number == 0 else final if number == rounds else server / f"round-{number}"

    for number in progress(range(1, rounds + 1), "rounds"):
        folder = exchange / f"round-{number}"
        if not _closed(state, number):
            shutil.rmtree(theta(number), ignore_errors=True)
            if not (folder / "copies").exists():
                preprocess(theta(number - 1), state=state, out=folder / "copies", base=base, perturbation=perturbation)
            updates = []
            for copy in progress(range(1, perturbation.copies + 1), f"round {number} of {rounds}: copies"):
                updates.append(folder / "updates" / f"copy-{copy}")
                if not updates[-1].exists():
                    unlearn(
                        folder / "copies" / f"copy-{copy}",
                        forget=forget,
                        retain=retain,
                        out=updates[-1],
                        memory=out / "client" / "memory",
                        training=training,
                    )
            postprocess(
                updates,
                state=state,
                out=theta(number),
                eta=eta,
                checkpoint=theta(number - 1),
                dtype=None if number == rounds else "float32",
            )
        if not keep_exchange:
            shutil.rmtree(folder, ignore_errors=True)
        if number > 1:
            shutil.rmtree(theta(number - 1), ignore_errors=True)
    return final


def _closed(state: Path, number: int) -> bool:
    return state.exists() and any(record.closed for record in ServerState(state).rounds[number - 1 : number])


def _pin(path: Path, plan: dict[str, Any]) -> None:
    """Writes the plan of a new run, or checks that an old one is the same."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, plan, mode=0o600)
        return
    pinned = read_json(path)
    if changed := [key for key, value in plan.items() if pinned.get(key) != _as_json(value)]:
        raise PlanError(
            f"{path.parent.parent}: holds a run with another {' and '.join(changed)}; give the same arguments to go on with "
            "it, or another --out"
        )


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _file_digest(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
