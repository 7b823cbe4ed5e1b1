"""Settings of a run with several clients: which copies they get, how their updates are weighted, and deadlines."""

from dataclasses import dataclass
from typing import Literal

from mpunlearn.errors import PlanError
from mpunlearn.schema import check_options


@dataclass(frozen=True)
class Federation:
    """The clients of a run, and what happens if one does not answer in time.

    Raises:
        PlanError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    clients: int = 1
    """Number of clients. Round 1 starts when all of them are connected."""
    assign: Literal["all", "one"] = "all"
    """Which copies a client gets. With all, every client unlearns its own text on every copy, and the clients' updates
    are averaged. With one, the clients are replicas of one data owner, as many as --copies, and each gets a single
    copy, so that none of them ever holds two copies of a round."""
    weights: tuple[float, ...] | None = None
    """Weights of the clients' updates in the average, in the order of the clients, such as 1,2 (default: equal)."""
    deadline: float = 86400.0
    """Time limit, in seconds, for a client's answers in a round."""
    quorum: int | None = None
    """Minimum number of clients with which the run continues if others miss the deadline (default: all)."""
    store: str | None = None
    """Folder or s3://BUCKET/PREFIX that both parties can access, for copies and updates (default: none; they are sent
    in the messages, up to 64 MB each)."""

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
                "--quorum: not available with --assign one, since the noise cancels only if every client answers"
            )
        if self.weights is not None:
            if len(self.weights) != self.clients or not all(weight > 0 for weight in self.weights):
                raise PlanError(
                    f"--weights: expected {self.clients} numbers above 0 for --clients {self.clients}, found "
                    f"{', '.join(f'{weight:g}' for weight in self.weights)}"
                )
            if self.assign == "one":
                raise PlanError("--weights: not available with --assign one, where the copies have their own weights")
