"""Unlearns a Llama that was trained from scratch on real TOFU text, on a GPU if there is one.

The model learns TOFU (arXiv 2401.06121), a second one everything but the forget set. Then AltPO, NPO and SimNPO unlearn
noise-free and with the presets `paper` and `hardened`, and everything that `objectives.py` measures is measured here, with
the time, tokens per second, GPU memory and GPU utilization of every arm. Each objective first gets a learning rate: the one
with the highest overall score noise-free at the first seed. Last, the server's passes are timed on the processor and, if
there is one, on the GPU.

    python benchmarks/at_scale.py --tofu DIR [--size 20m|100m|0.5b] [--seeds 0,1] [--minutes 60] [--work DIR] [--table]

The script does what is missing in its folder and ends after about `--minutes`, the longest step included at most once; call it
again until it says that it is complete. 20m is for two processor cores: it knows 20 authors, of whom 2 are forgotten. The
larger sizes know 180 authors, of whom 20 are forgotten (forget10), and need a GPU.

Not covered: models that were pretrained on other text, and several GPUs.
"""

import argparse
import contextlib
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mpunlearn import Training
from mpunlearn.client.resources import Resources
from mpunlearn.demo.world import Recipe
from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.tables import markdown
from objectives import EPOCHS, FREE, ORIGINAL, RETRAINED, ROUNDS, append, best, perturbation, rows_of, scores, unlearned
from objectives_tables import lasting, ranking
from unlearning_worlds import OutOfTime, Scale, World, examples_of, tofu_world

Row = dict[str, Any]
SIZES = {
    "20m": Scale(2, 18, Recipe(vocabulary=4000, hidden=512, layers=6, heads=8, groups=4, ffn=1408, epochs=14, batch=16,
                               learning_rate=8e-4), "bfloat16"),
    "100m": Scale(20, 160, Recipe(vocabulary=10000, hidden=768, layers=12, heads=12, groups=4, ffn=2304, epochs=20, batch=32,
                                  learning_rate=6e-4), "bfloat16"),
    "0.5b": Scale(20, 160, Recipe(vocabulary=10000, hidden=1280, layers=24, heads=20, groups=4, ffn=3584, epochs=16, batch=32,
                                  learning_rate=3e-4), "bfloat16"),
}  # fmt: skip
"""Name → size. From scratch, TOFU needs a higher learning rate and more epochs than fine-tuning."""
OBJECTIVES: dict[ObjectiveName, dict[str, Any]] = {
    "altpo": {"gamma": 1.0},
    "npo": {"gamma": 1.0},
    "simnpo": {"gamma": 0.125},
}
ARMS = (FREE, "paper", "hardened")
RATES = (5e-5, 1e-4, 2e-4)
BATCH = 32
RELEARN_RATE = 2e-4


