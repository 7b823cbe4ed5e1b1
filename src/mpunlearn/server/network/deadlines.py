"""Deadlines of the clients.

The time limit of a round starts when the server was started, when all clients were connected, or when the copies were
published, whichever is last. It is doubled for a client whose answer arrived while the store was not available.
"""

import time


class Deadlines:
    """Determines which clients are late.

    Args:
        seconds: time limit of a client in a round.
        started: when the server started, in seconds since the epoch (default: now).
    """

    def __init__(self, seconds: float, started: float | None = None) -> None:
        self._seconds, self._started = seconds, time.time() if started is None else started
        self._excused: set[str] = set()

    @property
    def waited_for_clients(self) -> bool:
        """Whether the time limit for all clients to connect has passed."""
        return time.time() - self._started > self._seconds

    def excuse(self, client: str) -> None:
        """Doubles the time limit of a client, because its answer could not be fetched."""
        self._excused.add(client)

    def late(
        self, missing: list[tuple[str, int]], *, complete: float, begun: float, now: float
    ) -> dict[str, list[int]]:
        """The late clients, each with the copies that it has not answered for.

        Args:
            missing: (client, copy) of each missing update.
            complete: when the last client connected, in seconds since the epoch.
            begun: when the copies were published, in seconds since the epoch.
            now: the time up to which answers have been read, in seconds since the epoch.
        """
        start = max(self._started, complete, begun)
        late: dict[str, list[int]] = {}
        for client, copy in missing:
            if now - start > self._seconds * (2 if client in self._excused else 1):
                late.setdefault(client, []).append(copy)
        return late
