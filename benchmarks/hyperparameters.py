"""Finds hyperparameters for each objective on the small world of the demo: the class `tiny` in docs/hyperparameters.md.

Every objective unlearns four fictitious authors in one place, without noise, in 5 rounds of 2 epochs with batches of 8, for
each learning rate and weight of the forget loss on a grid. The score is the harmonic mean of 1 - p(forget answers) and
p(retain answers), where p is the mean probability per token, averaged over the seeds. The best pair is what is recommended.

    python benchmarks/hyperparameters.py [--seeds 0] [--out docs/hyperparameters.csv] [--objectives npo,…]

Resumable: what the CSV file already holds is not repeated. Not covered: the other hyperparameters, which keep their defaults.
"""

import argparse
import csv
import itertools
import tempfile
from pathlib import Path
from statistics import harmonic_mean
from typing import get_args

from mpunlearn.demo.local import NOISE_FREE
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.demo.table import measure
from mpunlearn.evaluation.sets import read_sets
from mpunlearn.lm.sources import Data
from mpunlearn.local import run
from mpunlearn.progress import progress
from mpunlearn.protocol.objectives import OBJECTIVES, ObjectiveName
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.tables import markdown

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
GAMMAS = (1.0, 0.1)
"""Weights γ of the forget loss. Without a retain term, γ hardly matters under Adam, and only the first is used."""
OPTIMIZERS: dict[str, str] = {"repselect": "tensor_adam"}
"""Objectives that do not go with AdamW."""
FIELDS = ("objective", "learning_rate", "gamma", "seed", "forget", "retain", "score")
ROUNDS, EPOCHS, BATCH_SIZE = 5, 2, 8


def unlearned(
    world: TrainedWorld, objective: ObjectiveName, rate: float, gamma: float, seed: int
) -> tuple[float, float]:
    """The probabilities of forget and retain answers after unlearning with one setting."""
    layer = {"layer": 0.0} if "layer" in OBJECTIVES[objective].parameters else {}  # the model has two layers
    training = Training(
        objective,
        epochs=EPOCHS,
        learning_rate=rate,
        batch_size=BATCH_SIZE,
        gamma=gamma,
        optimizer=OPTIMIZERS.get(objective, Training.optimizer),
        seed=seed,
        parameters=layer,
    )
    options = {name: value for name, value in NOISE_FREE.items() if name not in ("rounds", "epochs")}
    sets = read_sets(str(world.path / "data"), "", None, Data())
    with tempfile.TemporaryDirectory() as folder:
        final = run(
            world.original,
            forget=world.data("forget"),
            retain=world.data("retain"),
            out=Path(folder) / "run",
            rounds=ROUNDS,
            perturbation=Perturbation(**options),  # type: ignore[arg-type]
            training=training,
            data=Data(alternate_key="perturbed_answer") if objective == "altpo" else Data(),
        )
        line = measure("", final, {name: sets[name] for name in ("forget", "retain")}, None, None, max_new_tokens=1)
    return line.forget.probability, line.retain.probability


def best(rows: list[dict[str, str]]) -> list[dict[str, float | str]]:
    """For each objective: the pair with the best mean score over the seeds, and its means."""
    chosen = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        means: list[dict[str, float | str]] = []
        of_objective = [row for row in rows if row["objective"] == objective]
        for rate, gamma in dict.fromkeys((row["learning_rate"], row["gamma"]) for row in of_objective):
            group = [row for row in of_objective if (row["learning_rate"], row["gamma"]) == (rate, gamma)]
            mean = {key: sum(float(row[key]) for row in group) / len(group) for key in ("forget", "retain", "score")}
            means.append({"objective": objective, "learning_rate": float(rate), "gamma": float(gamma), **mean})
        chosen.append(max(means, key=lambda entry: float(entry["score"])))
    return chosen


def report(rows: list[dict[str, str]]) -> str:
    """The best pair of each objective as a table."""
    header = ("objective", "learning rate", "γ", "forget probability", "retain probability", "score")
    cells = [
        [str(row["objective"]), *(f"{row[key]:g}" for key in ("learning_rate", "gamma"))]
        + [f"{row[key]:.3f}" for key in ("forget", "retain", "score")]
        for row in best(rows)
    ]
    return markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--objectives", default=",".join(get_args(ObjectiveName)))
    parser.add_argument("--out", type=Path, default=Path("docs/hyperparameters.csv"))
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    if options.out.exists():
        with options.out.open() as file:
            rows = list(csv.DictReader(file))
    done = {(row["objective"], float(row["learning_rate"]), float(row["gamma"]), int(row["seed"])) for row in rows}
    grid = [
        (objective, rate, gamma, seed)
        for objective, rate, gamma, seed in itertools.product(
            options.objectives.split(","), RATES, GAMMAS, options.seeds
        )
        if gamma == GAMMAS[0] or OBJECTIVES[objective].alpha
    ]
    for objective, rate, gamma, seed in progress([cell for cell in grid if cell not in done], "settings"):
        forget, retain = unlearned(trained_world(seed), objective, rate, gamma, seed)
        score = harmonic_mean([1 - forget, retain]) if forget < 1 else 0.0
        values = (objective, f"{rate:g}", f"{gamma:g}", seed, f"{forget:.4f}", f"{retain:.4f}", f"{score:.4f}")
        rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    print(report(rows))


if __name__ == "__main__":
    main()
