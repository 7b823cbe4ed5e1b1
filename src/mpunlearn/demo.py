"""The demonstration: a small model unlearns four fictitious authors, and what that cost and disclosed is measured.

Five models are compared on the embedded benchmark: original, retrained without the authors, noise-free unlearning, a single
noisy copy, and MPU. All unlearning goes through `run`, with the same budget and hyper-parameters; the noise is relative to
the parameters, ten times the default, so that it shows.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpunlearn import toy
from mpunlearn.architecture import FAMILIES
from mpunlearn.architecture.spaces import architecture_of
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client import Data
from mpunlearn.client.model import load
from mpunlearn.errors import CheckpointError
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.files import new_directory
from mpunlearn.progress import progress
from mpunlearn.protocol.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation, ServerState
from mpunlearn.server.preprocess import Publisher

KAPPA = 0.1
ROUNDS = 5
TRAINING = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
MPU = "MPU, 3 copies"
ARMS = {
    "noise-free unlearning": Perturbation(copies=1, kappa=0.0, reparameterization="none"),
    "single noisy copy": Perturbation(copies=1, kappa=KAPPA),
    MPU: Perturbation(copies=3, kappa=KAPPA),
}


@dataclass(frozen=True)
class Answers:
    """Means over one set, each in [0, 1]."""

    probability: float
    rouge_l: float


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    model: str
    forget: Answers
    retain: Answers
    seconds: float | None
    """Of the unlearning; None for the two models that were trained."""


def demo(*, out: str | Path = "mpu-demo", seed: int = 0) -> dict[str, Any]:
    """Trains the embedded benchmark (once, cached), unlearns in three ways, and compares.

    Args:
        out: a new directory for result.json, and for the MPU run itself with both sides: OUT/server, OUT/client,
            OUT/exchange, OUT/final.
        seed: of the world, the models and the order of batches. The server's secrets never follow a seed.

    Returns:
        What result.json holds.

    Raises:
        CheckpointError: `out` exists or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another --out, or remove this one")
    begin = time.monotonic()
    world = toy.prepare(seed)
    prepared = time.monotonic() - begin
    training = dataclasses.replace(TRAINING, seed=seed)
    with new_directory(out) as folder:
        lines = [measure("original", world.original, world), measure("retrained", world.retrained, world)]
        for name, perturbation in progress(ARMS.items(), "unlearning in three ways"):
            place = folder if name == MPU else folder / "other"
            started = time.monotonic()
            final = run(
                world.original,
                forget=world.data("forget"),
                retain=world.data("retain"),
                out=place,
                rounds=ROUNDS,
                keep_exchange=True,
                perturbation=perturbation,
                training=training,
            )
            lines.append(measure(name, final, world, time.monotonic() - started))
            if name != MPU:
                shutil.rmtree(place)
        seen = what_the_client_saw(world, folder, ARMS[MPU])
        result = {
            "seed": seed,
            "kappa": KAPPA,
            "rounds": ROUNDS,
            "training": asdict(training),
            "models": [asdict(line) for line in lines],
            "client": seen,
            "seconds": {"preparing the benchmark": prepared, "all": time.monotonic() - begin},
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(lines), *seen["lines"], sep="\n")
    print(f"{time.monotonic() - begin:.0f} s in all. Both sides of the MPU run and its numbers: {out}")
    return result


def measure(name: str, checkpoint: Path, world: toy.Toy, seconds: float | None = None) -> Line:
    """Evaluates a model on the forget and the retain set."""
    sets = read_sets(str(world.path / "data"), "", None, Data())
    return line(name, checkpoint, {split: sets[split] for split in ("forget", "retain")}, seconds, max_new_tokens=48)


def line(
    name: str, checkpoint: Path, sets: Mapping[str, Questions], seconds: float | None, max_new_tokens: int
) -> Line:
    """Evaluates a model on a forget and a retain set."""
    model, tokenizer = load(checkpoint)
    found = tofu.summarise(tofu.measure(model, tokenizer, sets, max_new_tokens=max_new_tokens, membership=False))
    forget, retain = (
        Answers(found[f"{split}_probability"], found[f"{split}_rouge_l_recall"]) for split in ("forget", "retain")
    )
    return Line(name, forget, retain, seconds)


def table(lines: list[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| model | forget probability | forget ROUGE-L | retain probability | retain ROUGE-L | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        numbers = (line.forget.probability, line.forget.rouge_l, line.retain.probability, line.retain.rouge_l)
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        rows.append(f"| {line.model} | {' | '.join(f'{number:.3f}' for number in numbers)} | {seconds} |")
    return "\n".join(rows)


def what_the_client_saw(world: toy.Toy, run_folder: Path, perturbation: Perturbation) -> dict[str, Any]:
    """How far a published copy is from the server's model, and what noise is left to one who pools copies.

    Args:
        run_folder: a run whose exchange was kept.
        perturbation: what the server did; the noise left is computed for α = 1, the least noise it can draw.
    """
    source = Checkpoint(world.original)
    copies = run_folder / "exchange" / "round-1" / "copies"
    state = ServerState(run_folder / "server" / "state")
    architecture = architecture_of(source, FAMILIES)
    maps = Publisher(state.secret, state.rounds[0], architecture).maps[0]
    published = Checkpoint(copies / "copy-1")
    equal = count = 0
    difference = norm = 0.0
    for name, place in architecture.places(source).items():
        mine = source.read(name)
        # As a client sees it that has undone the change of basis: what is left to protect the weights is the noise.
        theirs = maps.invert(place, published.read(maps.published_name(name, place)))
        equal += int((mine == theirs).sum())
        count += mine.numel()
        difference += float((mine - theirs).square().sum())
        norm += float(mine.square().sum())
    distance = math.sqrt(difference / norm)
    retain = measure("a published copy", copies / "copy-1", world).retain
    design = perturbation.design(perturbation.scales(None))
    left = [math.sqrt(design.floor(list(range(held)))) * perturbation.kappa for held in range(1, design.copies + 1)]
    lines = [
        f"The client saw {design.copies} copies a round. To one who undoes its change of basis, a copy's weights are "
        f"{distance:.0%} away from the server's, and {equal / count:.1%} of them equal; as a model it answers retain questions "
        f"with probability {retain.probability:.3f}: parameters are hidden, not what the model can do.",
        "Noise left, relative to the weights, to one who pools k copies of a round: "
        + ", ".join(f"k = {held}: {floor:.1%}" for held, floor in enumerate(left, start=1))
        + f"; who pools one copy of each of the {ROUNDS} rounds, between which the model moves little: "
        f"{left[0] / math.sqrt(ROUNDS):.1%}. Whoever holds all copies of a round can cancel it.",
    ]
    return {
        "equal_weights": equal / count,
        "relative_distance": distance,
        "retain_probability": retain.probability,
        "noise_left": left,
        "lines": lines,
    }
