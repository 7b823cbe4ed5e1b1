"""Audit: attacks published copies, and measures how close each attack comes to the server's model.

The idea: what a copy hides is not what its noise level says, but what the best attack leaves. So the server attacks its
own copies with what a client has, and scores each result against θ, which only the server has. Attacks are functions
(`audit.attacks`), and their arguments are all that they see; `assess` applies them.

All models are held in memory in float32. Not covered: models that do not fit, and the client's text. What no attack
found here may still be found by a better one.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.audit.floor import Floors, read_floors
from mpunlearn.audit.report import LIMITS, PREDICTIONS, Audit
from mpunlearn.errors import AuditError, FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, write_json
from mpunlearn.lm.sources import Data
from mpunlearn.requirements import parse_requirements, violated

if TYPE_CHECKING:
    from mpunlearn.audit.subject import Subject


def audit(
    run: str | Path | None = None,
    *,
    model: str | Path | None = None,
    copies: Sequence[str | Path] = (),
    base: str | Path | None = None,
    plan: str | Path | None = None,
    floor: float | None = None,
    text: str | Path | None = None,
    public_text: str | Path | None = None,
    repair_epochs: int = 3,
    repair_rate: float = 1e-4,
    max_length: int = 512,
    require: str | None = None,
    out: str | Path | None = None,
    data: Data | None = None,
) -> Audit | Floors:
    """Attacks published copies with what a client has, and compares the results with the server's model.

    Audits a run by its directory, if its copies are still there (--keep-exchange), or --copies of a --model. With --plan
    instead, prints the error that should remain for every number of copies that a client holds; that needs no model.

    Args:
        run: The directory of a run, in one process or over a network.
        model: The server's model, a Hugging Face checkpoint directory, which the copies were published from.
        copies: The published copies that the attacker holds, of one or several rounds.
        base: The public checkpoint that the model was fine-tuned from, which the attacker has, too.
        plan: YAML file with the options of a run, as --print-config writes it.
        floor: The relative parameter error that should remain, such as 0.1 (default: that of the run's common noise).
            The audit then says whether it does.
        text: Text that the server's model knows. The predictions of copies and attacks on it are compared.
        public_text: Text that the attacker has. It repairs a copy by training it on that.
        repair_epochs: Passes over the public text.
        repair_rate: Learning rate of the repair.
        max_length: Maximum number of tokens in a text.
        require: Limits, separated by commas, such as parameter-error>0.05,equal-bfloat16<0.2. If some attack violates
            one, the exit code is 3.
        out: A new file for the result as JSON.
        data: Columns and locations of the texts.

    Returns:
        The error that each attack leaves, and the share of weights that it restores exactly; with --plan, the errors
        that should remain.

    Raises:
        AuditError: A requirement is not met. The error has the result.
        CheckpointError: A checkpoint cannot be read.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        StateError: The run's copies are gone.
        PlanError: The checkpoints are not of one architecture, or an option has an invalid value.
    """
    if floor is not None and not (0 <= floor < math.inf):
        raise PlanError(f"--floor: expected a number of at least 0, found {floor:g}")
    for option, value in (("repair-epochs", repair_epochs), ("repair-rate", repair_rate), ("max-length", max_length)):
        if not 0 < value < math.inf:
            raise PlanError(f"--{option}: expected a number above 0, found {value:g}")
    requirements = parse_requirements(require, LIMITS) if require is not None else []
    target = as_path(out, "--out") if out is not None else None
    if target is not None and target.exists():
        raise FileError(f"--out {target}: already exists; name another file, or remove this one")
    if plan is not None:
        if run is not None or model is not None or copies or requirements:
            raise PlanError("--plan: needs no run; leave out RUN, --model, --copies and --require")
        floors = read_floors(as_path(plan, "--plan"))
        _write(target, floors)
        return floors
    if public_text is not None and text is None:
        raise PlanError("--public-text: what a repaired copy can do is measured on --text; give that, too")
    needs("audit", "audit")
    if text is not None:
        needs("client", "--text")
    subject = _subject(run, model, copies, base)

    missing = [limit for limit in requirements if (limit.name == "task-error" and subject.base is None)]
    missing += [limit for limit in requirements if limit.name in PREDICTIONS and text is None]
    if missing:
        raise PlanError(
            f"--require {','.join(map(str, missing))}: needs --base for task-error, and --text for predictions"
        )

    from mpunlearn.audit.assess import Texts, assess
    from mpunlearn.protocol.record.log import append_result

    texts = None
    if text is not None:
        known = as_path(public_text, "--public-text") if public_text is not None else None
        texts = Texts(as_path(text, "--text"), known, repair_epochs, repair_rate, max_length, data or Data())
    result = assess(subject, texts, floor)
    _write(target, result)
    if target is not None and run is not None:
        append_result("audited", Path(run) / "final", target)
    values = result.values()
    if failed := violated(requirements, values):
        found = ", ".join(f"{limit.name} is {values[limit.name]:.3g}" for limit in failed)
        raise AuditError(f"--require {','.join(map(str, failed))}: not met: {found}", result)
    return result


def _write(target: Path | None, result: Audit | Floors) -> None:
    """Writes the result as JSON, if a file was named."""
    if target is not None:
        try:
            write_json(target, result.to_json())
        except OSError as error:
            raise FileError(
                f"--out {target}: cannot be written: {error.strerror}; fix the cause and run again"
            ) from error


def _subject(
    run: str | Path | None, model: str | Path | None, copies: Sequence[str | Path], base: str | Path | None
) -> "Subject":
    """The model and the copies that the options name."""
    from mpunlearn.audit.subject import of_paths, of_run

    public = as_path(base, "--base") if base is not None else None
    if run is not None:
        if model is not None or copies:
            raise PlanError("RUN: names a run, whose model and copies are audited; leave out --model and --copies")
        subject = of_run(as_path(run, "RUN"))
        return replace(subject, base=public) if public is not None else subject
    if model is None:
        raise PlanError("expected the directory of a RUN, --model and --copies, or --plan; found none of them")
    return of_paths(as_path(model, "--model"), [as_path(copy, "--copies") for copy in copies], public)
