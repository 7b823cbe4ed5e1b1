"""The server's plan of a run, written to plan.json when the run starts and read again whenever it is resumed."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpunlearn.errors import PlanError, StateError
from mpunlearn.files import as_path, read_json
from mpunlearn.protocol.flower.keys import ClientKeys
from mpunlearn.protocol.plan import Training, pin
from mpunlearn.schema import read, write
from mpunlearn.server.federation import Federation
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.postprocess import check_eta

EXTENSION = "extended.json"
"""File beside the plan of a run that goes on with more rounds than it was started with."""


@dataclass(frozen=True)
class _Extension:
    """The content of extended.json."""

    rounds: int
    """The number of rounds instead of the plan's."""


@dataclass(frozen=True)
class Service:
    """The network endpoint of a run, and its clients."""

    host: str
    """Address at which clients reach this machine."""
    port: int
    listen: str
    """Address to listen on."""
    superlink: str | None = None
    """HOST:PORT of a SuperLink (Flower's server process) that already runs; None: the run starts one."""
    clients: list[ClientKeys] = field(default_factory=list)
    """The clients that may take part; empty: no TLS and no keys, and the first clients to connect are accepted."""
    federation: Federation = field(default_factory=Federation)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. Format 3.

    Raises:
        PlanError: a value is out of range.
    """

    checkpoint: str
    """Absolute path of the server's model θ."""
    base: str | None = None
    """Absolute path of the public checkpoint that θ was fine-tuned from."""
    stand_in: str | None = None
    """Absolute path of the checkpoint that the copies are made of instead of θ."""
    lineage: str | None = None
    """Absolute path of the lineage; None: found by the model's digest."""
    rounds: int = 5
    """Number of rounds R."""
    eta: float = 1.0
    """Server step size η."""
    device: str = "cpu"
    """Device of the server's computations."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    training: Training = field(default_factory=Training)
    service: Service | None = None
    """None: both parties run in one process."""
    format: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PlanError(f"--rounds: expected at least 1, found {self.rounds}")
        check_eta(self.eta)

    @classmethod
    def read(cls, path: Path) -> "RunPlan":
        """Reads a plan of the current or an older format.

        Raises:
            StateError: the file does not exist.
            FileError: it cannot be read.
            SchemaError: it is not a plan.
        """
        if not path.is_file():
            raise StateError(f"{path.parent}: contains no run; start one with `mpunlearn server start`")
        plan: RunPlan = _read_pinned(cls, path)
        return plan

    def continuing(self, path: Path) -> "RunPlan":
        """This plan, or how the run that `path` describes goes on with it.

        Version 0.1.0 always trained the token-local weights and knew no common noise. A run that it began goes on like
        that, because the updates of a round must change the same tensors, and its copies must share one offset.

        Raises:
            FileError: the file cannot be read.
        """
        content = read_json(path) if path.is_file() else {}
        training, perturbation = content.get("training"), content.get("perturbation")
        plan = self
        if isinstance(training, dict) and "token_local" not in training:
            plan = replace(plan, training=replace(plan.training, token_local=True))
        if isinstance(perturbation, dict) and "common_noise" not in perturbation:
            plan = replace(plan, perturbation=replace(plan.perturbation, common_noise=0.0))
        return plan

    def pin(self, path: Path, extend: bool = False) -> None:
        """Writes the plan of a new run, or compares it with the existing run's; errors as for `protocol.plan.pin`.

        Args:
            path: the file of the plan.
            extend: whether this plan may have more rounds than the existing run's. Their number is then written to
                extended.json beside the plan, since the plan itself is committed to in the record of the run.
        """
        if extend and path.exists():
            pinned = _read_pinned(type(self), path)
            if pinned.rounds < self.rounds and replace(pinned, rounds=self.rounds) == self:
                write(path.with_name(EXTENSION), _Extension(self.rounds))
        pin(path, self, _read_pinned)


def resolved(path: str | Path | None, option: str) -> str | None:
    """An optional path as a plan stores it: absolute, so that the run can be resumed from any directory."""
    return str(as_path(path, option).resolve()) if path is not None else None


def _read_pinned(kind: type[Any], path: Path) -> Any:
    plan, extension = read(kind, path, upgrade_plan), path.with_name(EXTENSION)
    return replace(plan, rounds=read(_Extension, extension).rounds) if extension.is_file() else plan


def upgrade_plan(value: dict[str, Any]) -> dict[str, Any]:
    """Converts a plan's JSON to the current format.

    Format 1 had no field `format`, and the fields of `Service` were at the top level. Formats 1 and 2 knew no common
    noise.
    """
    if value.get("format") == 3:
        return value
    if "format" in value:
        return {**value, "format": 3} if value["format"] == 2 else value
    names = ("host", "port", "listen", "superlink", "clients", "federation")
    service = {name: value.pop(name) for name in names if name in value}
    return {**value, "service": service or None, "format": 3}


def check_models(plan: RunPlan) -> None:
    """Checks that the model, and the base and the stand-in if there are any, are supported, and the plan of training.

    Raises:
        PlanError: the plan trains different tensors in different copies.
        CheckpointError: a checkpoint cannot be read.
        UnsupportedModelError: its family or number format cannot be handled exactly.
    """
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.server.updates import check_training

    for path in (plan.checkpoint, plan.base, plan.stand_in):
        if path is None:
            continue
        model = Checkpoint(path)
        Architecture.of(model).tensor_roles(model)
    check_training(Path(plan.stand_in or plan.checkpoint), plan.training)