class Utilization:
    """Mean utilization of the first GPU while the context is open, in percent, by nvidia-smi; NaN without a GPU."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._done = threading.Event()

    @property
    def mean(self) -> float:
        """The mean so far."""
        return sum(self._samples) / len(self._samples) if self._samples else math.nan

    def __enter__(self) -> "Utilization":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if torch.cuda.is_available():
            self._thread.join()

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._done.wait(0.5):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            with contextlib.suppress(ValueError):
                self._samples.append(float(done.stdout.split()[0] if done.stdout.split() else "nan"))


def measured(
    world: World, objective: ObjectiveName, arm: str, rate: float, seed: int, work: Path, deep: bool = True
) -> Row:
    """Unlearns and measures: one row, without the slow measurements unless deep."""
    training = Training(
        objective, epochs=EPOCHS, learning_rate=rate, batch_size=BATCH, seed=seed, **OBJECTIVES[objective]
    )
    copies = perturbation(arm).copies
    tokens = 2 * ROUNDS * EPOCHS * copies * sum(len(example.input_ids) for example in examples_of(world, "forget"))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=work) as folder, Utilization() as utilization:
        begin = time.monotonic()
        final = unlearned(world, arm, training, Path(folder) / "run", Resources(precision="bfloat16"))
        seconds = time.monotonic() - begin
        used = utilization.mean
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else math.nan
        key = {"world": world.name, "objective": objective, "arm": arm, "seed": seed, "rate": rate, "gamma": math.nan}
        found = scores(world, final, work, deep, RELEARN_RATE)
    return {
        **key, **found, "seconds": seconds, "tokens_per_second": tokens / seconds, "gpu_gb": memory, "gpu_percent": used,
    }  # fmt: skip


def reference(world: World, arm: str, seed: int, work: Path) -> Row:
    """The row of the original or the retrained model."""
    key = {"world": world.name, "objective": "", "arm": arm, "seed": seed, "rate": math.nan, "gamma": math.nan}
    found = scores(world, world.original if arm == ORIGINAL else world.retrained, work, True, RELEARN_RATE)
    costs = dict.fromkeys(("tokens_per_second", "gpu_gb", "gpu_percent"), math.nan)
    return {**key, **found, "seconds": 0.0, **costs}


def steps(world: World, seed: int, first: bool, work: Path) -> Iterator[Callable[[], None]]:
    """What is missing for a seed, one step after the other. The first seed also searches learning rates."""
    search, results = work / "search.csv", work / "results.csv"

    def missing(file: Path, *key: Any) -> bool:
        columns = ("objective", "arm", "seed", "rate") if file == search else ("objective", "arm", "seed")
        return not any(tuple(row[column] for column in columns) == key for row in rows_of(file, world.name))

    for arm in (ORIGINAL, RETRAINED):
        if missing(results, "", arm, seed):
            yield lambda arm=arm: append(results, reference(world, arm, seed, work))  # type: ignore[misc]
    for objective in OBJECTIVES:
        for rate in RATES if first else ():
            if missing(search, objective, FREE, seed, rate):
                yield lambda o=objective, r=rate: append(search, measured(world, o, FREE, r, seed, work, False))  # type: ignore[misc]
    for objective in OBJECTIVES:
        rate = best(row for row in rows_of(search, world.name) if row["objective"] == objective)["rate"]
        for arm in ARMS:
            if missing(results, objective, arm, seed):
                yield lambda o=objective, a=arm, r=rate: append(results, measured(world, o, a, r, seed, work))  # type: ignore[misc]


def passes(world: World, work: Path) -> None:
    """Times the server's passes with three hardened copies on each device; the updates are the copies themselves."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder = Path(name)
            begin = time.monotonic()
            state, how = folder / "state", perturbation("hardened")
            published = preprocess(world.original, state=state, out=folder / "copies", perturbation=how, device=device)
            before = time.monotonic() - begin
            begin = time.monotonic()
            postprocess(published.copies, state=state, out=folder / "new", device=device)
            row = {"world": world.name, "device": device, "preprocess": before, "postprocess": time.monotonic() - begin}
        append(work / "passes.csv", row)


def report(work: Path, name: str) -> str:
    """The tables of what was measured so far."""
    rows = rows_of(work / "results.csv", name)
    costs = [
        [row["objective"], row["arm"], f"{row['seed']:.0f}", f"{row['rate']:g}"]
        + [f"{row[column]:.4g}" for column in ("seconds", "tokens_per_second", "gpu_gb", "gpu_percent")]
        for row in rows
        if row["objective"]
    ]
    header = ("objective", "arm", "seed", "learning rate", "seconds", "tokens/s", "GPU GB", "GPU %")
    return "\n\n".join([ranking(rows), lasting(rows), markdown(header, costs)])


def main() -> None:
    """Does the missing steps until the time is up, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="directory with TOFU's JSON files")
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--work", type=Path, default=Path("at-scale"), help="folder for models and results")
    parser.add_argument("--table", action="store_true", help="only print the tables of the existing rows")
    options = parser.parse_args()
    deadline, work = time.monotonic() + 60 * options.minutes, options.work.resolve()
    name, device = f"tofu-{options.size}", "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for seed in () if options.table else options.seeds:
            world = tofu_world(options.tofu, name, SIZES[options.size], seed, work, device, deadline)
            if not rows_of(work / "passes.csv", name):
                passes(world, work)
            while (step := next(steps(world, seed, seed == options.seeds[0], work), None)) is not None:
                if time.monotonic() > deadline:
                    raise OutOfTime(f"seed {seed}: stopped before the next arm")
                step()
                print(f"{options.minutes - (deadline - time.monotonic()) / 60:.0f} min: one more step", flush=True)
        print("complete")
    except OutOfTime as stopped:
        print(f"{stopped}; call again to go on")
    if (work / "results.csv").is_file():
        print(report(work, name))


if __name__ == "__main__":
    main()
