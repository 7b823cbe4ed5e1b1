"""Measures what MPU costs compared with noise-free unlearning, and how much of that cost harmonic averaging avoids.

Every run is one row of a CSV file: an objective, a seed, and an arm, that is, one configuration of MPU such as a copy
design at a noise level. For each objective and seed, all arms share the model, the batches, the budget and the
hyperparameters. *Noise-free* is the same training by a single party that has both model and data. The table shows the
mean difference of each arm from noise-free over seeds, as a percentage of noise-free, with a 95 % confidence interval
over paired seeds (Student's t). Existing rows are not computed again, so an interrupted benchmark can be resumed.

    python benchmarks/claim.py [--suite claim|causes|orders] [--seeds 5] [--objectives npo,simnpo] [--out DIR] [--table]

`--suite claim` tests the paper's claim. `--suite causes` measures, at a noise level of 10 % of the parameters, where
the loss comes from and what reduces it. `--suite orders` measures how the deviation of the weights decreases with the
noise level, by optimizer and copy design.

Runs on the built-in benchmark with two single-threaded processes, or on any checkpoint and data (on a GPU if there is
one):

    python benchmarks/claim.py --model DIR --benchmark tofu --data-root DIR --base DIR --retrained DIR --learning-rate
    1e-5

All metrics are scores (higher is better) under OpenUnlearning's names: retain probability (retain_Q_A_Prob), retain
ROUGE-L recall (retain_Q_A_ROUGE), model utility, forget truth ratio, and one minus forget probability and forget
ROUGE-L recall. `weights` is the distance between the final weights and the noise-free ones, relative to how far the
latter moved in training.
"""

import argparse
import csv
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from claim_arms import RETRAINED, SUITES, Arm
from claim_tables import SCORES, by_score, differences, figure, table
from mpunlearn import Perturbation, Training
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.client import Client
from mpunlearn.demo import models
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.lm.model import load
from mpunlearn.lm.sources import Data
from mpunlearn.local import run
from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess

EPOCHS = 10
PAPER: tuple[ObjectiveName, ...] = ("grad-ascent", "grad-diff", "npo", "dpo", "simnpo", "undial", "satimp")
"""The seven objectives of the paper."""
OBJECTIVES: dict[ObjectiveName, dict[str, Any]] = {
    "grad-ascent": {"learning_rate": 2e-4},
    "grad-diff": {"gamma": 0.1},
    "npo": {"gamma": 0.3},
    "dpo": {},
    "simnpo": {"gamma": 1.0, "parameters": {"beta": 2.5}},
    "undial": {"alpha": 1.0, "parameters": {"beta": 30.0}},
    "satimp": {"gamma": 2.0, "parameters": {"beta1": 1.0}},
    "wga": {"gamma": 0.5},
}
"""Hyperparameters on the built-in benchmark, tuned for noise-free unlearning at seed 0; the same for every arm."""
INVERTED = ("forget_Q_A_Prob", "forget_Q_A_ROUGE")
"""Metrics that are high if nothing was forgotten. The score is one minus the metric."""


