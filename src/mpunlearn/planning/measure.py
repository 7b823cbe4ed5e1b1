"""Times the parts of a run on this machine, within about the given time.

The server's passes and the client's training are really done: on the model itself if it is small, otherwise on a smaller
one (see `cut`), from which the times are extrapolated: passes, loading and writing by the number of entries, training by
the number of floating-point operations. As many examples of a step are timed as fit into the time.

Everything is written to a temporary folder, with a lineage of its own. Nothing of it is published.
"""

import importlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.client.batches import Examples, MicroBatches, Pick
from mpunlearn.client.objectives import Losses
from mpunlearn.client.resources import Resources
from mpunlearn.client.trainer import Trainer
from mpunlearn.client.update import write_update
from mpunlearn.client.weights import adapt, select
from mpunlearn.lm.examples import Example
from mpunlearn.lm.model import load_model, nll
from mpunlearn.planning.cut import Cut, cut
from mpunlearn.planning.sizes import Shapes
from mpunlearn.progress import logger
from mpunlearn.protocol.exchange import Card, UpdateManifest
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess

MAX_STEPS = 20
"""Steps that are timed at most."""
BRIEF_SECONDS = 1.0
"""What takes less is timed again."""
TIMED_RATE = 1e-7
"""Learning rate while steps are timed: the weights stay what they are, whatever the plan says."""
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What the client does on a copy in one round."""

    training: Training
    losses: Losses
    resources: Resources
    steps: list[list[Pick]]
    examples: Examples


@dataclass(frozen=True)
class Rates:
    """How long the parts of a run take on this machine, in seconds, for the whole model."""

    publish: float
    """Pre-Process of all copies of a round."""
    aggregate: float
    """Post-Process of their updates."""
    load: float
    """Loading one copy."""
    setup: float
    """What a training does once, besides its steps."""
    step: float
    """One optimizer step."""
    reference: float
    """The likelihoods of all forget examples under one reference model; 0 if the objective does not need them."""
    write: float
    """Writing one update."""
    what: str
    """What was timed; empty if it was the model itself."""
    program_bytes: int
    """Memory of this process before the model was loaded."""


def measure(
    checkpoint: Checkpoint, shapes: Shapes, perturbation: Perturbation, work: Work, seconds: float, place: Path
) -> Rates:
    """Times the parts of a run.

    Args:
        checkpoint: the model.
        shapes: its shapes.
        perturbation: how the copies are made.
        work: what the client does on each of them.
        seconds: about how long measuring may take.
        place: an existing folder, on the disk that the run would use.

    Raises:
        MPUError: as for `preprocess`, `unlearn` and `postprocess`.
    """
    for name in ("aggregate", "copies", "lineage"):  # the first call would load them
        importlib.import_module(f"mpunlearn.server.{name}")
    resident = _resident_bytes()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place, prefix=".mpunlearn-plan-") as scratch, _silent():
        folder = Path(scratch)
        small = cut(checkpoint, shapes, folder)
        scale = shapes.parameters / small.shapes.parameters
        lineage = folder / "private" / "lineage"
        publish, published = _timed(
            lambda: preprocess(
                small.path, state=folder / "state", out=folder / "copies", lineage=lineage, perturbation=perturbation
            )
        )
        left = max(1.0, seconds - (time.monotonic() - begun))
        client = _Client(small, shapes, work, published.copies[0], 0.6 * left)
        updates = _updates(client.update(folder / "update"), published.copies)
        aggregate, _ = _timed(
            lambda: postprocess(updates, state=folder / "state", out=folder / "next", dtype="float32")
        )
    return Rates(
        publish=publish * scale,
        aggregate=aggregate * scale,
        load=client.load * scale,
        setup=client.setup,
        step=client.step,
        reference=client.reference,
        write=client.write * scale,
        what=small.what,
        program_bytes=resident,
    )


class _Client:
    """Times the client's part on one copy."""

    def __init__(self, small: Cut, shapes: Shapes, work: Work, copy: Path, seconds: float) -> None:
        self._copy, self._small, self._shapes = Checkpoint(copy), small, shapes
        training, objective = work.training, work.losses.objective
        if small.what and "layer" in objective.parameters:
            training = replace(training, parameters={**training.parameters, "layer": 0})
            work = replace(work, training=training, losses=Losses(training.resolved()))
        examples = _with_likelihoods(work.examples) if "reference_nll" in work.losses.needs else work.examples
        if small.what:
            examples = _within(examples, int(small.shapes.architecture.config["vocab_size"]))
        work = replace(work, examples=examples)
        self._work = work
        self.load, self._model = _timed(lambda: load_model(copy))
        if self.load < BRIEF_SECONDS:  # the first time also loads modules
            self.load, self._model = _timed(lambda: load_model(copy))
        selected = select(self._model, training.train, training.token_local)
        if rank := training.lora_rank:
            alpha = training.lora_alpha if training.lora_alpha is not None else 2.0 * rank
            self._model = adapt(self._model, rank, alpha, selected, training.seed, None)
        self._reference: Any = None
        if work.losses.reference_model:
            self._reference = self._model if training.lora_rank else load_model(copy)
        self.step = self._time_step(seconds)
        self.reference = self._time_reference() if "reference_nll" in work.losses.needs else 0.0
        self.write = 0.0

    def update(self, out: Path) -> Path:
        """Writes an update, and times it."""
        dtype = FLOAT_DTYPES[self._work.training.update_dtype]
        card = Card.of(self._copy.config)
        self.write, _ = _timed(lambda: write_update(self._copy, self._model, card, dtype, out))
        return out

    def _time_step(self, seconds: float) -> float:
        """How long a whole step takes on the whole model; also sets `setup`."""
        steps = sorted(self._work.steps, key=len, reverse=True)
        end = time.monotonic() + seconds
        self._train([steps[0][:1]])  # the first step also loads modules
        one, _ = _timed(lambda: self._train([steps[0][:1]]))
        count = max(1, min(len(steps[0]), int(seconds / 3 / one)))
        first = [steps[0][:count]]
        alone, _ = _timed(lambda: self._train(first))
        more = max(1, min(len(steps), MAX_STEPS, int((end - time.monotonic()) / alone) - 1))
        several = first + [steps[number % len(steps)][:count] for number in range(more)]
        together, _ = _timed(lambda: self._train(several))
        # The difference leaves out what a training does only once.
        took = max(together - alone, 0.1 * together)
        per_flop = took / sum(self._flops(self._small.shapes, picks) for picks in several[1:])
        whole = sum(self._flops(self._shapes, step) for step in steps) / len(steps)
        self.setup = max(0.0, alone - per_flop * self._flops(self._small.shapes, first[0]))
        return per_flop * whole

    def _train(self, steps: list[list[Pick]]) -> None:
        work = self._work
        size = work.resources.micro_batch_size or work.training.batch_size
        batches = MicroBatches(steps, work.examples, size=size, pad=0)
        quiet = replace(work.resources, save_every=0, report_to="none", cpu_offload=False)
        once = replace(work.training, epochs=1, learning_rate=TIMED_RATE)
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                self._model,
                work.losses,
                once,
                quiet,
                batches,
                reference=self._reference,
                folder=Path(folder),
                name="timing",
            ).train()

    def _time_reference(self) -> float:
        """How long the likelihoods of all examples take on the whole model."""
        size = self._work.resources.micro_batch_size or self._work.training.batch_size
        everything = [
            *self._work.examples.forget,
            *(answer for each in self._work.examples.alternates for answer in each),
        ]
        some = everything[: max(1, min(len(everything), size))]
        took, _ = _timed(lambda: nll(self._model, some, size, _NoPadding()))
        ratio = forward_flops(self._shapes, everything, size) / forward_flops(self._small.shapes, some, size)
        return took * ratio

    def _flops(self, shapes: Shapes, picks: Sequence[Pick]) -> float:
        """Floating-point operations of one step on these examples, in multiples of a forward pass."""
        examples = self._work.examples
        size = self._work.resources.micro_batch_size or self._work.training.batch_size
        sides = [[examples.forget[pick.forget] for pick in picks]]
        if examples.retain:
            sides.append([examples.retain[pick.retain] for pick in picks if pick.retain is not None])
        if self._work.losses.alternate_passes:
            sides.append([examples.alternates[pick.forget][0] for pick in picks])
        if self._work.training.sam_radius:  # what belongs to the forget loss runs twice
            sides += [side for number, side in enumerate(sides) if number != 1 or not examples.retain]
        return sum(forward_flops(shapes, side, size) for side in sides)


