"""Who takes part in a run over a network, and what happens when one does not answer."""

from dataclasses import dataclass
from typing import Literal

from mpunlearn.errors import PlanError


@dataclass(frozen=True)
class Federation:
    """Who takes part, and what happens when one does not answer.

    Raises:
        PlanError: a value is out of its range, or two contradict each other.
    """

    clients: int = 1
    """number of clients; round 1 waits for all of them"""
    assign: Literal["all", "one"] = "all"
    """all: every client unlearns its own text on every copy, and their updates are averaged; one: each of --copies replicas of
    one data owner gets one copy, so that none ever holds two of a round"""
    weights: tuple[float, ...] | None = None
    """weights of the clients' updates, in the order of the clients (default: equal)"""
    deadline: float = 86400.0
    """seconds in which a client must answer in a round"""
    quorum: int | None = None
    """fewest clients that a round may end with, when others miss the deadline (default: all of them)"""
    store: str | None = None
    """folder or s3://BUCKET/PREFIX that both sides reach; without one, files of up to 64 MB travel in the messages"""

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise PlanError(f"--clients: expected at least 1, found {self.clients}")
        if self.assign not in ("all", "one"):
            raise PlanError(f"--assign: expected all or one, found {self.assign}")
        if not self.deadline > 0:
            raise PlanError(f"--deadline: expected a number of seconds above 0, found {self.deadline}")
        if self.quorum is not None and not 0 < self.quorum <= self.clients:
            raise PlanError(f"--quorum: expected a number of clients from 1 to {self.clients}, found {self.quorum}")
        if self.quorum is not None and self.assign == "one":
            raise PlanError(
                "--quorum: with --assign one every client has a copy that no other has; the noise would stay"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            if len(self.weights) != self.clients or not all(weight > 0 for weight in self.weights):
                raise PlanError(f"--weights: expected {self.clients} numbers above 0, found {self.weights}")
            if self.assign == "one":
                raise PlanError("--weights: with --assign one the weights are those of the copies")
