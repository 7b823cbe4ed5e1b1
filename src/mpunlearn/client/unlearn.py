"""Local unlearning: one published copy in, one update out.

    Δ'_k = A(θ_k; D_f, D_r) - θ_k        (arXiv 2602.23798, section on local unlearning)

The algorithm A is any of `OBJECTIVES`, trained by `transformers.Trainer`. Where it compares with a reference model, that is
the published copy of round 1 with the same number, never the server's model: its log-likelihoods of the examples are computed
in round 1 and kept in the client's own memory folder, and the copy itself only where an objective takes its logits. So later
rounds need no second model for NPO, DPO and AltPO.

A `Client` reads and tokenizes its examples once for all copies and rounds. An ordinary checkpoint works as well and gives a
plain, noise-free update; no server will take that for one of its copies.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.client.batches import batches
from mpunlearn.client.objectives import resolve
from mpunlearn.client.reference import ReferenceCache, TrainingFolder
from mpunlearn.client.resources import Resources
from mpunlearn.client.weights import _write, select
from mpunlearn.errors import CheckpointError, DataError, PlanError
from mpunlearn.lm.examples import Example, encode, encode_alternates, examples_digest
from mpunlearn.lm.processes import is_main
from mpunlearn.lm.records import read_records, records_digest, with_alternates
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training


def unlearn(
    copy: str | Path,
    *,
    forget: str | Path,
    out: str | Path,
    retain: str | Path | None = None,
    memory: str | Path | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> Path:
    """Unlearns on one published copy and writes the update.

    Args:
        copy: a published copy (or an ordinary checkpoint).
        forget: what to forget: a file, a folder that `datasets` saved, a benchmark such as tofu/forget10, or a data set's name.
        out: a new directory for the update.
        retain: what to keep, likewise; objectives with a retain term need it.
        memory: the client's own directory, where what the copies of round 1 said is kept. Objectives with a reference model
            need it from round 2 on.
        training: objective and hyper-parameters.
        data: columns and places of the examples.
        resources: memory, precision, checkpoints and loggers.

    Returns:
        `out`.

    Raises:
        CheckpointError: the copy cannot be read, or `out` exists or cannot be written.
        DataError: examples cannot be read, or are missing.
        PlanError: an unknown objective, or a weight selection that selects nothing.
    """
    client = Client(forget=forget, retain=retain, memory=memory, training=training, data=data, resources=resources)
    return client.unlearn(copy, out)


class Client:
    """The data owner's side of a run: examples, and what it remembers from round 1.

    Everything that can be known to be wrong before a model is loaded is checked on construction. Arguments and errors are
    those of `unlearn`.
    """

    def __init__(
        self,
        *,
        forget: str | Path,
        retain: str | Path | None = None,
        memory: str | Path | None = None,
        training: Training | None = None,
        data: Data | None = None,
        resources: Resources | None = None,
    ) -> None:
        self.training, self._resources = training or Training(), resources or Resources()
        data = data or Data()
        self.objective = resolve(self.training)
        self._memory = Path(memory) if memory is not None else None
        try:
            re.compile(self.training.train)
        except re.error as error:
            expected = "expected blocks, all or a regular expression"
            raise PlanError(f"--train: {expected}, found {self.training.train!r} ({error})") from None
        if self.objective.alpha and retain is None:
            raise DataError(
                f"--objective {self.training.objective} has a retain term: give --retain, or --alpha 0 to go without"
            )
        self._forget = read_records(forget, data, "forget")
        if self.objective.alternates:
            self._forget = with_alternates(self._forget, data, self.objective.refusals, self.training.seed)
        with_retain = retain is not None and bool(self.objective.alpha)
        self._retain = read_records(str(retain), data, "retain") if with_retain else []
        self._encoded: dict[str, _Encoded] = {}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of what is forgotten and what is kept."""
        return {"forget": records_digest(self._forget), "retain": records_digest(self._retain)}

    def unlearn(self, copy: str | Path, out: str | Path) -> Path:
        """Unlearns on one published copy and writes the update."""
        out = Path(out)
        if out.exists():
            raise CheckpointError(f"{out}: exists already; name another directory for the update, or remove this one")
        source = Checkpoint(copy)
        card = Card.of(source.config)
        from mpunlearn.client import trainer, weights
        from mpunlearn.lm import model as models

        training, objective = self.training, self.objective
        if "layer" in objective.parameters:
            weights.check_layer(source.path, int(objective.parameters["layer"]))
        encoded = self._encode(source.path)
        kept = None if self._memory is None or card is None else ReferenceCache(self._memory, card)
        recalled = self._recall(kept, card, encoded)
        model = models.load_model(source.path)
        selected = select(model, training.train)
        if training.lora_rank:
            scale = training.lora_alpha if training.lora_alpha is not None else 2.0 * training.lora_rank
            model = weights.adapt(model, training.lora_rank, scale, selected, training.seed)
        weights.shard(model)
        reference = self._reference(source.path, card, kept, model)
        if recalled is None:
            recalled = self._ask(model, encoded)
            if kept is not None and is_main():
                kept.remember(encoded.digest, recalled, source.path if objective.reference_model else None)
        round_number = card.round if card else 1
        plan = batches(
            len(encoded.forget),
            len(encoded.retain),
            batch_size=training.batch_size,
            epochs=training.epochs,
            seed=training.seed,
            round_number=round_number,
        )
        with TrainingFolder(self._fingerprint(card, encoded), kept, out) as folder:
            trainer.train(
                model,
                encoded.tokenizer,
                objective,
                training,
                self._resources,
                plan,
                replace(encoded.examples(), forget_nll=recalled["forget_nll"], alternate_nll=recalled["alternate_nll"]),
                reference=reference,
                first_epoch=(round_number - 1) * training.epochs,
                folder=folder,
            )
            _write(source, model, card, FLOAT_DTYPES[training.update_dtype], out)
        return out

    def _encode(self, path: Path) -> "_Encoded":
        """The examples as tokens; published copies of one model share a tokenizer, so this is done once."""
        files = sorted(file for file in path.iterdir() if "token" in file.name or "template" in file.name)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
        if digest not in self._encoded:
            from mpunlearn.lm import model as models

            tokenizer, length = models.load_tokenizer(path), self.training.max_length
            forget = encode(self._forget, tokenizer, length)
            retain = encode(self._retain, tokenizer, length)
            alternates = encode_alternates(self._forget, tokenizer, length) if self.objective.alternates else []
            if skip := self.objective.skip_tokens:
                forget = [example.skipping(skip) for example in forget]
                if not any(example.tokens for example in forget):
                    raise PlanError(f"--skip-tokens {skip}: no forget answer is longer")
            self._encoded[digest] = _Encoded(tokenizer, forget, retain, alternates)
        return self._encoded[digest]

    def _recall(self, kept: ReferenceCache | None, card: Card | None, encoded: "_Encoded") -> dict[str, Any] | None:
        """What the reference model said, if it is known; None in round 1.

        Raises:
            DataError: it is not known, and round 1 is over.
        """
        needed = bool(self.objective.needs & {"reference_nll"}) or self.objective.reference_model
        if not needed:
            return {"forget_nll": [], "alternate_nll": []}
        found = kept.recall(encoded.digest) if kept is not None else None
        if found is None and card is not None and card.round > 1:
            raise DataError(
                f"{self.training.objective} compares with the copy of round 1, and this is {card}: give the --memory "
                "directory that round 1 was run with"
            )
        return found

    def _ask(self, model: Any, encoded: "_Encoded") -> dict[str, Any]:
        """The reference model's log-likelihoods, where the objective takes them."""
        from mpunlearn.lm.model import nll

        size = self._resources.micro_batch_size or self.training.batch_size
        if "reference_nll" not in self.objective.needs:
            return {"forget_nll": [], "alternate_nll": []}
        flat = [example for examples in encoded.alternates for example in examples]
        values = nll(model, flat, size, encoded.tokenizer)
        starts = [sum(map(len, encoded.alternates[:n])) for n in range(len(encoded.alternates))]
        return {
            "forget_nll": nll(model, encoded.forget, size, encoded.tokenizer),
            "alternate_nll": [
                values[start : start + len(examples)]
                for start, examples in zip(starts, encoded.alternates, strict=True)
            ],
        }

    def _reference(self, path: Path, card: Card | None, kept: ReferenceCache | None, model: Any) -> Any | None:
        """The reference model, where the objective takes more than its log-likelihoods."""
        if not self.objective.reference_model:
            return None
        first = card is None or card.round == 1
        if self.training.lora_rank and first:
            return model
        from mpunlearn.client.weights import shard
        from mpunlearn.lm.model import load_model

        if not first and (kept is None or not kept.checkpoint.is_dir()):
            raise DataError(
                f"{self.training.objective} compares with the copy of round 1, which the --memory directory does not hold; "
                "restore it, or begin the run anew"
            )
        reference = load_model(path if first or kept is None else kept.checkpoint)
        shard(reference)
        return reference

    def _fingerprint(self, card: Card | None, encoded: "_Encoded") -> str:
        """Names one training exactly, so that only its own checkpoints are gone on from."""
        plain = {**asdict(self.training), "parameters": dict(self.training.parameters)}
        return hashlib.sha256(repr([card, plain, encoded.digest, examples_digest(encoded.retain)]).encode()).hexdigest()


@dataclass(frozen=True)
class _Encoded:
    """The examples under one tokenizer."""

    tokenizer: Any
    forget: list[Example]
    retain: list[Example]
    alternates: list[list[Example]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what a reference model is asked about."""
        every = [*self.forget, *(example for examples in self.alternates for example in examples)]
        return examples_digest(every)

    def examples(self) -> Any:
        from mpunlearn.client.batches import Examples

        return Examples(self.forget, self.retain, self.alternates)
