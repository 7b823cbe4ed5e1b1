"""What a run does and needs, as numbers and as text."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mpunlearn.tables import aligned


@dataclass(frozen=True)
class TrainingMemory:
    """The memory that training one copy needs, in bytes."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class SeveralProcesses:
    """What training one copy on several processes needs, in bytes for each process."""

    processes: int
    shard: int
    """Its share of the weights, gradients and the optimizer's state."""
    gpu: int
    """Peak memory of its GPU."""
    host: int
    """Peak memory of its part of the host. Without GPUs, it needs both."""
    step_traffic: int
    """What it receives from the others in an optimizer step."""

    def text(self) -> str:
        """The numbers for a person to read."""
        return (
            f"training on {self.processes} processes, each: GPU {_bytes(self.gpu)}, host {_bytes(self.host)}; receives "
            f"{_bytes(self.step_traffic)} in an optimizer step"
        )


@dataclass(frozen=True)
class Minutes:
    """How long a run takes on machines like this one, in minutes, without the time that files travel."""

    server: float
    client: float
    """For one client."""
    measured_on: str
    """What was timed; empty if it was the model itself."""

    @property
    def total(self) -> float:
        """A run in one process, or over a network: server and clients wait for one another."""
        return self.server + self.client


@dataclass(frozen=True)
class RunEstimate:
    """What a run would do and need. Sizes are in bytes."""

    checkpoint: str
    family: str
    layers: int
    parameters: int
    trained: int
    """Entries that the optimizer changes."""
    objective: str
    learning_rate: float
    batch_size: int
    rounds: int
    copies: int
    clients: int
    epochs: int
    """In one round."""
    steps: int
    """Optimizer steps on one copy in one round."""
    forget_examples: int
    retain_examples: int
    copy_bytes: int
    update_bytes: int
    down_bytes: int
    """What one client receives in one round."""
    up_bytes: int
    """What one client sends in one round."""
    needs_store: bool
    """Whether copies or updates are too large for messages, so that a run over a network needs a store."""
    pass_memory: int
    """Peak memory of the server's passes, with the program."""
    training_memory: int
    """Peak memory of the client's training, with the program."""
    training_parts: TrainingMemory
    several: SeveralProcesses | None
    """Training on several processes, if that was asked for."""
    disk: int
    """Peak of a run in one process."""
    server_disk: int
    """Peak of the server in a run over a network, without what waits in a store."""
    client_disk: int
    free_disk: int
    """What is free where the options were written."""
    minutes: Minutes | None
    advice: str
    source: str
    note: str
    config: str
    """The file with the options."""

    def text(self) -> str:
        """The estimate for a person to read."""
        model = (
            f"{self.family}, {self.layers} layers, {_count(self.parameters)} parameters, {_count(self.trained)} trained"
        )
        each = (
            f"{self.epochs} epochs of {self.forget_examples} forget examples = {self.steps} steps of {self.batch_size}"
        )
        work = f"{self.rounds} rounds × {self.copies} copies × {each}"
        sizes = f"a copy has {_bytes(self.copy_bytes)}, its update {_bytes(self.update_bytes)}"
        traffic = f"{_bytes(self.down_bytes)} down, {_bytes(self.up_bytes)} up, for each client and round; {sizes}"
        store = "; too large for messages: a run over a network needs --store" if self.needs_store else ""
        parts = self.training_parts
        kinds = ("weights", "reference", "gradients", "optimizer", "activations")
        of = ", ".join(f"{kind} {_bytes(getattr(parts, kind))}" for kind in kinds if getattr(parts, kind))
        rows = [
            ("model", f"{self.checkpoint}: {model}"),
            ("work", work),
            ("objective", f"{self.objective}, learning rate {self.learning_rate:g}"),
            ("", self.advice),
            ("memory", f"server's passes {_bytes(self.pass_memory)}; training {_bytes(self.training_memory)} ({of})"),
            *([("", self.several.text())] if self.several else []),
            ("disk", f"in one process {_bytes(self.disk)}; {_bytes(self.free_disk)} free here"),
            ("", f"over a network: server {_bytes(self.server_disk)}, client {_bytes(self.client_disk)}"),
            ("traffic", traffic + store),
            ("time", _time(self.minutes)),
        ]
        lines = [aligned(("", ""), rows).lstrip("\n"), *([f"Note: {self.note}."] if self.note else [])]
        if self.free_disk < self.disk:
            lines.append("Warning: there is not enough disk space here for a run in one process.")
        lines.append(f"The options are in {self.config}. {self._next()}")
        return "\n".join(lines)

    def _next(self) -> str:
        if self.clients > 1:
            return f"Next: mpunlearn server start {self.checkpoint} --run RUN --config {self.config} --clients {self.clients} …"
        return f"Next: mpunlearn run {self.checkpoint} --forget … --config {self.config} --out RUN"

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON."""
        return dataclasses.asdict(self)


def _time(minutes: Minutes | None) -> str:
    if minutes is None:
        return "not measured"
    on = f"measured on {minutes.measured_on}, and scaled" if minutes.measured_on else "measured on the model itself"
    parts = f"server {_duration(minutes.server)}, client {_duration(minutes.client)}"
    return f"about {_duration(minutes.total)} on a machine like this ({parts}; {on}), without transfers"


def _duration(minutes: float) -> str:
    if minutes < 1.5:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}" if number < 10 * size else f"{number / size:.0f} {unit}"
    return f"{number / 1e3:.0f} kB"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"
