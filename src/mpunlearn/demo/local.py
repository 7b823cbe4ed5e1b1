"""The demo: a small model unlearns four fictitious authors. It measures what that costs, and what the client could learn.

Six models are compared on the built-in benchmark: the original, one retrained without the four authors, noise-free
unlearning, and MPU (Multiple Perturbed Copies Unlearning) with the presets `paper`, `hardened` and `lean`. All unlearning
goes through `run` with the same number of epochs and the same hyperparameters. The published copies of every run are then
attacked (`audit`), to measure how close a client that pools all of them comes to the server's model.

At the end, the report of the hardened run is written. It also shows how the models of three runs change from round to round:
noise-free, hardened, and, for the report only, one with a single noisy copy, whose noise nothing cancels.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, new_directory, write_json
from mpunlearn.presets import PRESETS
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training
from mpunlearn.report.data import ORIGINAL, RETRAINED, THIS_RUN
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.audit.report import Audit
    from mpunlearn.demo.models import TrainedWorld
    from mpunlearn.demo.table import Line

TRAINING = Training(objective="npo", learning_rate=1e-3, batch_size=8, gamma=0.1)
NOISE_FREE = {
    "copies": 1, "kappa": 0.0, "common_noise": 0.0, "reparameterization": "none", "rounds": 5, "epochs": 2,
}  # fmt: skip
SINGLE_COPY = {"copies": 1, "kappa": 0.05, "common_noise": 0.0, "rounds": 5, "epochs": 2}
KEPT = "hardened"
"""The last run, whose files are kept and which is audited in full."""
ARMS: dict[str, Mapping[str, Any]] = {
    "noise-free unlearning": NOISE_FREE,
    **{f"MPU, {name}": {"rounds": 5, "epochs": 2, **PRESETS[name]} for name in ("paper", "lean", KEPT)},
}
LABELS = {"noise-free unlearning": "noise-free", "single copy": "single copy", f"MPU, {KEPT}": THIS_RUN}
"""Runs that are measured after every round, and their labels in the report."""
QUICK = ("noise-free unlearning", f"MPU, {KEPT}")
"""The runs of a quick demo."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    seed: int
    training: dict[str, Any]
    models: "list[Line]"
    audit: "Audit"
    """What a client that pools all copies of the hardened run learns of the server's model."""
    seconds: dict[str, float]
    out: str
    pages: dict[str, str]
    """Party → its page of the report."""

    def text(self) -> str:
        """The table, what the client could learn, and where the report is."""
        from mpunlearn.demo.table import table

        end = (
            f"Took {self.seconds['all']:.0f} s. Both sides of the hardened run and these numbers are in {self.out}\n"
            f"The report: {' and '.join(self.pages.values())}"
        )
        return f"{table(self.models)}\n{learned(self.audit)}\n{end}"

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        return {**asdict(replace(self, audit=None)), "audit": self.audit.to_json()}  # type: ignore[arg-type]


def learned(audit: "Audit") -> str:
    """The three figures of an audit in words: parameter error, equal weights, and function."""
    from mpunlearn.audit.report import ONE

    best, one = audit.attacks[audit.strongest], audit.behaviors[ONE]
    floor = "" if audit.floor is None else f" (announced for attacks that average copies: {audit.floor:.1%})"
    return (
        f"A client that pools all {audit.held} copies of the hardened run is left with a parameter error of {best.error:.1%} "
        f"of the weights' norm{floor}, and {best.equal_bfloat16:.1%} of the weights equal the server's in bfloat16. Used as "
        f"a model, a copy gives the retain answers a probability of {one.probability:.3f}: the parameters are hidden, but "
        "not what the model can do."
    )


