"""Compares all objectives under MPU, with hyperparameters found in the same way for each, and sorts them by their scores.

Two steps, each with one row per cell in a CSV file; existing rows are not computed again:

1. *search*: for every objective, `BUDGET` pairs of learning rate and weight γ of the forget loss, noise-free, at seed 0.
   Two thirds of the pairs are Sobol points over the whole range, the others Sobol points in a quarter of it around the best
   pair so far. Best is the highest overall score, the harmonic mean of memorization, privacy and utility; where that is 0,
   the highest sum of the three.
2. *results*: every objective with its best pair, for other seeds, noise-free and with the presets `paper` and `hardened`.
   Measured are the scores of `evaluate`, UDS, leak@16, how much relearning and 4-bit rounding bring back, and processor
   seconds of unlearning. An arm such as "SAM 0.05" is noise-free unlearning with that `--sam-radius`.

    python benchmarks/objectives.py [--world demo|tofu-20] [--tofu DIR] [--seeds 1,2,3] [--objectives npo,…] [--arms …]
        [--out docs/objectives] [--work DIR] [--table]

Relearning uses 32 steps on four examples at the world's own learning rate of unlearning with NPO, more than enough to bring
back what was only hidden. Not covered: other hyperparameters than rate and γ, which keep their defaults, and large models.
"""

import argparse
import csv
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, get_args

from mpunlearn import Perturbation, Training, evaluate
from mpunlearn.client.resources import Resources
from mpunlearn.demo.local import NOISE_FREE
from mpunlearn.lm.sources import Data
from mpunlearn.local import run
from mpunlearn.presets import PRESETS
from mpunlearn.protocol.objectives import OBJECTIVES, ObjectiveName
from objectives_tables import report
from unlearning_worlds import TOFU_20, World, demo_world, tofu_world

RATES, GAMMAS = (1e-4, 6e-3), (0.03, 3.0)
"""Ranges of the search, logarithmic. γ is not searched without a retain term, where it hardly matters under Adam."""
BUDGET, FIRST = 12, 8
"""Pairs per objective, and how many of them cover the whole range."""
FREE, RETRAINED, ORIGINAL = "noise-free", "retrained", "original"
SETTINGS = ("copies", "kappa", "denoising", "common_noise", "reparameterization")
ROUNDS, EPOCHS, BATCH = 5, 2, 8
SAMPLES = 16
RELEARN_RATE = 1e-3
NEW_TOKENS = 48
SCORES = {
    "overall": "overall_score",
    "memorization": "memorization_score",
    "privacy": "privacy_score",
    "utility": "utility_score",
    "forget_prob": "forget_Q_A_Prob",
    "retain_prob": "retain_Q_A_Prob",
}
DEPTH = {"uds": "UDS", "leak": f"leak@{SAMPLES}", "R": "relearning_score", "Q": "quantization_score"}
CURVES = {
    "relearned": "forget_Q_A_Prob by relearning steps",
    "relearned_elsewhere": "forget_Q_A_Prob by relearning steps on the retain set",
}
Row = dict[str, Any]


def world_of(name: str, tofu: Path | None, work: Path, seed: int) -> World:
    """The world of a seed, trained if need be."""
    if name == "demo":
        return demo_world(seed, work)
    if tofu is None:
        raise SystemExit(f"--world {name}: needs --tofu")
    return tofu_world(tofu, name, TOFU_20, seed, work)


def perturbation(arm: str) -> Perturbation:
    """How an arm publishes copies."""
    preset = PRESETS.get(arm, NOISE_FREE)
    return Perturbation(**{name: value for name, value in preset.items() if name in SETTINGS})


def training_plan(objective: ObjectiveName, arm: str, rate: float, gamma: float, seed: int) -> Training:
    """How an arm trains."""
    return Training(
        objective,
        epochs=EPOCHS,
        learning_rate=rate,
        batch_size=BATCH,
        gamma=gamma if OBJECTIVES[objective].alpha else None,
        seed=seed,
        sam_radius=float(arm.split()[-1]) if arm.startswith("SAM") else 0.0,
        parameters={"layer": 0.0} if "layer" in OBJECTIVES[objective].parameters else {},  # the models have two layers
    )


