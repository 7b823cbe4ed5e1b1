"""Measures what common noise costs: forgetting and retaining at each level, beside the error that it leaves to a client.

Runs every arm on the built-in benchmark and, with --tofu, on a small model of real text (`tofu_world`), for several seeds
and objectives. Each row goes to a CSV file when it is done, so an interrupted run continues where it stopped. *Floor* is
‖c‖/‖θ‖, the parameter error that is left to a client that averages all copies. *Error* is the smallest one that the attacks
of `mpunlearn audit` reach with all copies of the first round and the public base. It does not depend on the objective, and is
measured once for each world, arm and seed. *Deviation* is the mean absolute difference
from noise-free unlearning of the forget and retain probabilities, in points.

    python benchmarks/disclosure.py [--tofu DIRECTORY_WITH_TOFU_JSON_FILES] [--seeds 5] [--objectives npo,simnpo,grad-diff]
                                    [--out FILE.csv] [--table]

The level of `hardened` and `lean` is calibrated on the texts to retain, which the server's model knows. All arms of a world
with whitened noise share the lineage, so their noise differs only in its size.

Not covered: copies of later rounds, which add nothing where the common noise is the larger part; errors of functions.
"""

import argparse
import csv
import math
import shutil
import tempfile
from pathlib import Path

from claim import OBJECTIVES
from disclosure_arms import ARMS, Arm, World, worlds
from disclosure_tables import HEADER, figure, table
from mpunlearn import Training, calibrate, run
from mpunlearn.audit.assess import assess
from mpunlearn.audit.subject import Subject
from mpunlearn.demo.models import TrainedWorld
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load, nll
from mpunlearn.lm.records import read_records
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.server.state import ServerState

DOCS = Path(__file__).parents[1] / "docs"


def probability(checkpoint: Path, text: Path) -> float:
    """The mean over texts of the probability of an answer, to the power of one over its number of tokens (Q_A_Prob)."""
    model, tokenizer = load(checkpoint)
    examples = encode(read_records(text, Data(), "text"), tokenizer, 512)
    losses = nll(model, examples, 16, tokenizer)
    return sum(math.exp(-loss / example.tokens) for loss, example in zip(losses, examples, strict=True)) / len(examples)


def training(world: World, objective: ObjectiveName, epochs: int, seed: int) -> Training:
    """The training of one round, which is the same in all arms but for its length."""
    options = {**OBJECTIVES[objective], "learning_rate": world.learning_rate}
    return Training(objective=objective, epochs=epochs, seed=seed, batch_size=8, **options)


def measure(
    world: World, objective: ObjectiveName, arm: Arm, seed: int, lineage: Path, attacked: list[float] | None
) -> list[float]:
    """One row of numbers, in the order of the last columns of `HEADER`.

    Args:
        world: the model and the data.
        objective: the objective.
        arm: how copies are published.
        seed: the seed of the training.
        lineage: a calibrated lineage, which is left unused.
        attacked: the errors of the attacks, if they are known from another objective.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, models = Path(folder) / "run", world.models
        shutil.copytree(lineage, Path(folder) / "lineage")  # one of its own for every arm
        final = run(
            models.original,
            forget=models.data("forget"),
            retain=models.data("retain"),
            out=out,
            lineage=Path(folder) / "lineage",
            rounds=arm.rounds,
            eta=arm.eta,
            perturbation=arm.perturbation,
            training=training(world, objective, arm.epochs, seed),
            keep_exchange=attacked is None,
        )
        offset = ServerState(out / "server" / "state").rounds[0].offset
        floor = offset.floor if offset else 0.0
        errors = attacked or attack(models, sorted((out / "exchange" / "round-1" / "copies").glob("copy-*")))
        return [floor, *errors, *(probability(final, models.data(split)) for split in ("forget", "retain"))]


def attack(models: TrainedWorld, copies: list[Path]) -> list[float]:
    """The smallest parameter error that an attack with all copies of a round reaches, and what it is of the task vector."""
    found = assess(Subject(models.original, {1: copies}, models.base))
    best = found.attacks[found.strongest]
    return [best.error, best.task_error or 0.0]


def calibrated(world: World, folder: Path) -> Path:
    """A lineage of the world's model, with the level that `calibrate` finds."""
    calibrate(world.models.original, calibration_text=world.models.data("retain"), lineage=folder / "lineage")
    return folder / "lineage"


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows that are there already."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def compute(world: World, objectives: list[ObjectiveName], seed: int, rows: list[dict[str, str]], file: Path) -> None:
    """Appends the missing rows of a world."""
    done = {(row["world"], row["objective"], row["arm"], row["seed"]) for row in rows}
    keys = [(world.name, objective, name, str(seed)) for objective in objectives for name in ARMS]
    missing = [key for key in keys if key not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        lineage = calibrated(world, Path(folder))
        for key in missing:
            same = next((row for row in rows if (row["world"], row["arm"], row["seed"]) == (key[0], *key[2:])), None)
            attacked = [float(same[column]) for column in ("error", "task_error")] if same else None
            numbers = measure(world, key[1], ARMS[key[2]](), seed, lineage, attacked)
            rows.append(dict(zip(HEADER, (*key, *map(str, numbers)), strict=True)))
            with file.open("w", encoding="utf-8", newline="") as lines:
                writer = csv.DictWriter(lines, HEADER)
                writer.writeheader()
                writer.writerows(rows)


def main() -> None:
    """Computes the missing rows, prints the table, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, help="directory with full.json (default: only the built-in benchmark)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worlds", default="toy,tofu", help="tofu needs --tofu")
    parser.add_argument("--objectives", default="npo,simnpo,grad-diff")
    parser.add_argument("--out", type=Path, default=DOCS / "disclosure.csv")
    parser.add_argument("--table", action="store_true", help="only write table and figure of the existing rows")
    arguments = parser.parse_args()
    rows = read_rows(arguments.out)
    if not arguments.table:
        for seed in range(arguments.seeds):
            for world in worlds(seed, arguments.worlds.split(","), arguments.tofu):
                compute(world, arguments.objectives.split(","), seed, rows, arguments.out)
    print(table(rows))
    figure(rows, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
