"""Audits every update before it is sent, if the policy asks for it.

Copies arrive one by one, and the server pools their updates. Therefore the scores of each copy are kept, and an update
is judged by the pool of its round so far. That an earlier update of the round is gone already cannot be helped: what
fails at copy 3 ends the run there.

    WORK/audit/round-R-copy-K.json    scores of a copy
    WORK/audit/round-R.json           the latest report on a round

Not covered: pooling over rounds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from mpunlearn.client.audit.pooling import pooled
from mpunlearn.client.audit.report import CopyScores, check_measured
from mpunlearn.client.audit.scores import Auditor
from mpunlearn.client.network.policy import AUDIT_OPTION, AuditPolicy
from mpunlearn.errors import MPUError
from mpunlearn.files import write_json
from mpunlearn.lm.sources import Data
from mpunlearn.requirements import violated
from mpunlearn.schema import read, write


class UpdateAudit:
    """Audits the updates of a run.

    Args:
        folder: WORK/audit.
        policy: the requirements, and texts to compare with.
        sources: where the forget set, the retain set and the decoys are.
        data: how to read them.
        say: reports one line to the user.

    Raises:
        PlanError: a requirement needs texts that are not given.
        DataError: texts cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        policy: AuditPolicy,
        sources: Mapping[str, str | Path | None],
        data: Data | None,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._say, self._requirements = folder, say, policy.requirements()
        self._auditor = Auditor({**sources, "reference": policy.reference, "near": policy.near}, data)
        check_measured(self._requirements, self._auditor.given, AUDIT_OPTION)

    def measured(self, name: str) -> bool:
        """Whether an update has been measured, with the same texts."""
        return self._scores(self._file(name)) is not None

    def measure(self, name: str, copy: Path, update: Path, max_length: int) -> None:
        """Measures an update and keeps its scores.

        Args:
            name: such as round-1-copy-2.
            copy: the published copy.
            update: the update that was trained from it.
            max_length: maximum number of tokens in a text, as in training.

        Raises:
            MPUError: as for `Auditor.measure`.
        """
        scores = self._auditor.measure(copy, update, max_length)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(self._file(name), scores)

    def failures(self, name: str) -> list[str]:
        """The metrics that do not meet the requirements, for the measured updates of the same round together.

        Args:
            name: an update that has been measured.
        """
        number = name.split("-copy-")[0]
        found = [self._scores(file) for file in sorted(self._folder.glob(f"{number}-copy-*.json"))]
        report = pooled([scores for scores in found if scores is not None])
        write_json(self._folder / f"{number}.json", report.to_json(), 0o600)
        values = report.metrics()
        failed = violated(self._requirements, values)
        for requirement in failed:
            self._say(
                f"{name}: {requirement.name} is {values[requirement.name]:.3f}, the policy requires {requirement}"
            )
        return [requirement.name for requirement in failed]

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _scores(self, file: Path) -> CopyScores | None:
        """The scores in a file; None if there are none for these texts."""
        try:
            scores = read(CopyScores, file)
        except MPUError:
            return None
        return scores if scores.texts == self._auditor.digest else None
