"""The client in a run: reads its examples, trains on every copy, and keeps what later rounds need from round 1.

In every round of a run, the server publishes several noisy copies of its current model, and the client trains each of
them. The config.json of a copy contains its *card*: the run, the round and the number of the copy.

Decoys are texts of the same kind that the model knows and that nobody asked to forget. They join the forget set in
training, and nothing restores them, so that the server cannot tell which of the texts the client wanted forgotten.

If an objective compares the model with a reference model, that is the copy of round 1 with the same number, never the
server's own model. In round 1, the client computes the log-likelihoods of its examples under that copy and stores them
in its memory folder. It stores the copy itself only for objectives that use its logits or hidden states. NPO, DPO and
AltPO therefore need no second model in later rounds.
"""

import hashlib
import logging
import re
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.client.alternates import Generated
from mpunlearn.client.auto_retain import AutoRetain
from mpunlearn.client.batches import Examples, MicroBatches, Pick, optimizer_steps
from mpunlearn.client.disclosure import longest_step, warn_of_names, warn_of_spelling
from mpunlearn.client.objectives import Losses
from mpunlearn.client.optimizer import check_optimizer
from mpunlearn.client.reference import ReferenceCache, ReferenceNLL, TrainingFolder
from mpunlearn.client.resources import Callback, Resources
from mpunlearn.client.sharding import fill, shard
from mpunlearn.client.trainer import History, Trainer, autocast, check_resources
from mpunlearn.client.update import write_update
from mpunlearn.client.weights import adapt, check_layer, select
from mpunlearn.errors import DataError, FileError, NothingUnlearnedWarning, PlanError
from mpunlearn.files import as_path
from mpunlearn.lm.examples import Example, encode, encode_alternates, examples_digest
from mpunlearn.lm.model import empty_model, load_model, load_tokenizer, model_device, nll, pad_id
from mpunlearn.lm.processes import compute_device, gathered, is_main, processes, rank
from mpunlearn.lm.records import Record, read_records, record_text, records_digest, with_alternates
from mpunlearn.lm.sources import Data, Source
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.record.commitments import text_digest

MIN_DROP = 0.05
"""The client warns if training lowers the probability of the forget answers by less than this fraction."""
STILL_KNOWN = 0.25
"""It does not warn if that probability, per answer token, ends up below this value."""

logger = logging.getLogger(__name__)


