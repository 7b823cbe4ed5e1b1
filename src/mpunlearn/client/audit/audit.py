"""The command `client audit`: what updates would tell the server, before they are sent.

    mpunlearn client audit updates/* --copy copies/* --forget forget.jsonl --reference known.jsonl --require "spelling<0.1"

`scores` and `pooling` do the work and are imported only when it starts, so that the command line can show its help
without loading torch. Not covered: what the server could plant in a copy to make the training reveal more.
"""

from collections.abc import Sequence
from pathlib import Path

from mpunlearn.client.audit.report import NEEDS, ClientAudit, check_measured
from mpunlearn.errors import AuditError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.progress import progress
from mpunlearn.requirements import parse_requirements, violated


def audit(
    updates: Sequence[str | Path],
    *,
    copy: Sequence[str | Path],
    forget: str | Path,
    retain: str | Path | None = None,
    reference: str | Path | None = None,
    near: str | Path | None = None,
    decoys: str | Path | None = None,
    require: str | None = None,
    max_length: int = 512,
    data: Data | None = None,
) -> ClientAudit:
    """Measures what the updates of a round would tell the server about the forget set.

    It attacks the updates as the server could, and compares the forget set with other texts that the model knows. The
    report keeps apart what any model that forgot these texts gives away, and what the updates add. It does not need the
    server's model.

    Args:
        updates: The updates of the copies of one round, or the checkpoints that were trained from them.
        copy: The published copies, one for each update.
        forget: The forget set, as for `unlearn`.
        retain: The retain set.
        reference: Texts of the same kind that the model knows and that were not trained on.
        near: Texts on the same subjects as the forget set that were not trained on, such as other questions about the
            same person.
        decoys: The decoys that were unlearned along with the forget set.
        require: Limits on metrics, separated by commas, such as membership-auc<0.7. If one is not met, the exit code
            is 3.
        max_length: Maximum number of tokens in a text, as in training.
        data: How to read the texts.

    Returns:
        The report.

    Raises:
        AuditError: A requirement is not met. The error has the report.
        PlanError: An option has an invalid value, or a requirement needs texts that are not given.
        MPUError: The updates, the copies or the texts cannot be read, or do not belong together.
    """
    needs("client", "client audit")
    from mpunlearn.client.audit.pooling import pooled
    from mpunlearn.client.audit.scores import Auditor

    requirements = parse_requirements(require, NEEDS) if require is not None else []
    if max_length < 1:
        raise PlanError(f"--max-length: expected at least 1, found {max_length}")
    sources = {"forget": forget, "retain": retain, "reference": reference, "near": near, "decoys": decoys}
    check_measured(requirements, [name for name, source in sources.items() if source is not None])
    pairs = _pairs([as_path(path, "updates") for path in updates], [as_path(path, "--copy") for path in copy])
    auditor = Auditor(sources, data)
    scores = [auditor.measure(published, update, max_length) for published, update in progress(pairs, "auditing")]
    report = pooled(scores)
    values = report.metrics()
    if failed := violated(requirements, values):
        found = ", ".join(f"{requirement.name} is {values[requirement.name]:.3f}" for requirement in failed)
        raise AuditError(f"--require {','.join(map(str, failed))}: not met: {found}; do not send these updates", report)
    return report


def _pairs(updates: Sequence[Path], copies: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pairs each update with its copy: by their cards, or in the given order if the copies have none.

    Raises:
        PlanError: there is not one copy for each update.
    """
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.protocol.exchange import Card, ReceivedUpdate

    if not updates or len(updates) != len(copies):
        raise PlanError(f"--copy: expected one copy for each of the {len(updates)} updates, found {len(copies)}")
    cards = [Card.of(Checkpoint(path).config) for path in copies]
    if not any(cards):
        return list(zip(copies, updates, strict=True))
    by_card = dict(zip(cards, copies, strict=True))
    pairs = [(by_card.pop(ReceivedUpdate.open(update).card, None), update) for update in updates]
    if missing := [update for published, update in pairs if published is None]:
        raise PlanError(f"--copy: none of the copies belongs to the update {missing[0]}; give each update its own copy")
    return [(published, update) for published, update in pairs if published is not None]
