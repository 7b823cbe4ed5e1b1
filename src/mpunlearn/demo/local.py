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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpunlearn.audit.parameters import copy_distance, noise_floor
from mpunlearn.demo import models
from mpunlearn.demo.table import measure, table
from mpunlearn.errors import CheckpointError
from mpunlearn.files import new_directory
from mpunlearn.local import run
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training
from mpunlearn.server import Perturbation

KAPPA = 0.1
ROUNDS = 5
TRAINING = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
MPU = "MPU, 3 copies"
ARMS = {
    "noise-free unlearning": Perturbation(copies=1, kappa=0.0, reparameterization="none"),
    "single noisy copy": Perturbation(copies=1, kappa=KAPPA),
    MPU: Perturbation(copies=3, kappa=KAPPA),
}


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
    world = models.prepare(seed)
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
        seen = what_the_client_saw(world, folder)
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


def what_the_client_saw(world: models.TrainedWorld, run_folder: Path) -> dict[str, Any]:
    """How far a published copy is from the server's model, and what noise is left to one who pools copies.

    Args:
        run_folder: a run whose exchange was kept.
    """
    copy = run_folder / "exchange" / "round-1" / "copies" / "copy-1"
    distance = copy_distance(world.original, copy, run_folder / "server" / "state")
    retain = measure("a published copy", copy, world).retain
    left = noise_floor(ARMS[MPU])
    lines = [
        f"The client saw {len(left)} copies a round. To one who undoes its change of basis, a copy's weights are "
        f"{distance.relative:.0%} away from the server's, and {distance.equal:.1%} of them equal; as a model it answers retain "
        f"questions with probability {retain.probability:.3f}: parameters are hidden, not what the model can do.",
        "Noise left, relative to the weights, to one who pools k copies of a round: "
        + ", ".join(f"k = {held}: {floor:.1%}" for held, floor in enumerate(left, start=1))
        + f"; who pools one copy of each of the {ROUNDS} rounds, between which the model moves little: "
        f"{left[0] / math.sqrt(ROUNDS):.1%}. Whoever holds all copies of a round can cancel it.",
    ]
    return {
        "equal_weights": distance.equal,
        "relative_distance": distance.relative,
        "retain_probability": retain.probability,
        "noise_left": left,
        "lines": lines,
    }
