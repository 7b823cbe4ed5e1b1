"""Measures one update: reads the texts once, and runs every attack on a copy with its update.

Not covered: noise on the update, which this version cannot add, so there is no ε to report.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mpunlearn.client.audit.membership import mean_nll, surplus
from mpunlearn.client.audit.report import CopyScores
from mpunlearn.client.audit.spelling import spelling
from mpunlearn.client.audit.subject import Subject
from mpunlearn.client.audit.tokens import token_scores, vocabulary
from mpunlearn.errors import DataError
from mpunlearn.files import as_path
from mpunlearn.lm.examples import encode
from mpunlearn.lm.records import read_records, records_digest
from mpunlearn.lm.sources import Data


class Auditor:
    """Measures updates that were trained on the same texts.

    Args:
        sources: "forget", "retain", "reference", "near" or "decoys" → where these texts are; those that are None are
            left out.
        data: how to read them.

    Raises:
        DataError: texts cannot be read, or there is none.
    """

    def __init__(self, sources: Mapping[str, str | Path | None], data: Data | None) -> None:
        given = {name: as_path(source, f"--{name}") for name, source in sources.items() if source is not None}
        self._records = {
            name: read_records(source, data, "retain" if name == "retain" else "forget")
            for name, source in given.items()
        }
        forgotten = {(record.question, record.answer) for record in self._records["forget"]}
        for name in self._records.keys() - {"forget"}:
            if any((record.question, record.answer) in forgotten for record in self._records[name]):
                raise DataError(f"{given[name]}: contains a text of the forget set; the {name} texts must be others")

    @property
    def given(self) -> list[str]:
        """Which texts there are."""
        return list(self._records)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the texts."""
        parts = [[name, records_digest(records)] for name, records in sorted(self._records.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def measure(self, copy: Path, update: Path, max_length: int) -> CopyScores:
        """Runs every attack on one update.

        Args:
            copy: the published copy.
            update: the update that was trained from it.
            max_length: maximum number of tokens in a text, as in training.

        Raises:
            FileError: either cannot be read.
            UpdateError: the update does not belong to the copy, or changes no linear weight of a layer.
            UnsupportedModelError: the copy is not of a supported family.
        """
        subject = Subject(copy, update)
        texts = {name: encode(records, subject.tokenizer, max_length) for name, records in self._records.items()}
        everything = [text for group in texts.values() for text in group]
        before = mean_nll(subject.model, subject.tokenizer, everything)
        ridge, cosine = surplus(subject, everything)
        forget, known = texts["forget"], texts.get("reference") or texts.get("near") or []
        trained = [*texts.get("retain", []), *texts.get("decoys", [])]
        vocabulary_size = subject.copy.tensors[subject.architecture.family.embedding].shape[0]
        names = token_scores(subject, vocabulary(vocabulary_size, forget, trained, known))
        layers = spelling(subject, forget, known)
        drop = mean_nll(subject.updated_model(), subject.tokenizer, everything) - before

        def by_group(values: list[float]) -> dict[str, list[float]]:
            remaining = iter(values)
            return {name: [next(remaining) for _ in group] for name, group in texts.items()}

        return CopyScores(
            drop=by_group(drop.tolist()),
            ridge=by_group(ridge.tolist()),
            cosine=by_group(cosine.tolist()),
            tokens={label: [used, others] for label, (used, others) in names.items()},
            spelling=layers,
            texts=self.digest,
        )