@dataclass(frozen=True)
class Subject:
    """A model to unlearn on, and the data for training and evaluation."""

    original: Path
    base: Path | None
    retrained: Path | None
    forget: str
    retain: str
    sets: dict[str, Questions]
    data: Data = field(default_factory=Data)
    training: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of every arm."""
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Source:
    """Where the subject of a seed comes from: the built-in benchmark, or a given model and data."""

    model: Path | None = None
    base: Path | None = None
    retrained: Path | None = None
    benchmark: str = "tofu"
    forget_split: str = "forget10"
    data_root: str | None = None
    learning_rate: float = 1e-5
    batch_size: int = 32
    max_new_tokens: int = 200

    def subject(self, seed: int, objective: ObjectiveName) -> Subject:
        """The subject of one seed. Only the built-in benchmark has a different model for every seed."""
        data = Data(data_root=self.data_root)
        if self.model is None:
            world = models.trained_world(seed)
            sets = read_sets(str(world.path / "data"), "", None, data)
            training = {"learning_rate": 1e-3, "batch_size": 8, **OBJECTIVES[objective]}
            paths = (str(world.data("forget")), str(world.data("retain")))
            return Subject(world.original, world.base, world.retrained, *paths, without_holdout(sets), data, training)
        sets = read_sets(self.benchmark, self.forget_split, None, data)
        if self.benchmark == "tofu":
            retain = f"retain{100 - int(self.forget_split.removeprefix('forget')):02d}"
            paths = (f"tofu/{self.forget_split}", f"tofu/{retain}")
        else:
            paths = (f"{self.benchmark}/forget.jsonl", f"{self.benchmark}/retain.jsonl")
        training = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        return Subject(
            self.model, self.base, self.retrained, *paths, without_holdout(sets), data, training, self.max_new_tokens
        )


def without_holdout(sets: dict[str, Questions]) -> dict[str, Questions]:
    """The sets that the scores are computed from."""
    return {name: questions for name, questions in sets.items() if name != "holdout"}


def one(source: Source, objective: ObjectiveName, seed: int, arm: Arm, free: str, out: str) -> dict[str, Any]:
    """Unlearns and evaluates; returns the row for the CSV file.

    Args:
        source: where the subject comes from.
        objective: the unlearning objective.
        seed: the seed.
        arm: the configuration.
        free: path of the noise-free model with the same objective, seed and budget, if it exists.
        out: where to save the final model if the arm is a baseline of others.
    """
    import torch

    torch.set_num_threads(1)
    subject = source.subject(seed, objective)
    options = {**subject.training, **arm.training}
    training = Training(objective=objective, epochs=EPOCHS // arm.rounds, seed=seed, **options)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        final = subject.retrained if arm.name == RETRAINED else unlearned(subject, arm, training, Path(folder))
        if final is None:
            raise SystemExit(f"the arm {RETRAINED!r} requires --retrained")
        seconds = time.monotonic() - begin
        scores = evaluated(final, subject)
        reference = Path(free)
        weights = distance(final, reference, subject.original) if reference.is_dir() else 0.0
        if arm.baseline == arm.name:
            shutil.copytree(final, out, dirs_exist_ok=True)
    return {"objective": objective, "seed": seed, "arm": arm.name, **scores, "weights": weights, "seconds": seconds}


def unlearned(subject: Subject, arm: Arm, training: Training, folder: Path) -> Path:
    """Unlearns with the configuration of an arm; returns the final model."""
    perturbation = Perturbation(**{"common_noise": 0, **arm.perturbation})
    base = subject.base if arm.base else None
    if not arm.own_batches:
        return run(
            subject.original,
            forget=subject.forget,
            retain=subject.retain,
            out=folder / "run",
            base=base,
            rounds=arm.rounds,
            eta=arm.eta,
            perturbation=perturbation,
            training=training,
            data=subject.data,
        )
    theta, state = subject.original, folder / "state"
    clients = [
        Client(
            forget=subject.forget,
            retain=subject.retain,
            memory=folder / "memory",
            training=replace(training, seed=training.seed + 1000 * copy),
            data=subject.data,
        )
        for copy in range(1, perturbation.copies + 1)
    ]
    for number in range(1, arm.rounds + 1):
        copies = preprocess(
            theta, state=state, out=folder / f"copies-{number}", base=base, perturbation=perturbation
        ).copies
        updates = [
            client.unlearn(copy, folder / f"update-{number}-{copy.name}")
            for client, copy in zip(clients, copies, strict=True)
        ]
        theta = postprocess(updates, state=state, out=folder / f"theta-{number}", eta=arm.eta, dtype="float32")
    return theta


def evaluated(checkpoint: Path, subject: Subject) -> dict[str, float]:
    """The scores of a model."""
    import torch

    model, tokenizer = load(checkpoint)
    if torch.cuda.is_available():
        model = model.cuda()
    values = tofu.summarize(
        tofu.measure(model, tokenizer, subject.sets, max_new_tokens=subject.max_new_tokens, membership=False)
    )
    return {name: 1 - values[name] if name in INVERTED else values[name] for name in SCORES}


def distance(final: Path, free: Path, original: Path) -> float:
    """‖θ - θ_free‖ / ‖θ_free - θ_0‖ over all weights."""
    weights, noise_free, initial = Checkpoint(final), Checkpoint(free), Checkpoint(original)
    apart = sum(float((weights.read(name) - noise_free.read(name)).square().sum()) for name in weights.tensors)
    moved = sum(float((noise_free.read(name) - initial.read(name)).square().sum()) for name in weights.tensors)
    return float((apart / moved) ** 0.5)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows computed so far."""
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as lines:
        return [
            {key: value if key in ("objective", "arm") else float(value) for key, value in row.items()}
            for row in csv.DictReader(lines)
        ]


