"""Who takes part in a run over a network, and what happens when a client does not answer."""

from dataclasses import dataclass
from typing import Literal

from mpunlearn.errors import PlanError
from mpunlearn.schema import check_options


@dataclass(frozen=True)
class Federation:
    """Who takes part, and what happens when a client does not answer.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    clients: int = 1
    """Number of clients. Round 1 waits for all of them."""
    assign: Literal["all", "one"] = "all"
    """Which copies a client gets. all: every client unlearns its own text on every copy, and their updates are averaged. one:
    each of --copies replicas of one data owner gets one copy, so that none ever holds two copies of a round."""
    weights: tuple[float, ...] | None = None
    """Weights of the clients' updates, in the order of the clients, such as 1,2 (default: equal)."""
    deadline: float = 86400.0
    """Seconds in which a client must answer in a round."""
    quorum: int | None = None
    """Minimum number of clients that a round may end with when others miss the deadline (default: all)."""
    store: str | None = None
    """Folder or s3://BUCKET/PREFIX that both sides can reach (default: none; files of up to 64 MB travel in the messages)."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.clients < 1:
            raise PlanError(f"--clients: expected at least 1, found {self.clients}")
        if not self.deadline > 0:
            raise PlanError(f"--deadline: expected a number of seconds above 0, found {self.deadline:g}")
        if self.quorum is not None and not 0 < self.quorum <= self.clients:
            raise PlanError(f"--quorum: expected a number of clients from 1 to {self.clients}, found {self.quorum}")
        if self.quorum is not None and self.assign == "one":
            raise PlanError(
                "--quorum: with --assign one, every client has a copy that no other has; without it, the noise stays"
            )
        if self.weights is not None:
            if len(self.weights) != self.clients or not all(weight > 0 for weight in self.weights):
                raise PlanError(
                    f"--weights: expected {self.clients} numbers above 0 for --clients {self.clients}, found "
                    f"{', '.join(f'{weight:g}' for weight in self.weights)}"
                )
            if self.assign == "one":
                raise PlanError("--weights: with --assign one, the copies have their own weights; leave the option out")
