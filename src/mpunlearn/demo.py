"""The demonstration: a small model unlearns four fictitious authors, and what that cost and disclosed is measured.

Five models are compared on the embedded benchmark: original, retrained without the authors, noise-free unlearning, a single
noisy copy, and MPU. All unlearning goes through `run`, with the same budget and hyper-parameters.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpunlearn import toy
from mpunlearn.checkpoint import Checkpoint, new_directory
from mpunlearn.errors import CheckpointError
from mpunlearn.evaluation.answers import Answers, evaluate_answers
from mpunlearn.progress import progress
from mpunlearn.protocol.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation

KAPPA = 0.1
ROUNDS = 5
TRAINING = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
ARMS = {
    "noise-free": Perturbation(copies=1, kappa=0.0, reparameterization="none"),
    "single noisy copy": Perturbation(copies=1, kappa=KAPPA),
    "MPU": Perturbation(copies=3, kappa=KAPPA),
}


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
        out: a new directory for result.json and the model that MPU made, OUT/final.
        seed: of the world, the models and the order of batches. The server's secrets never follow a seed.

    Returns:
        What result.json holds.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another --out, or remove this one")
    begin = time.monotonic()
    world = toy.prepare(seed)
    prepared = time.monotonic() - begin
    with new_directory(out) as folder:
        lines = [_line("original", world.original, world), _line("retrained", world.retrained, world)]
        for name, perturbation in progress(ARMS.items(), "unlearning in three ways"):
            started = time.monotonic()
            final = run(
                world.original,
                forget=world.data("forget"),
                retain=world.data("retain"),
                out=folder / name,
                rounds=ROUNDS,
                keep_exchange=True,
                perturbation=perturbation,
                training=Training(**{**asdict(TRAINING), "seed": seed}),
            )
            lines.append(_line(name, final, world, time.monotonic() - started))
        seen = what_the_client_saw(world.original, folder / "MPU" / "exchange" / "round-1" / "copies", ARMS["MPU"])
        (folder / "MPU" / "final").rename(folder / "final")
        for name in ARMS:
            shutil.rmtree(folder / name)
        seconds = {"preparing the benchmark": prepared, "all": time.monotonic() - begin}
        result = {
            "seed": seed,
            "kappa": KAPPA,
            "rounds": ROUNDS,
            "training": asdict(TRAINING),
            "models": [asdict(line) for line in lines],
            "client": seen,
            "seconds": seconds,
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(lines))
    print("\n".join(seen["lines"]))
    print(f"{seconds['all']:.0f} s in all; {out}/result.json, {out}/final")
    return result


def _line(name: str, checkpoint: Path, world: toy.Toy, seconds: float | None = None) -> Line:
    answers = evaluate_answers(
        checkpoint, {split: world.data(split) for split in ("forget", "retain")}, max_new_tokens=48
    )
    return Line(name, answers["forget"], answers["retain"], seconds)


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


def what_the_client_saw(original: Path, copies: Path, perturbation: Perturbation) -> dict[str, Any]:
    """How far a published copy is from the server's model, and what noise is left to one who pools copies."""
    source, copy = Checkpoint(original), Checkpoint(copies / "copy-1")
    equal = count = 0
    difference = norm = 0.0
    for name in source.tensors:
        mine, theirs = source.read(name).double(), copy.read(name).double()
        equal += int((mine == theirs).sum())
        count += mine.numel()
        difference += float((mine - theirs).square().sum())
        norm += float(mine.square().sum())
    design = perturbation.design(perturbation.scales(None))
    floors = [math.sqrt(design.floor(list(range(held)))) * perturbation.kappa for held in range(1, design.copies + 1)]
    distance = math.sqrt(difference / norm)
    lines = [
        f"The client saw {design.copies} copies a round and no file of the server's: {equal / count:.1%} of a copy's weights "
        f"equal the original's, and the two are {distance:.0%} apart.",
        "Noise left to a client that undoes the change of basis and pools k copies, in per cent of the weights: "
        + ", ".join(f"k={held}: {floor:.1%}" for held, floor in enumerate(floors, start=1))
        + ". All copies in one hand cancel it: MPU hides a model from a party that holds fewer.",
    ]
    return {"equal_weights": equal / count, "relative_distance": distance, "noise_left": floors, "lines": lines}