def compute(suite: str, objectives: Iterable[ObjectiveName], seeds: int, out: Path, source: Source) -> None:
    """Computes the missing rows of a suite, baselines first, and appends each row when it is done."""
    file, arms = out / f"{suite}.csv", arms_of(suite, source)
    done = {(row["objective"], int(row["seed"]), row["arm"]) for row in rows_of(file)}
    if source.model is None:
        for seed in range(seeds):
            models.trained_world(seed)
    with ProcessPoolExecutor(2 if source.model is None else 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for stage in (True, False):  # the baselines come first
            jobs = [
                pool.submit(
                    one, source, objective, seed, arm, str(kept(out, objective, seed, arm.baseline)), str(target)
                )
                for arm in arms
                for seed in range(seeds)
                for objective in objectives
                if (objective, seed, arm.name) not in done and (arm.baseline == arm.name) is stage
                for target in [kept(out, objective, seed, arm.name)]
            ]
            for number, job in enumerate(as_completed(jobs), start=1):
                append(file, job.result())
                print(f"{number} of {len(jobs)}: {job.result()['objective']}, {job.result()['arm']}", flush=True)


def arms_of(suite: str, source: Source) -> list[Arm]:
    """The arms of a suite that are possible with the given models."""
    own = source.model is not None
    return [
        arm
        for arm in SUITES[suite]()
        if not (own and ((arm.base and source.base is None) or (arm.name == RETRAINED and source.retrained is None)))
    ]


def kept(out: Path, objective: str, seed: int, arm: str) -> Path:
    """The path of a baseline's model."""
    return out / "models" / f"{objective}-{seed}-{arm.replace(' ', '-').replace(',', '')}"


def append(file: Path, row: dict[str, Any]) -> None:
    """Appends a row to the CSV file."""
    new = not file.is_file()
    with open(file, "a", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Computes missing rows, then writes tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="claim")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--out", type=Path, default=Path("claim"))
    parser.add_argument("--table", action="store_true", help="only write the tables of the existing rows")
    parser.add_argument("--model", type=Path, help="the checkpoint to unlearn on (default: the built-in benchmark)")
    parser.add_argument("--base", type=Path, help="the public checkpoint that --model was fine-tuned from")
    parser.add_argument("--retrained", type=Path, help="a checkpoint trained without the forget set")
    parser.add_argument("--benchmark", default="tofu", help="tofu, or a folder in the same format")
    parser.add_argument("--forget-split", default="forget10")
    parser.add_argument("--data-root", help="folder with a local mirror of TOFU")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="for --model")
    parser.add_argument("--batch-size", type=int, default=32, help="for --model")
    arguments = parser.parse_args()
    names = ("model", "base", "retrained", "benchmark", "forget_split", "data_root", "learning_rate", "batch_size")
    source = Source(**{name: getattr(arguments, name) for name in names})
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        compute(arguments.suite, arguments.objectives.split(","), arguments.seeds, arguments.out, source)
    arms = arms_of(arguments.suite, source)
    compared = differences(rows_of(arguments.out / f"{arguments.suite}.csv"), arms)
    text = f"{table(compared, arms)}\n\n{by_score(compared, arms)}\n"
    (arguments.out / f"{arguments.suite}-tables.md").write_text(text, encoding="utf-8")
    figure(compared, arms, arguments.out / arguments.suite)
    print(text)


if __name__ == "__main__":
    main()