class _NoPadding:
    """Stands in for a tokenizer where only its padding token is asked for."""

    pad_token_id = 0
    eos_token_id = 0


def forward_flops(shapes: Shapes, examples: Sequence[Example], size: int) -> float:
    """Floating-point operations of forward passes over examples, in batches that are padded to their longest."""
    total = 0.0
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        longest, answer = max(len(example.input_ids) for example in batch), max(example.tokens for example in batch)
        total += shapes.forward_flops(len(batch) * longest, len(batch) * answer)
    return total


def _with_likelihoods(examples: Examples) -> Examples:
    """The examples with some likelihoods under a reference model; no time depends on them."""
    return replace(
        examples,
        forget_nll=[0.0] * len(examples.forget),
        alternate_nll=[[0.0] * len(answers) for answers in examples.alternates],
    )


def _within(examples: Examples, vocabulary: int) -> Examples:
    """The examples with all tokens in a smaller vocabulary."""

    def shortened(example: Example) -> Example:
        labels = [label if label < 0 else label % vocabulary for label in example.labels]
        return Example([token % vocabulary for token in example.input_ids], labels)

    return replace(
        examples,
        forget=[shortened(example) for example in examples.forget],
        retain=[shortened(example) for example in examples.retain],
        alternates=[[shortened(answer) for answer in answers] for answers in examples.alternates],
    )


def _updates(update: Path, copies: Sequence[Path]) -> list[Path]:
    """The same update for every copy."""
    updates = []
    for copy in copies:
        folder = update.with_name(f"{update.name}-{copy.name}")
        folder.mkdir()
        for file in update.glob("update*.safetensors*"):
            os.link(file, folder / file.name)
        UpdateManifest(Card.of(Checkpoint(copy).config)).save(folder)
        updates.append(folder)
    return updates


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    begun = time.monotonic()
    result = function()
    return time.monotonic() - begun, result


def _resident_bytes() -> int:
    """Memory of this process; 0 if the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _silent() -> Iterator[None]:
    """Hides progress, log lines and warnings, which would speak of a run that does not exist."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
