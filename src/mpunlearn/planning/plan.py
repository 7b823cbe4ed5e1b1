"""The command `plan`: what a run would do and need, and a configuration file for it.

Nothing is published and nothing is changed. Learning rate, batch size, epochs and hyperparameters that are left at the
program's defaults are replaced by those recommended for the size of the model (see `recommended`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpunlearn.client.resources import Resources
from mpunlearn.errors import FileError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, write_bytes
from mpunlearn.lm.sources import Data
from mpunlearn.planning.recommended import Recommendation, recommendation
from mpunlearn.planning.report import RunEstimate
from mpunlearn.protocol.objectives import HYPERPARAMETERS
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation

SECONDS = 20.0
_CHOSEN = ("learning_rate", "batch_size", "epochs", "gamma", "alpha")
"""Options of `Training` that are recommended."""


def plan(
    checkpoint: str | Path,
    *,
    forget: str | Path,
    retain: str | Path | None = None,
    out: str | Path = "run.yaml",
    rounds: int = 5,
    clients: int = 1,
    processes: int = 1,
    recommended: bool = True,
    seconds: float = SECONDS,
    perturbation: Perturbation | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
) -> RunEstimate:
    """Prints what a run would do, and its memory, disk, traffic and time, and writes its options to run.yaml.

    Args:
        checkpoint: The server's model, a Hugging Face checkpoint directory.
        forget: The data to forget, as for `run`.
        retain: The data to retain, in the same formats.
        out: A new file for the options, for --config of `run` and of `server start`.
        rounds: Number of rounds R.
        clients: Number of clients, for a run over a network.
        processes: Number of processes that the client would train on with torchrun, one for each GPU. With more than one,
            the memory of each and the traffic between them are computed, too.
        recommended: Use the hyperparameters that are recommended for the size of the model, instead of those that are left
            at the program's defaults.
        seconds: About how long measuring on this machine may take. With 0, nothing is measured, and no time estimated.
        perturbation: Number of copies, noise level, reparameterization.
        training: The objective and its hyperparameters.
        data: How to read the examples.
        resources: Memory and precision of training.

    Returns:
        The estimate.

    Raises:
        FileError: The model cannot be read, or `out` exists or cannot be written.
        DataError: The data cannot be read, or is required but missing.
        UnsupportedModelError: The model's family or number format cannot be handled exactly.
        PlanError: An option has an invalid value.
    """
    needs("client", "plan")
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.client.client import Client
    from mpunlearn.planning.estimate import estimate
    from mpunlearn.planning.measure import Work, measure
    from mpunlearn.planning.sizes import Shapes

    file = as_path(out, "--out")
    if file.exists():
        raise FileError(f"{file}: already exists; choose another --out, or remove this file")
    counts = {
        "--rounds": (rounds, 1),
        "--clients": (clients, 1),
        "--processes": (processes, 1),
        "--seconds": (seconds, 0),
    }
    for option, (value, least) in counts.items():
        if value < least:
            raise PlanError(f"{option}: expected at least {least}, found {value:g}")
    source = Checkpoint(as_path(checkpoint, "checkpoint"))
    shapes = Shapes.of_checkpoint(source)
    perturbation, training, resources = perturbation or Perturbation(), training or Training(), resources or Resources()
    advice = recommendation(training.objective, shapes.parameters) if recommended else None
    if advice is not None:
        training = applied(advice, training, rounds, shapes.architecture.layers)
    here = replace(resources, cpu_offload=False) if processes > 1 else resources
    client = Client(forget=forget, retain=retain, training=training, data=data, resources=here)
    steps, examples = client.planned(source.path)
    work = Work(training, client.losses, resources, steps, examples)
    file.parent.mkdir(parents=True, exist_ok=True)
    rates = measure(source, shapes, perturbation, work, seconds, file.parent) if seconds else None
    result = estimate(
        source,
        shapes,
        perturbation,
        work,
        rates,
        rounds=rounds,
        clients=clients,
        processes=processes,
        advice=advice,
        file=file,
    )
    write_bytes(file, run_yaml(rounds, perturbation, training, advice).encode(), mode=0o644)
    return result


def applied(advice: Recommendation, training: Training, rounds: int, layers: int) -> Training:
    """The plan, with recommended values for the options that are left at the program's defaults.

    Args:
        advice: the recommendation.
        training: the plan as given.
        rounds: number of rounds, over which the recommended epochs are spread.
        layers: number of layers of the model. A recommended layer is at most the last but one.
    """
    default, changes = Training(training.objective), {}
    parameters = dict(training.parameters)
    for name, value in advice.options(rounds).items():
        if name in (*_CHOSEN, "optimizer"):
            if getattr(training, name) == getattr(default, name):
                changes[name] = value
        elif name != "objective":
            parameters.setdefault(name, min(value, max(0, layers - 2)) if name == "layer" else value)
    return replace(training, **changes, parameters=parameters)


def run_yaml(rounds: int, perturbation: Perturbation, training: Training, advice: Recommendation | None) -> str:
    """The options as YAML, for `run` and `server start`: those that matter most, and all that are not the default."""
    import yaml

    chosen: dict[str, Any] = {"rounds": rounds}
    for options in (perturbation, training):
        always = {"copies", "kappa", "common_noise", "objective", *_CHOSEN}
        default = type(options)()
        values = {name: getattr(options, name) for name in options.__dataclass_fields__ if name != "parameters"}
        chosen |= {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and (name in always or value != getattr(default, name))
        }
    chosen |= {name: HYPERPARAMETERS[name][0](value) for name, value in training.parameters.items()}
    head = "# Options of `mpunlearn run` and `mpunlearn server start`, written by `mpunlearn plan`.\n"
    if advice is not None:
        head += f"# Hyperparameters from: {advice.source}\n" + (f"# Note: {advice.note}\n" if advice.note else "")
    return head + str(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
