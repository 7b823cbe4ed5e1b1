"""What is measured on each copy, and the report on all of them.

The report keeps two parts apart: *what any model that forgot these texts gives away*, which no way of training changes,
and *what the updates add*. Its values have names, so that a user or a policy can limit them. This module imports
nothing heavy, because the command line and the policy need it.

Not covered: what the server learns by combining several rounds.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpunlearn.errors import PlanError
from mpunlearn.requirements import Requirement
from mpunlearn.tables import aligned

GROUPS = {"reference": "", "near": "near-", "decoys": "decoy-"}
"""Texts that the forget set is told apart from, and what they add to the name of a metric."""
SCORES = {"floor": "likelihood drop", "membership": "ridge regression on gradients", "cosine": "cosine with gradients"}
NEEDS: dict[str, tuple[str, ...]] = {
    **{
        f"{score}-{infix}{measure}": (group,)
        for score in SCORES
        for group, infix in GROUPS.items()
        for measure in ("auc", "tpr")
    },
    "retain-auc": ("retain", "reference"),
    "tokens-auc": (),
    "tokens-precision": (),
    "spelling": (),
    "next-token-tpr": (),
}
"""Metric → the texts that it needs besides the forget set."""


@dataclass(frozen=True)
class LayerSpelling:
    """What the weights of one layer with the same input give away, token by token."""

    label: str
    rank: int
    """Rank of their update."""
    dimensions: int
    """Dimensions of their input."""
    exact: float
    """Share of positions within the row space, beyond that of wrong tokens; 0 if the rank is full."""
    next_token: float
    """Share of positions told apart from wrong next tokens at 1 % false positives."""
    control: float | None
    """The same for text that was not trained on; None without known text."""


@dataclass(frozen=True)
class CopyScores:
    """What was measured on one copy. Larger scores speak for members of the forget set. Format 1."""

    drop: dict[str, list[float]]
    """"forget", "retain", "reference", "near" or "decoys" → drop in likelihood of each text, in nats per answer token."""
    ridge: dict[str, list[float]]
    """The same for the ridge coefficients of gradients."""
    cosine: dict[str, list[float]]
    """The same for the cosines of gradients."""
    tokens: dict[str, list[list[float]]]
    """Part of the update → the scores of tokens that only the forget set has, and of other tokens."""
    spelling: list[LayerSpelling]
    texts: str
    """SHA-256 (hex) of the texts."""
    format: int = 1


@dataclass(frozen=True)
class Separation:
    """How well a score tells the forget set from other texts."""

    auc: float
    """Area under the ROC curve; 0.5 is chance."""
    tpr: float
    """Share of the forget set found at 1 % false positives."""


@dataclass(frozen=True)
class TokenLeak:
    """How well a part of the update tells tokens that only the forget set has from others."""

    auc: float
    precision: float
    """Share of these tokens among as many tokens with the largest scores."""
    chance: float
    """The precision of guessing."""


@dataclass(frozen=True)
class ClientAudit:
    """What the updates of a round would tell the server."""

    updates: int
    """Number of updates that were pooled."""
    texts: dict[str, int]
    """Number of texts of each kind."""
    separations: dict[str, dict[str, Separation]]
    """"floor", "membership" or "cosine" → "reference", "near" or "decoys" → how well the forget set is told from them."""
    retain_auc: float | None
    """How well ridge regression tells the retain set from known text; None if one of them was not given."""
    tokens: dict[str, TokenLeak]
    """Part of the update → how well it names the forget set's tokens."""
    spelling: list[LayerSpelling]
    format: int = 1

    def metrics(self) -> dict[str, float]:
        """The values that requirements limit, by name; only those that were measured."""
        values: dict[str, float] = {}
        for score, groups in self.separations.items():
            for group, separation in groups.items():
                values[f"{score}-{GROUPS[group]}auc"] = separation.auc
                values[f"{score}-{GROUPS[group]}tpr"] = separation.tpr
        if self.retain_auc is not None:
            values["retain-auc"] = self.retain_auc
        values["tokens-auc"] = max((leak.auc for leak in self.tokens.values()), default=0.5)
        values["tokens-precision"] = max((leak.precision for leak in self.tokens.values()), default=0.0)
        values["spelling"] = max((layer.exact for layer in self.spelling), default=0.0)
        values["next-token-tpr"] = max((layer.next_token for layer in self.spelling), default=0.0)
        return values

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, with the metrics by name."""
        return {**dataclasses.asdict(self), "metrics": self.metrics()}

    def text(self) -> str:
        """The report as text."""
        counts = ", ".join(f"{count} {name}" for name, count in self.texts.items())
        parts = [
            f"What {self.updates} {'update' if self.updates == 1 else 'updates, pooled,'} would tell the server about the "
            f"forget set ({counts}).\nAUC 0.5 is chance, 1 is certainty; TPR is the share found at 1 % false positives.",
            "What any model that forgot these texts gives away\n" + self._separations(("floor",)),
            "What the updates add: membership\n" + self._separations(("membership", "cosine")),
            "What the updates add: tokens that only the forget set has\n" + self._tokens(),
            "What the updates add: texts, spelled out token by token\n" + self._spelling(),
        ]
        if self.retain_auc is not None:
            parts.insert(3, f"The retain set is told from known text with an AUC of {self.retain_auc:.3f}.")
        return "\n\n".join(parts)

    def _separations(self, scores: Sequence[str]) -> str:
        rows = [
            [f"  {SCORES[score]}", group, f"{separation.auc:.3f}", f"{separation.tpr:.2f}"]
            for score in scores
            for group, separation in self.separations[score].items()
        ]
        return aligned(["  score", "told from", "AUC", "TPR"], rows) if rows else "  not measured: give other texts"

    def _tokens(self) -> str:
        rows = [
            [f"  {label}", f"{leak.auc:.3f}", f"{leak.precision:.2f}", f"{leak.chance:.2f}"]
            for label, leak in self.tokens.items()
        ]
        return (
            aligned(["  weights", "AUC", "precision", "chance"], rows)
            if rows
            else "  there are none, or nothing that names them was trained"
        )

    def _spelling(self) -> str:
        rows = [
            [
                f"  {layer.label}",
                f"{layer.rank} of {layer.dimensions}",
                f"{layer.exact:.2f}",
                f"{layer.next_token:.2f}",
                "" if layer.control is None else f"{layer.control:.2f}",
            ]
            for layer in self.spelling
        ]
        header = ["  weights", "rank", "exact", "next token, TPR", "control"]
        return aligned(header, rows) if rows else "  no weights of the first layers were trained"


def check_measured(requirements: Sequence[Requirement], given: Sequence[str], option: str = "--require") -> None:
    """Checks that all texts that the requirements need are given.

    Args:
        requirements: the requirements.
        given: which of "retain", "reference", "near" and "decoys" are given.
        option: where the requirements come from, for the error message.

    Raises:
        PlanError: some are missing.
    """
    for requirement in requirements:
        if missing := [group for group in NEEDS[requirement.name] if group not in given]:
            raise PlanError(
                f"{option}: {requirement.name} needs texts to compare with; give {' and '.join(missing)} texts"
            )
