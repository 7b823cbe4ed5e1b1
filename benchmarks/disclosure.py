"""Measures what common noise costs: forgetting and retaining at each level, beside the error that it leaves to a client.

Runs every arm on the built-in benchmark, for several seeds and objectives, and appends each row to a CSV file, so that an
interrupted run goes on where it stopped. *Floor* is ‖c‖/‖θ‖, the parameter error that is left to a client that pools all
copies of all rounds. *Deviation* is the mean absolute difference from noise-free unlearning of the forget and retain
probabilities, in points.

    python benchmarks/disclosure.py [--seeds 5] [--objectives npo,simnpo,grad-diff] [--out FILE.csv]
"""

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from claim import OBJECTIVES
from mpunlearn import Perturbation, Training, calibrate, run
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.demo.table import measure_in
from mpunlearn.presets import PRESETS
from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.server.state import ServerState
from mpunlearn.tables import markdown

KAPPA = 0.05
HEADER = ("objective", "arm", "seed", "floor", "forget", "retain")


@dataclass(frozen=True)
class Arm:
    """One way of publishing copies."""

    perturbation: Perturbation
    rounds: int = 5
    epochs: int = 2
    calibrated: bool = False
    """Whether the level is found by `calibrate`."""


def noisy(level: float, copies: int = 3) -> Perturbation:
    """Gaussian common noise of a level, with the paper's noise if there are several copies."""
    kappa = KAPPA if copies > 1 else 0.0
    return Perturbation(copies=copies, kappa=kappa, common_noise=level, common_noise_shape="gauss")


def preset(name: str) -> Arm:
    """The arm of a preset, calibrated."""
    values = dict(PRESETS[name])
    rounds, epochs = values.pop("rounds"), values.pop("epochs")
    return Arm(Perturbation(**values), rounds, epochs, calibrated=True)


ARMS: dict[str, Callable[[], Arm]] = {
    "noise-free": lambda: Arm(Perturbation(copies=1, kappa=0.0, common_noise=0)),
    "paper, κ 5 %": lambda: Arm(noisy(0.0)),
    "gauss 5 %": lambda: Arm(noisy(0.05)),
    "gauss 10 %": lambda: Arm(noisy(0.1)),
    "gauss 20 %": lambda: Arm(noisy(0.2)),
    "hardened": lambda: preset("hardened"),
    "lean": lambda: preset("lean"),
}


def measure(world: TrainedWorld, objective: ObjectiveName, arm: Arm, seed: int) -> tuple[float, float, float]:
    """The floor, and the probabilities of the forget and the retain answers after unlearning."""
    with tempfile.TemporaryDirectory() as folder:
        lineage = Path(folder) / "lineage"  # one of its own for every arm
        if arm.calibrated:
            calibrate(world.original, calibration_text=world.data("world_facts"), lineage=lineage)
        options = {"learning_rate": 1e-3, "batch_size": 8, **OBJECTIVES[objective]}
        training = Training(objective=objective, epochs=arm.epochs, seed=seed, **options)
        out = Path(folder) / "run"
        final = run(
            world.original,
            forget=world.data("forget"),
            retain=world.data("retain"),
            out=out,
            lineage=lineage,
            rounds=arm.rounds,
            perturbation=arm.perturbation,
            training=training,
        )
        offset = ServerState(out / "server" / "state").rounds[0].offset
        line = measure_in(world, "", final)
        return offset.floor if offset else 0.0, line.forget.probability, line.retain.probability


def table(rows: list[dict[str, str]]) -> str:
    """One row per objective and arm, with means over seeds."""
    lines = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        mine = [row for row in rows if row["objective"] == objective]
        free = {row["seed"]: row for row in mine if row["arm"] == "noise-free"}
        for arm in dict.fromkeys(row["arm"] for row in mine):
            of_arm = [row for row in mine if row["arm"] == arm]
            mean = {key: statistics.mean(float(row[key]) for row in of_arm) for key in HEADER[3:]}
            deviations = [
                100 * abs(float(row[key]) - float(free[row["seed"]][key]))
                for row in of_arm
                for key in ("forget", "retain")
                if row["seed"] in free
            ]
            deviation = f"{statistics.mean(deviations):.1f}" if deviations else ""
            numbers = [f"{mean['floor']:.1%}", f"{mean['forget']:.3f}", f"{mean['retain']:.3f}", deviation]
            lines.append([objective, arm, *numbers, str(len(of_arm))])
    return markdown(["objective", "arm", "floor", "forget", "retain", "deviation, points", "seeds"], lines)


def main() -> None:
    """Runs what is missing in the file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objectives", default="npo,simnpo,grad-diff")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "disclosure.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    if arguments.out.exists():
        with arguments.out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["objective"], row["arm"], row["seed"]) for row in rows}
    for seed in range(arguments.seeds):
        world = trained_world(seed)
        for objective in arguments.objectives.split(","):
            for name, make in ARMS.items():
                if (objective, name, str(seed)) in done:
                    continue
                values = (objective, name, seed, *measure(world, objective, make(), seed))
                rows.append(dict(zip(HEADER, map(str, values), strict=True)))
                with arguments.out.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, HEADER)
                    writer.writeheader()
                    writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