class Client:
    """The data owner's side of a run.

    The constructor checks everything that can be checked before a model is loaded. Arguments and errors are those of
    the function `unlearn`. `drawn` is the path whose name the files of `--retain auto` and `--alternates generate` begin
    with (default: that of the update).
    """

    def __init__(
        self,
        *,
        forget: Source,
        retain: Source | None = None,
        decoys: Source | None = None,
        memory: str | Path | None = None,
        training: Training | None = None,
        data: Data | None = None,
        resources: Resources | None = None,
        callback: Callback | None = None,
        device: str | None = None,
        drawn: Path | None = None,
    ) -> None:
        self._callback, self._device = callback, device
        if device is not None:
            model_device(device)
            if processes() > 1:
                raise PlanError("--device: several processes use the GPU of their rank; leave the option out")
        self.training, self._resources = training or Training(), resources or Resources()
        data = data or Data()
        self.losses = Losses(self.training.resolved())
        self._memory = as_path(memory, "--memory") if memory is not None else None
        try:
            re.compile(self.training.train)
        except re.error as error:
            expected = "expected blocks, all or a regular expression"
            raise PlanError(f"--train: {expected}, found {self.training.train!r} ({error})") from None
        check_resources(self.training, self._resources)
        check_optimizer(self.training)
        objective = self.losses.objective
        if objective.alpha and retain is None:
            raise DataError(
                f"--objective {self.training.objective} has a retain term; give --retain, or --alpha 0 to train without it"
            )
        self._forget = read_records(forget, data, "forget")
        self._drawn = drawn
        self._auto = AutoRetain.parse(retain, data, self.training.seed, self.training.max_length)
        given = retain if objective.alpha and self._auto is None else None
        self._retain = read_records(given, data, "retain") if given is not None else []
        self._decoys = read_records(decoys, data, "forget") if decoys is not None else []
        _check_decoys(self._decoys, self._forget, self._retain)
        self._unlearned = [*self._forget, *self._decoys]
        self._generated = Generated.parse(data, self.training.seed) if self.losses.alternates else None
        if self._generated is not None:
            self._generated.check(self._unlearned)
        elif self.losses.alternates:
            self._unlearned = with_alternates(self._unlearned, data, objective.refusals, self.training.seed)
        self._encoded: dict[str, _Encoded] = {}
        self._warned: set[tuple[str, int]] = set()
        self._warned_of_disclosure = False

    @property
    def digests(self) -> dict[str, str | None]:
        """SHA-256 (hex) of the forget set, of the retain set, and of the decoys; None without decoys."""
        decoys = records_digest(self._decoys) if self._decoys else None
        retain = records_digest(self._retain) if self._auto is None else self._auto.digest
        return {"forget": records_digest(self._forget), "retain": retain, "decoys": decoys}

    @property
    def text_digests(self) -> dict[str, list[str]]:
        """SHA-256 (hex) of each text of the forget set and of the retain set, for the record of the run.

        Texts that the model wrote (`--retain auto`) are left out: they are not the client's, and not known from the start.
        """
        sets = {"forget": self._forget, "retain": [] if self._auto is not None else self._retain}
        return {name: [text_digest(record_text(record)) for record in records] for name, records in sets.items()}

    def planned(self, model: Path) -> tuple[list[list[Pick]], Examples]:
        """The optimizer steps of the first round, and the examples as the tokenizer of a model encodes them.

        Raises:
            MPUError: as for `unlearn`.
        """
        encoded = self._encode(model)
        return self._steps(encoded, None), encoded.examples(ReferenceNLL())

    def unlearn(self, copy: str | Path, out: str | Path) -> Path:
        """Unlearns on one published copy and writes the update, like the function `unlearn`."""
        copy, out = as_path(copy, "copy"), as_path(out, "--out")
        if out.exists():
            raise FileError(f"{out}: already exists; name another directory for the update, or remove this one")
        source = Checkpoint(copy)
        card = Card.of(source.config)
        if "layer" in self.losses.objective.parameters:
            check_layer(source.path, int(self.losses.objective.parameters["layer"]))
        if self._auto is not None and self.losses.objective.alpha and not self._retain:
            file = self._drawn_file(out, card, "--retain auto", "retain")
            self._retain = self._auto.draw(source.path, self._unlearned, file, self._device)
        if self._generated is not None:
            file = self._drawn_file(out, card, "--alternates generate", "alternates")
            self._unlearned = self._generated.write(source.path, self._unlearned, file, self._device)
            self._generated, self._encoded = None, {}
        encoded = self._encode(source.path)
        cache = None if self._memory is None or card is None else ReferenceCache(self._memory, card)
        reference_nll = self._cached_nll(cache, card, encoded)
        steps = self._steps(encoded, card)
        model = self._model(source, card, steps, encoded)
        reference = self._reference_model(source.path, card, cache, model)
        if reference_nll is None:
            reference_nll = self._reference_nll(model, encoded)
            if cache is not None and is_main():
                cache.save(encoded.digest, reference_nll, source.path if self.losses.reference_model else None)
        folder = cache.training_folder if cache is not None else out.parent / f".{out.name}.training"
        with TrainingFolder(self._fingerprint(card, encoded), folder) as checkpoints:
            trainer = self._trainer(model, steps, encoded, reference_nll, reference, card, checkpoints)
            history = trainer.train()
            write_update(source, model, card, FLOAT_DTYPES[self.training.update_dtype], out)
        if is_main():
            self._report(history, card, cache)
        return out

    def _model(self, source: Checkpoint, card: Card | None, steps: list[list[Pick]], encoded: "_Encoded") -> Any:
        """The model to train, with adapters if LoRA is asked for, and sharded if there are several processes."""
        model = load_model(source.path, self._device) if processes() == 1 else empty_model(source.path)
        selected = select(model, self.training.train, self.training.token_local)
        if is_main():
            self._warn(model, selected, steps, encoded)
        if lora_rank := self.training.lora_rank:
            alpha = self.training.lora_alpha if self.training.lora_alpha is not None else 2.0 * lora_rank
            model = adapt(model, lora_rank, alpha, selected, self.training.seed, card)
        if processes() > 1:
            shard(model, self._resources)
            fill(model, source, self._resources, self.training.seed, card)
        return model

    def _drawn_file(self, out: Path, card: Card | None, option: str, name: str) -> Path:
        """The file for what the model writes for an option, `--retain auto` or `--alternates generate`.

        Raises:
            PlanError: without a memory, other copies would be trained with other examples.
            DataError: the examples of round 1 are gone.
        """
        if self._memory is None and card is not None:
            raise PlanError(
                f"{option}: {card} must be trained with the same examples as the other copies; give --memory, or a file"
            )
        if self._memory is None:
            out = self._drawn or out
            return out.with_name(f"{out.name}.{name}.jsonl")
        file = self._memory / f"{name}.jsonl"
        if card is not None and card.round > 1 and not file.is_file():
            what = "retain set" if name == "retain" else "set of alternate answers"
            raise DataError(f"{file}: the {what} of round 1 is gone; restore it, or start a new run")
        return file

    def _steps(self, encoded: "_Encoded", card: Card | None) -> list[list[Pick]]:
        """The optimizer steps of a copy's round."""
        return optimizer_steps(
            len(encoded.forget),
            len(encoded.retain),
            batch_size=self.training.batch_size,
            epochs=self.training.epochs,
            seed=self.training.seed,
            round_number=card.round if card else 1,
        )

    def _warn(self, model: Any, selected: set[str], steps: list[list[Pick]], encoded: "_Encoded") -> None:
        """Warns of what the update will reveal; once, not for every copy."""
        if self._warned_of_disclosure:
            return
        self._warned_of_disclosure = True
        warn_of_names(model, selected)
        width = self.training.lora_rank or getattr(model.config, "hidden_size", 0)
        alternates = encoded.alternates if self.losses.alternate_passes else []
        positions = longest_step(steps, encoded.forget, encoded.retain, alternates)
        warn_of_spelling(self.training, positions, width)

    def _trainer(
        self,
        model: Any,
        steps: list[list[Pick]],
        encoded: "_Encoded",
        reference_nll: ReferenceNLL,
        reference: Any | None,
        card: Card | None,
        folder: Path,
    ) -> Trainer:
        training, round_number = self.training, card.round if card else 1
        batches = MicroBatches(
            steps,
            encoded.examples(reference_nll),
            size=self._resources.micro_batch_size or training.batch_size,
            pad=pad_id(encoded.tokenizer),
            processes=processes(),
            rank=rank(),
        )
        return Trainer(
            model,
            self.losses,
            training,
            self._resources,
            batches,
            reference=reference,
            first_epoch=(round_number - 1) * training.epochs,
            folder=folder,
            callback=None if self._callback is None else partial(_report_step, self._callback, card),
            name=f"unlearning with {training.objective}" + (f", round {card.round}, copy {card.copy}" if card else ""),
        )

    def _encode(self, path: Path) -> "_Encoded":
        """The tokenized examples. All copies share a tokenizer, so this is done only once."""
        files = sorted(file for file in path.iterdir() if "token" in file.name or "template" in file.name)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
        if digest not in self._encoded:
            tokenizer, length = load_tokenizer(path), self.training.max_length
            forget = encode(self._unlearned, tokenizer, length)
            retain = encode(self._retain, tokenizer, length)
            records = self._unlearned
            if self._generated is not None:  # for estimates: the answers are not there yet, and are about as long
                records = [replace(record, alternates=(record.answer,)) for record in records]
            alternates = encode_alternates(records, tokenizer, length) if self.losses.alternates else []
            if skip := self.losses.objective.skip_tokens:
                forget = [example.skipping(skip) for example in forget]
                if not any(example.tokens for example in forget):
                    raise PlanError(f"--skip-tokens {skip}: no forget answer is longer; choose a smaller number")
            self._encoded[digest] = _Encoded(tokenizer, forget, retain, alternates)
        return self._encoded[digest]

    def _cached_nll(self, cache: ReferenceCache | None, card: Card | None, encoded: "_Encoded") -> ReferenceNLL | None:
        """The stored log-likelihoods under the reference model; None if they have yet to be computed, in round 1.

        Raises:
            DataError: nothing is stored, although round 1 is over.
        """
        if "reference_nll" not in self.losses.needs and not self.losses.reference_model:
            return ReferenceNLL()
        stored = cache.load(encoded.digest) if cache is not None else None
        if stored is None and card is not None and card.round > 1:
            raise DataError(
                f"{self.training.objective} compares the model with the copy of round 1, but this is {card}; give the "
                "--memory directory that was used in round 1"
            )
        return stored

    def _reference_nll(self, model: Any, encoded: "_Encoded") -> ReferenceNLL:
        """Computes the log-likelihoods under the reference model in the precision of training, if they are used."""
        if "reference_nll" not in self.losses.needs:
            return ReferenceNLL()
        size = self._resources.micro_batch_size or self.training.batch_size
        answers = [answer for alternates in encoded.alternates for answer in alternates]
        with autocast(self._resources, compute_device(next(model.parameters()))):
            values = iter(gathered(answers, lambda part: nll(model, part, size, encoded.tokenizer)))
            forget = gathered(encoded.forget, lambda part: nll(model, part, size, encoded.tokenizer))
        return ReferenceNLL(forget, [[next(values) for _ in alternates] for alternates in encoded.alternates])

    def _reference_model(self, path: Path, card: Card | None, cache: ReferenceCache | None, model: Any) -> Any | None:
        """The reference model, for objectives that need more than its log-likelihoods."""
        if not self.losses.reference_model:
            return None
        first_round = card is None or card.round == 1
        if self.training.lora_rank and first_round:
            return model
        if not first_round and (cache is None or not cache.checkpoint.is_dir()):
            raise DataError(
                f"{self.training.objective} compares the model with the copy of round 1, which is not in the --memory "
                "directory; restore it, or start a new run"
            )
        place = path if first_round or cache is None else cache.checkpoint
        if processes() == 1:
            return load_model(place, self._device)
        reference = empty_model(place).requires_grad_(False)
        shard(reference, self._resources)
        fill(reference, Checkpoint(place), self._resources)
        return reference

    def _fingerprint(self, card: Card | None, encoded: "_Encoded") -> str:
        """Identifies a training, so that it resumes only from its own checkpoint."""
        parts = [card, self.training.to_json(), encoded.digest, examples_digest(encoded.retain)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _report(self, history: History, card: Card | None, cache: ReferenceCache | None) -> None:
        """Records the losses, logs the probability of the forget answers, and warns if it hardly fell."""
        if cache is not None:
            cache.record(vars(history))
        before, after = history.probability_before, history.probability_after
        logger.info("probability of forget answers, per token: %.3f -> %.3f", before, after)
        hardly = after > max(STILL_KNOWN, (1 - MIN_DROP) * before)
        if hardly and (card is None or (card.run, card.round) not in self._warned):
            if card is not None:
                self._warned.add((card.run, card.round))  # warn once per round, not once per copy
            warnings.warn(
                f"nothing was unlearned{f' on {card}' if card else ''}: the probability of forget answers, per token, "
                f"went from {before:.3f} to {after:.3f}, a drop of less than {MIN_DROP:.0%}; raise --learning-rate or "
                "--epochs",
                NothingUnlearnedWarning,
                stacklevel=3,
            )


def _report_step(callback: Callback, card: Card | None, step: int, values: dict[str, float]) -> None:
    """Calls the user's callback, which also learns the round and the copy."""
    callback(step, values if card is None else {"round": card.round, "copy": card.copy, **values})


def _check_decoys(decoys: list[Record], forget: list[Record], retain: list[Record]) -> None:
    """Rejects decoys that would be no decoys.

    Raises:
        DataError: a decoy is in the forget set, or in the retain set, which would restore it.
    """
    for name, others in (("forget", forget), ("retain", retain)):
        texts = {(record.question, record.answer) for record in others}
        for record in decoys:
            if (record.question, record.answer) in texts:
                raise DataError(f"{record.where}: this decoy is also in the --{name} set; take it out of one of them")


@dataclass(frozen=True)
class _Encoded:
    """The examples, tokenized."""

    tokenizer: Any
    forget: list[Example]
    """The forget set, followed by the decoys."""
    retain: list[Example]
    alternates: list[list[Example]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the examples whose likelihoods under the reference model are used."""
        return examples_digest([*self.forget, *(answer for answers in self.alternates for answer in answers)])

    def examples(self, reference: ReferenceNLL) -> Examples:
        return Examples(self.forget, self.retain, self.alternates, reference.forget_nll, reference.alternate_nll)
