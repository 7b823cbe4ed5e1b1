"""Measures compartments: copies of a stand-in that has unlearned the private sources that are none of a client's business.

On the built-in benchmark, a client has 10 of 40 private authors and wants 4 of them forgotten. The server unlearns the other
30 with SimNPO (3 epochs) and makes single copies of the result. It retains public text, and in the arm *kept* also the text of
the client's 10 authors. The client unlearns on these copies, with its own 6 other authors and public text to retain, and its
updates are applied to the model itself. The reference is noise-free unlearning on the model with the same data. Each row goes
to a CSV file when it is done.

    python benchmarks/compartments.py [--seeds 3] [--objectives npo,simnpo] [--out FILE.csv]

*Outside* is the mean probability of the answers about the 30 authors, in the copy and in the model after the update.

Not covered: relearning. What is unlearned comes back quickly, so a compartment is an obstruction, not an erasure.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

from claim import OBJECTIVES
from disclosure import DOCS, probability, read_rows
from mpunlearn import Perturbation, Training, run
from mpunlearn.client.forget import forget
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.server.state import ServerState
from mpunlearn.tables import markdown

HEADER = ("objective", "arm", "seed", "floor", "outside_copy", "forget", "own", "outside")
OWN = 60
"""Questions of the client's 6 other authors."""
REMOVAL = {**OBJECTIVES["simnpo"], "learning_rate": 1e-3}
ARMS = ("noise-free", "compartment", "compartment, kept")


def texts(world: TrainedWorld, folder: Path) -> dict[str, Path]:
    """The files of each party: the client's own other authors, those outside, public text, and what the client retains."""
    lines = {
        split: world.data(split).read_text(encoding="utf-8").splitlines(keepends=True)
        for split in ("retain", "real_authors", "world_facts")
    }
    retain, public = lines["retain"], lines["real_authors"] + lines["world_facts"]
    compartment = world.data("forget").read_text(encoding="utf-8").splitlines(keepends=True) + retain[:OWN]
    parts = {
        "own": retain[:OWN],
        "outside": retain[OWN:],
        "public": public,
        "retain": retain[:OWN] + public,
        "kept": compartment + public,
    }
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


def measure(world: TrainedWorld, objective: ObjectiveName, arm: str, seed: int) -> list[float]:
    """One row of numbers, in the order of the last columns of `HEADER`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = texts(world, folder)
        stand_in = None
        if arm != "noise-free":
            removal = Training(objective="simnpo", epochs=3, seed=seed, batch_size=8, **REMOVAL)
            stand_in = forget(
                world.original,
                forget=files["outside"],
                retain=files["kept" if arm.endswith("kept") else "public"],
                out=folder / "stand-in",
                training=removal,
            )
        options = {"learning_rate": 1e-3, **OBJECTIVES[objective]}
        final = run(
            world.original,
            forget=world.data("forget"),
            retain=files["retain"],
            out=folder / "run",
            stand_in=stand_in,
            perturbation=Perturbation(copies=1, kappa=0.0, common_noise=0),
            rounds=5,
            training=Training(objective=objective, epochs=2, seed=seed, batch_size=8, **options),
        )
        offset = ServerState(folder / "run" / "server" / "state").rounds[0].offset
        held = probability(stand_in or world.original, files["outside"])
        after = [probability(final, file) for file in (world.data("forget"), files["own"], files["outside"])]
        return [offset.floor if offset else 0.0, held, *after]


def table(rows: list[dict[str, str]]) -> str:
    """One row per objective and arm, with means over seeds."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["objective"], row["arm"]), []).append(row)
    lines = []
    for key, group in sorted(groups.items(), key=lambda item: item[0][0]):
        means = {column: statistics.mean(float(row[column]) for row in group) for column in HEADER[3:]}
        numbers = [f"{means.pop('floor'):.1%}", *(f"{mean:.3f}" for mean in means.values())]
        lines.append([*key, *numbers, str(len(group))])
    columns = ["floor", "outside, in the copy", "forget", "own", "outside, after the update", "seeds"]
    return markdown(["objective", "arm", *columns], lines)


def main() -> None:
    """Computes the missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", default="npo,simnpo")
    parser.add_argument("--out", type=Path, default=DOCS / "compartments.csv")
    arguments = parser.parse_args()
    rows = read_rows(arguments.out)
    done = {(row["objective"], row["arm"], row["seed"]) for row in rows}
    for seed in range(arguments.seeds):
        world = trained_world(seed)
        for objective in arguments.objectives.split(","):
            for arm in ARMS:
                if (objective, arm, str(seed)) in done:
                    continue
                values = (objective, arm, seed, *measure(world, objective, arm, seed))
                rows.append(dict(zip(HEADER, map(str, values), strict=True)))
                with arguments.out.open("w", encoding="utf-8", newline="") as lines:
                    writer = csv.DictWriter(lines, HEADER)
                    writer.writeheader()
                    writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
