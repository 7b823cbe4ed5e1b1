"""When a client is late.

The deadline of a round begins when the server started, when all clients had come, or when the copies were published, whichever
was last. A client whose answer came while the store was down has twice as much time.
"""

import time


class Deadlines:
    """Keeps track of who is late.

    Args:
        seconds: how long a client may take for a round.
        started: when the server started, in seconds since the epoch (default: now).
    """

    def __init__(self, seconds: float, started: float | None = None) -> None:
        self._seconds, self._started = seconds, time.time() if started is None else started
        self._excused: set[str] = set()

    @property
    def waited_for_clients(self) -> bool:
        """Whether the time in which the clients should have come is over."""
        return time.time() - self._started > self._seconds

    def excuse(self, client: str) -> None:
        """Gives a client twice as much time, since its answer could not be fetched."""
        self._excused.add(client)

    def late(
        self, missing: list[tuple[str, int]], *, complete: float, begun: float, now: float
    ) -> dict[str, list[int]]:
        """The clients that are late, and the copies that they have not answered for.

        Args:
            missing: (client, copy) of every update that has not come.
            complete: when the last client came, in seconds since the epoch.
            begun: when the copies were published.
            now: the time up to which answers have been looked at.
        """
        start = max(self._started, complete, begun)
        late: dict[str, list[int]] = {}
        for client, copy in missing:
            if now - start > self._seconds * (2 if client in self._excused else 1):
                late.setdefault(client, []).append(copy)
        return late