def unlearned(world: World, arm: str, training: Training, out: Path, resources: Resources | None = None) -> Path:
    """Unlearns; returns the final model."""
    return run(
        world.original,
        forget=world.training("forget"),
        retain=world.training("retain"),
        out=out,
        rounds=ROUNDS,
        perturbation=perturbation(arm),
        training=training,
        data=Data(alternate_key="wrong_answer") if training.objective == "altpo" else Data(),
        resources=resources,
    )


def scores(world: World, checkpoint: Path, work: Path, deep: bool, relearn_rate: float = RELEARN_RATE) -> Row:
    """The columns that are measured on a checkpoint.

    Args:
        world: where it comes from.
        checkpoint: the checkpoint.
        work: for the cache of the measurements of original and retrained model.
        deep: whether to measure those of `DEPTH` and `CURVES`, too.
        relearn_rate: learning rate of relearning.
    """
    more: dict[str, Any] = (
        {"depth": True, "samples": SAMPLES, "robustness": True, "relearn_rate": relearn_rate} if deep else {}
    )
    found = evaluate(
        checkpoint,
        benchmark=str(world.benchmark),
        retain_model=world.retrained,
        original_model=world.original,
        max_new_tokens=NEW_TOKENS,
        cache=work / "evaluations",
        **more,
    )
    row: Row = {
        column: found.metrics.get(name, math.nan) for column, name in {**SCORES, **(DEPTH if deep else {})}.items()
    }
    for column, curve in CURVES.items() if deep else ():
        row[column] = list(found.robustness[curve]["model"].values())[-1]
    return row


def cell(
    world: Callable[[int], World],
    objective: ObjectiveName,
    arm: str,
    rate: float,
    gamma: float,
    seed: int,
    work: Path,
    deep: bool,
) -> Row:
    """One row: unlearns and measures in this process, with one thread."""
    import torch

    torch.set_num_threads(1)
    place = world(seed)
    key = {"world": place.name, "objective": objective, "arm": arm, "seed": seed, "rate": rate, "gamma": gamma}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        begin = time.process_time()
        if arm in (ORIGINAL, RETRAINED):
            final = place.original if arm == ORIGINAL else place.retrained
        else:
            final = unlearned(place, arm, training_plan(objective, arm, rate, gamma, seed), Path(folder) / "run")
        seconds = time.process_time() - begin
        return {**key, **scores(place, final, work, deep), "seconds": seconds}


def proposals(objective: ObjectiveName, rows: list[Row]) -> list[tuple[float, float]]:
    """The pairs of learning rate and γ that the search tries, as far as the rows so far determine them."""
    from scipy.stats import qmc

    def points(count: int, centre: tuple[float, float] | None, seed: int) -> list[tuple[float, float]]:
        unit = qmc.Sobol(2, seed=seed).random(16)[:count]
        pairs = []
        for point in unit:
            pair = []
            for number, (low, high) in enumerate((RATES, GAMMAS)):
                bottom, width = math.log(low), math.log(high / low)
                value = bottom + width * point[number]
                if centre is not None:
                    value = min(
                        max(math.log(centre[number]) + width / 4 * (point[number] - 0.5), bottom), bottom + width
                    )
                pair.append(float(f"{math.exp(value):.3g}"))
            pairs.append((pair[0], pair[1] if OBJECTIVES[objective].alpha else 1.0))
        return pairs

    first = points(FIRST, None, 0)
    done = [row for row in rows if row["objective"] == objective]
    if {(row["rate"], row["gamma"]) for row in done} < set(first):
        return first
    near = best([row for row in done if (row["rate"], row["gamma"]) in set(first)])
    return first + points(BUDGET - FIRST, (near["rate"], near["gamma"]), 1)


