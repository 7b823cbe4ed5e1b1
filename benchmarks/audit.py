"""Measures what the audit's attacks recover from published copies of the built-in benchmark's model.

Three tables, each the median of several publications: the attacks on all copies of a round; common noise, combined and
with singular values shrunk; and a model in bfloat16 whose public base is 2.5 % away. Cells are the relative parameter
error, or the error relative to the task vector where there is a base, and the share of weights that are equal in bfloat16.

    python benchmarks/audit.py [--publications 3] [--seed 0]
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpunlearn import Perturbation, calibrate, preprocess
from mpunlearn.audit.assess import assess
from mpunlearn.audit.report import ONE, Audit
from mpunlearn.audit.score import Score
from mpunlearn.audit.subject import of_paths
from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.tables import markdown

AWAY = 0.025
"""Distance of the public base from the model in the third table, relative to the model's norm."""
Attack = Callable[[Audit], str]
"""Picks the name of one attack of an audit."""


def audited(model: Path, base: Path | None, times: int, lineage: Path | None, **options: Any) -> list[Audit]:
    """Publishes a round several times and attacks all of its copies."""
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as name:
            folder, perturbation = Path(name), Perturbation(**options)
            own = folder / "lineage"
            if lineage is not None:
                shutil.copytree(lineage, own)
            copies = preprocess(
                model, state=folder / "s", out=folder / "c", base=base, lineage=own, perturbation=perturbation
            ).copies
            found.append(assess(of_paths(model, copies, base)))
    return found


def cell(audits: list[Audit], attack: Attack) -> str:
    """The median result of one attack; empty where it was not tried."""
    scores = [audit.attacks[attack(audit)] for audit in audits if attack(audit) in audit.attacks]
    if not scores:
        return ""
    error = statistics.median(_error(score) for score in scores)
    return f"{error:.2g}, {statistics.median(score.equal_bfloat16 for score in scores):.0%}"


def _error(score: Score) -> float:
    return score.error if score.task_error is None else score.task_error


def best(part: str, without: tuple[str, ...] = ()) -> Attack:
    """The attack with the smallest error among those whose name has a part, and none of some others."""

    def choose(audit: Audit) -> str:
        names = [name for name in audit.attacks if part in name and not any(other in name for other in without)]
        return min(names, key=lambda name: audit.attacks[name].error, default="")

    return choose


def named(name: str) -> Attack:
    """The attack of this name."""
    return lambda audit: name


def round_table(model: Path, times: int) -> str:
    """All copies of a round, by level and denoising."""
    weights = ("minimum norm", "harmonic weights", "known scales")
    columns = {"one copy": ONE, **{name: f"all copies, {name}" for name in weights}}
    lines = []
    for kappa in (0.01, 0.1):
        for denoising, alphas in (("harmonic", None), ("extrapolate", (1.0, -1.0, 2.0))):
            options = {"kappa": kappa, "denoising": denoising, "alphas": alphas, "common_noise": 0}
            audits = audited(model, None, times, None, **options)
            lines.append([f"{kappa:.0%}", f"3, {denoising}", *(cell(audits, named(name)) for name in columns.values())])
    return markdown(["κ", "copies and denoising", *columns], lines)


def common_table(world: TrainedWorld, times: int, folder: Path) -> str:
    """Common noise, combined and shrunk."""
    calibrate(world.original, calibration_text=world.data("world_facts"), lineage=folder / "lineage")
    arms: dict[str, tuple[Any, Path | None]] = {f"gauss {level:.0%}": (level, None) for level in (0.05, 0.1, 0.2)}
    arms["whitened, calibrated"] = ("auto", folder / "lineage")
    lines = []
    for name, (level, lineage) in arms.items():
        options = {"common_noise": level, "common_noise_shape": "gauss" if lineage is None else "whitened"}
        row = [name]
        for base in (None, world.base):
            errors: dict[str, list[float]] = {key: [] for key in ("all copies", "shrunk")}
            for audit in audited(world.original, base, times, lineage, **options):
                attacks = audit.attacks
                plain = best("all copies", ("shrunk", "base"))(audit)
                shrunk = best("shrunk", ("base",) if base is None else ())(audit)
                errors["all copies"].append(attacks[plain].error)
                errors["shrunk"].append(attacks[shrunk].error)
            cells = [f"{statistics.median(values):.3f}" for values in errors.values()]
            row += cells if base is None else cells[1:]
        lines.append(row)
    return markdown(["common noise", "combined", "shrunk", "shrunk, with the public base"], lines)


def base_table(world: TrainedWorld, times: int, folder: Path) -> str:
    """A model in bfloat16, and a base that is `AWAY` from it."""
    model, base = near_base(world, folder)
    columns: dict[str, Attack] = {
        "one copy": best("one copy", ("shrunk",)),
        "one copy, shrunk": best("one copy, aligned, on the base, shrunk"),
        "all copies": best("all copies", ("shrunk",)),
    }
    lines = []
    for kappa, floor in ((0.01, "none"), (0.01, "grid"), (0.1, "none"), (0.5, "none"), (1.0, "none")):
        audits = audited(model, base, times, None, kappa=kappa, noise_floor=floor, common_noise=0)
        label = f"{kappa:.0%}" + (", `--noise-floor grid`" if floor == "grid" else "")
        lines.append([label, *(cell(audits, attack) for attack in columns.values())])
    return markdown(["κ of the task vector", *columns], lines)


def near_base(world: TrainedWorld, folder: Path) -> tuple[Path, Path]:
    """The model in bfloat16, and a base in the direction of the world's base."""
    theta, far = Checkpoint(world.original), Checkpoint(world.base)
    names = sorted(theta.tensors)
    apart = sum(float((theta.read(name) - far.read(name)).square().sum()) for name in names) ** 0.5
    size = sum(float(theta.read(name).square().sum()) for name in names) ** 0.5
    paths = []
    for label, share in (("model", 0.0), ("base", AWAY * size / apart)):
        paths.append(folder / label)
        shutil.copytree(world.original, paths[-1], ignore=shutil.ignore_patterns("*.safetensors*"))
        specs = {name: (torch.bfloat16, theta.tensors[name].shape) for name in names}
        with TensorWriter(paths[-1], specs) as writer:
            for name in names:
                value = theta.read(name)
                writer.write(name, (value + share * (far.read(name) - value)).bfloat16())
    return paths[0], paths[1]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publications", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world, times = trained_world(arguments.seed), arguments.publications
    with tempfile.TemporaryDirectory() as name:
        print(f"{round_table(world.original, times)}\n", flush=True)
        print(f"{common_table(world, times, Path(name))}\n", flush=True)
        print(base_table(world, times, Path(name)))


if __name__ == "__main__":
    main()