def demo(*, out: str | Path = "mpu-demo", seed: int = 0, quick: bool = False) -> DemoResult:
    """Unlearns four fictitious authors in four ways, and measures the cost and what the client could learn.

    The first call trains the models of the built-in benchmark and caches them.

    Args:
        out: A new directory for result.json, both sides of the hardened run (OUT/server, OUT/client, OUT/exchange,
            OUT/final), and its report (OUT/report-server.html, OUT/report-client.html).
        seed: Seed for the fictitious data, the models and the order of batches. The server's secrets never depend on a
            seed.
        quick: Unlearn two authors of ten, noise-free and with the preset hardened only, in less than a minute
            on two cores.

    Returns:
        What was measured.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    needs("client", "demo")
    from mpunlearn.audit.assess import Texts, assess
    from mpunlearn.audit.subject import of_run
    from mpunlearn.demo.models import trained_world
    from mpunlearn.demo.reporting import write_answers, write_metrics, write_rounds
    from mpunlearn.demo.table import line_of, metrics_of, sets_of
    from mpunlearn.demo.world import QUICK_RECIPE, Recipe
    from mpunlearn.report.report import report

    target = as_path(out, "--out")
    if target.exists():
        raise FileError(f"{target}: already exists; choose another --out, or remove this one")
    begin = time.monotonic()
    with new_directory(target) as folder:
        world = trained_world(seed, QUICK_RECIPE if quick else Recipe())
        lineage = calibrated(world)
        prepared = time.monotonic() - begin
        sets = sets_of(world)
        lines = []
        for label, checkpoint in ((ORIGINAL, world.original), (RETRAINED, world.retrained)):
            write_metrics(folder, label, metrics := metrics_of(checkpoint, sets))
            lines.append(line_of(label, metrics))
        runs = {"single copy": SINGLE_COPY, **ARMS}
        runs = {name: options for name, options in runs.items() if name in QUICK or not quick}
        for name, options in progress(runs.items(), "unlearning"):
            shutil.rmtree(folder / "run", ignore_errors=True)
            started = time.monotonic()
            final = _unlearn(world, folder / "run", lineage, options, seed, keep_models=name in LABELS)
            seconds = time.monotonic() - started
            if name in LABELS:
                models = [folder / "run" / "server" / f"round-{number}" for number in range(1, options["rounds"])]
                write_rounds(folder, LABELS[name], world, [*models, final])
                for model in models:
                    shutil.rmtree(model)
            if name in ARMS:
                texts = Texts(world.data("retain")) if name.endswith(KEPT) else None
                found = assess(of_run(folder / "run"), texts)
                write_metrics(folder, LABELS.get(name, name), metrics := metrics_of(final, sets))
                lines.append(line_of(name, metrics, found.attacks[found.strongest].error, seconds))
        for part in (folder / "run").iterdir():
            part.rename(folder / part.name)
        (folder / "run").rmdir()
        write_json(folder / "server" / "audit.json", found.to_json(), 0o600)
        write_answers(folder / "client", world, folder / "final")
        pages = {party: str(target / Path(page).name) for party, page in report(folder).pages.items()}
        times = {"preparing the benchmark": prepared, "all": time.monotonic() - begin}
        result = DemoResult(seed, replace(TRAINING, seed=seed).to_json(), lines, found, times, str(target), pages)
        (folder / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return result


def calibrated(world: "TrainedWorld") -> Path:
    """The lineage of a world's model, calibrated on its facts about the world. It is kept with the world."""
    from mpunlearn.calibration import calibrate
    from mpunlearn.server.lineage import Lineage

    lineage = world.path / "lineage"
    if not lineage.exists() or Lineage(lineage).record.common is None:
        calibrate(world.original, calibration_text=world.data("world_facts"), lineage=lineage)
    return lineage


def _unlearn(
    world: "TrainedWorld", out: Path, lineage: Path, options: Mapping[str, Any], seed: int, keep_models: bool
) -> Path:
    """Runs all rounds with the options of a preset; returns the unlearned checkpoint."""
    from mpunlearn.local import run

    settings = {name: value for name, value in options.items() if name not in ("rounds", "epochs")}
    return run(
        world.original,
        forget=world.data("forget"),
        retain=world.data("retain"),
        out=out,
        lineage=lineage,
        rounds=options["rounds"],
        keep_exchange=True,
        keep_models=keep_models,
        perturbation=Perturbation(**settings),
        training=replace(TRAINING, epochs=options["epochs"], seed=seed),
    )