def best(rows: Iterable[Row]) -> Row:
    """The row with the highest overall score; among rows without any, the one with the highest sum of its parts."""

    def value(row: Row) -> tuple[float, float]:
        parts = [row[part] for part in ("memorization", "privacy", "utility")]
        return (
            row["overall"] if math.isfinite(row["overall"]) else 0.0,
            sum(part for part in parts if math.isfinite(part)),
        )

    return max(rows, key=value)


def rows_of(file: Path, world: str | None = None) -> list[Row]:
    """The rows computed so far, of one world or of all."""
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as lines:
        rows = [
            {key: value if key in ("world", "objective", "arm") else float(value) for key, value in row.items()}
            for row in csv.DictReader(lines)
        ]
    return [row for row in rows if world in (None, row["world"])]


def append(file: Path, row: Row) -> None:
    """Appends a row to a CSV file."""
    new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(row))
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def compute(pool: ProcessPoolExecutor, jobs: list[Callable[[], Row]], file: Path) -> None:
    """Runs jobs in the pool and appends each row when it is done."""
    for number, job in enumerate(as_completed([pool.submit(job) for job in jobs]), start=1):
        row = job.result()
        append(file, row)
        print(f"{number} of {len(jobs)}: {row['objective']}, {row['arm']}, {row['overall']:.3f}", flush=True)


def searches(make: Callable[..., Row], names: list[ObjectiveName], rows: list[Row]) -> list[Callable[[], Row]]:
    """The jobs of the search that are missing and already determined."""
    done = {(row["objective"], row["rate"], row["gamma"]) for row in rows}
    pairs = {(name, *pair) for name in names for pair in proposals(name, rows)}
    return [partial(make, name, FREE, rate, gamma, 0, deep=False) for name, rate, gamma in sorted(pairs - done)]


def comparisons(
    make: Callable[..., Row],
    names: list[ObjectiveName],
    arms: list[str],
    seeds: list[int],
    search: list[Row],
    results: list[Row],
) -> list[Callable[[], Row]]:
    """The missing jobs of the comparison, seed by seed."""
    done = {(row["objective"], row["arm"], row["seed"]) for row in results}
    cells = [(arm, "", 0.0, 0.0) for arm in (ORIGINAL, RETRAINED)]
    for name in names:
        chosen = best(row for row in search if row["objective"] == name)
        cells += [(arm, name, chosen["rate"], chosen["gamma"]) for arm in arms]
    return [
        partial(make, name, arm, rate, gamma, seed, deep=True)
        for seed in seeds
        for arm, name, rate, gamma in cells
        if (name, arm, seed) not in done
    ]


def main() -> None:
    """Computes missing rows, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("demo", "tofu-20"), default="demo")
    parser.add_argument("--tofu", type=Path, help="directory with TOFU's JSON files")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--objectives", default=",".join(get_args(ObjectiveName)))
    parser.add_argument("--arms", default=f"{FREE},paper,hardened")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/objectives"), help="folder of search.csv and results.csv"
    )
    parser.add_argument("--work", type=Path, default=Path("objectives-work"), help="folder for models and measurements")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the tables of the existing rows")
    options = parser.parse_args()
    search, results = options.out / "search.csv", options.out / "results.csv"
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        world = partial(world_of, options.world, options.tofu, options.work.resolve())
        for seed in (0, *options.seeds):
            scores(world(seed), world(seed).retrained, options.work, deep=False)  # before several processes need it
        names: list[ObjectiveName] = options.objectives.split(",")
        arms = options.arms.split(",")
        make = partial(cell, world, work=options.work.resolve())
        with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in range(2):
                compute(pool, searches(make, names, rows_of(search, options.world)), search)
            rows = rows_of(search, options.world), rows_of(results, options.world)
            compute(pool, comparisons(make, names, arms, options.seeds, *rows), results)
    print(report(rows_of(search), rows_of(results)))


if __name__ == "__main__":
    main()
