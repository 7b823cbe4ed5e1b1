"""Runs one of Flower's programs confined to its folders, and open to its own user only (see `sandbox`).

    python -P -m mpunlearn.protocol.flower.launch '{"read": […], "write": […]}' SCRIPT ARGUMENTS…

Flower serves its control and run-time interfaces with uvicorn. This program gives uvicorn a protocol that hangs up on
other users before it reads a byte, and then runs Flower's own script. A SuperNode that has just had a message asks for the
next one soon, not after Flower's three seconds, which were most of the time of a short round.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mpunlearn.protocol.flower.sandbox import confine, knows_owners, owner

SHORTEST_SECONDS, GROWTH = 0.2, 1.3
"""The first pause after a message, and the factor by which the next ones grow, up to Flower's own."""


def own_user_only() -> None:
    """Makes each uvicorn server of this process refuse connections from other users."""
    import uvicorn.config
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class OwnUserProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Hangs up on all users but this process's own."""

        def connection_made(self, transport):  # type: ignore[no-untyped-def]
            super().connection_made(transport)
            ends = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
            self.own = all(ends) and owner(*ends) == os.geteuid()
            if not self.own:
                transport.abort()

        def data_received(self, data):  # type: ignore[no-untyped-def]
            if self.own:
                super().data_received(data)

    uvicorn.config.HTTP_PROTOCOLS["auto"] = OwnUserProtocol  # type: ignore[assignment]


class Pauses:
    """Replaces the pauses of a SuperNode: short ones after a message, and Flower's own when there is nothing to do.

    Args:
        sleep: does nothing for so many seconds.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep, self._pause = sleep, SHORTEST_SECONDS

    def sleep(self, seconds: float) -> None:
        """Flower waits at least a second for the server's next message, and less for the answer of its own app."""
        if seconds < 1:
            self._pause = SHORTEST_SECONDS
            self._sleep(min(seconds, SHORTEST_SECONDS))
        else:
            self._sleep(min(seconds, self._pause))
            self._pause = min(seconds, self._pause * GROWTH)


def pull_soon() -> None:
    """Makes a SuperNode in this process ask for messages as `Pauses` says."""
    from flwr.supernode import start_client_internal

    start_client_internal.time = Pauses()


def main() -> None:
    """Confines this process, and turns it into the program."""
    folders, script = json.loads(sys.argv[1]), sys.argv[2]
    confine(map(Path, folders["read"]), map(Path, folders["write"]))
    if knows_owners():
        own_user_only()
    if Path(script).name == "flower-supernode":
        pull_soon()
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
