"""Runs one of Flower's programs confined to its folders, and open to its own user only (see `sandbox`).

    python -P -m mpunlearn.protocol.flower.launch '{"read": […], "write": […]}' SCRIPT ARGUMENTS…

Flower serves its control and run-time interfaces with uvicorn. This program gives uvicorn a protocol that hangs up on
other users before it reads a byte, and then runs Flower's own script.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from mpunlearn.protocol.flower.sandbox import confine, knows_owners, owner


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


def main() -> None:
    """Confines this process, and turns it into the program."""
    folders, script = json.loads(sys.argv[1]), sys.argv[2]
    confine(map(Path, folders["read"]), map(Path, folders["write"]))
    if knows_owners():
        own_user_only()
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
