"""The demo: a small model unlearns four fictitious authors, to measure the cost and what the client sees.

Five models are compared on the built-in benchmark: the original, one retrained without the four authors, noise-free
unlearning, unlearning on a single noisy copy, and MPU (Multiple Perturbed Copies Unlearning), which unlearns on several
noisy copies so that the noise cancels when the server combines the updates. All unlearning goes through `run` with the
same training budget and hyperparameters. The noise is relative to the parameters and ten times the default, so that its
effect is visible.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError
from mpunlearn.files import as_path, new_directory
from mpunlearn.progress import progress
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.demo.models import TrainedWorld
    from mpunlearn.demo.table import Line

KAPPA = 0.1
ROUNDS = 5
TRAINING = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
MPU = "MPU, 3 copies"
ARMS = {
    "noise-free unlearning": Perturbation(copies=1, kappa=0.0, reparameterization="none"),
    "single noisy copy": Perturbation(copies=1, kappa=KAPPA),
    MPU: Perturbation(copies=3, kappa=KAPPA),
}


@dataclass(frozen=True)
class ClientView:
    """What the client of the MPU run saw of the server's model."""

    equal_weights: float
    """Fraction of a copy's weights that equal the server's after its reparameterization is undone."""
    relative_distance: float
    """Distance of such a copy from the server's model, relative to the model's norm."""
    retain_probability: float
    """Probability of the retain answers under a copy."""
    noise_left: list[float]
    """The remaining noise, relative to the weights, for a client that pools 1, 2, … m copies of a round."""

    def text(self) -> str:
        """A summary for the terminal."""
        pooled = ", ".join(f"k = {copies}: {floor:.1%}" for copies, floor in enumerate(self.noise_left, start=1))
        return (
            f"The client saw {len(self.noise_left)} copies per round. Even with its reparameterization undone, a copy's "
            f"weights are {self.relative_distance:.0%} away from the server's, and {self.equal_weights:.1%} of them are "
            f"equal. Used as a model, a copy gives the retain answers a probability of {self.retain_probability:.3f}: the "
            "parameters are hidden, but not what the model can do.\n"
            f"Remaining noise, relative to the weights, for a client that pools k copies of a round: {pooled}. For a "
            f"client that pools one copy from each of the {ROUNDS} rounds, between which the model changes little: "
            f"{self.noise_left[0] / ROUNDS**0.5:.1%}. A client that holds all copies of a round can cancel the noise."
        )


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    seed: int
    kappa: float
    rounds: int
    training: dict[str, Any]
    models: "list[Line]"
    client: ClientView
    seconds: dict[str, float]
    out: str

    def text(self) -> str:
        """The table, and what the client saw."""
        from mpunlearn.demo.table import table

        end = f"Took {self.seconds['all']:.0f} s. Both sides of the MPU run and these numbers are in {self.out}"
        return f"{table(self.models)}\n{self.client.text()}\n{end}"

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        return asdict(self)


def demo(*, out: str | Path = "mpu-demo", seed: int = 0) -> DemoResult:
    """Unlearns four fictitious authors in three ways, and compares the results with retraining.

    The first call trains the models of the built-in benchmark and caches them.

    Args:
        out: A new directory for result.json and both sides of the MPU run: OUT/server, OUT/client, OUT/exchange,
            OUT/final.
        seed: Seed for the fictitious data, the models and the order of batches. The server's secrets never depend on a
            seed.

    Returns:
        What was measured.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    from mpunlearn.demo.models import trained_world
    from mpunlearn.demo.table import measure_in
    from mpunlearn.local import run

    target = as_path(out, "--out")
    if target.exists():
        raise FileError(f"{target}: already exists; choose another --out, or remove this one")
    begin = time.monotonic()
    with new_directory(target) as folder:
        world = trained_world(seed)
        prepared = time.monotonic() - begin
        training = replace(TRAINING, seed=seed)
        lines = [measure_in(world, "original", world.original), measure_in(world, "retrained", world.retrained)]
        for name, perturbation in progress(ARMS.items(), "unlearning in three ways"):
            started = time.monotonic()
            final = run(
                world.original,
                forget=world.data("forget"),
                retain=world.data("retain"),
                out=folder / "run",
                rounds=ROUNDS,
                keep_exchange=True,
                perturbation=perturbation,
                training=training,
            )
            lines.append(measure_in(world, name, final, time.monotonic() - started))
            if name != MPU:
                shutil.rmtree(folder / "run")
        for part in (folder / "run").iterdir():
            part.rename(folder / part.name)
        (folder / "run").rmdir()
        result = DemoResult(
            seed=seed,
            kappa=KAPPA,
            rounds=ROUNDS,
            training=training.to_json(),
            models=lines,
            client=_client_view(world, folder),
            seconds={"preparing the benchmark": prepared, "all": time.monotonic() - begin},
            out=str(target),
        )
        (folder / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return result


def _client_view(world: "TrainedWorld", run_folder: Path) -> ClientView:
    """How far a published copy is from the server's model, and how much noise a client that pools copies is left with."""
    from mpunlearn.audit.floor import noise_floor
    from mpunlearn.audit.parameters import copy_distance
    from mpunlearn.demo.table import measure_in

    copy = run_folder / "exchange" / "round-1" / "copies" / "copy-1"
    distance = copy_distance(world.original, copy, run_folder / "server" / "state")
    retain = measure_in(world, "a published copy", copy).retain
    return ClientView(distance.equal, distance.relative, retain.probability, noise_floor(ARMS[MPU]))
