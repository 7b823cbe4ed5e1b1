"""The only way into a run from outside: a reverse proxy in front of Flower's SuperLink, a program of its own.

    python -P -m mpunlearn.server.network.gateway SETTINGS

A SuperLink serves nodes, users and apps on the same port, reads a request in full before it looks at its signature, and
does not authenticate users at all. Therefore it listens on the loopback address, and this program is exposed instead. It
forwards the requests of registered nodes to the paths that nodes need, within the limits of `gatekeeper`, and nothing
else. It reads what strangers send, so it is a process without secrets: it knows the certificate's key, the nodes' public
keys and the SuperLink's port, and gives up its access to all files before it opens its own port.

HTTP is parsed by h11 and spoken to the SuperLink by httpx. Bodies pass through piece by piece and are never held in
full. The log has at most one line per minute.
"""

import asyncio
import json
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.protocol.flower.sandbox import confine
from mpunlearn.server.network.gatekeeper import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_STRANGERS,
    Node,
    Nodes,
    Origins,
    RefusedError,
)

STRANGER_SECONDS = 10.0
"""Time for a stranger to finish the handshake and the headers of its request."""
REQUEST_SECONDS = 300.0
"""Time for a small request of a known node, from its headers to the last byte of the answer."""
SLOWEST = 50_000.0
"""Bytes per second that a known node must reach with a large message."""
IDLE_SECONDS = 75.0
"""How long the connection of a known node is kept between two requests."""
CHUNK_BYTES = 1 << 16
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "expect", "trailer"}


@dataclass(frozen=True)
class Settings:
    """The content of the settings file."""

    host: str
    port: int
    upstream: int
    """Port of the SuperLink on the loopback address."""
    ca: str
    """Certificate of the authority, for verifying the SuperLink."""
    certificate: str
    key: str
    nodes: list[str]
    """Public keys of the registered nodes, in OpenSSH format."""
    max_message: int
    """Maximum size of one object that a node sends, in bytes."""
    max_total: int
    """What a node may send altogether before it has to wait, in bytes."""


class Gateway:
    """The proxy.

    Args:
        settings: what it needs to know.
    """

    def __init__(self, settings: Settings) -> None:
        import httpx

        self._origins, self._strangers = Origins(), dict[asyncio.Task[None], str]()
        self._nodes = Nodes(settings.nodes, settings.max_message, settings.max_total)
        self.request_seconds = REQUEST_SECONDS + settings.max_message / SLOWEST
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(settings.certificate, settings.key)
        self._client = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{settings.upstream}",
            verify=ssl.create_default_context(cafile=settings.ca),
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=10.0),
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=2.0),
            trust_env=False,
        )
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._listener = socket.socket(family, kind, protocol)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)
        self._refused: Counter[str] = Counter()

    async def serve(self) -> None:
        """Accepts connections for ever."""
        loop = asyncio.get_running_loop()
        self._listener.listen(1024)
        self._listener.setblocking(False)
        reporting = loop.create_task(self._report())
        while not reporting.done():
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError:  # the other side has left, or there are too many open files
                await asyncio.sleep(0.05)
                continue
            origin = Origins.of(address[0])
            if not self._origins.admit(origin):
                self._refused["turned away"] += 1
                connection.close()
                await asyncio.sleep(0)  # otherwise a full queue would leave no time for anybody else
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                next(iter(self._strangers)).cancel()
            task = loop.create_task(self._visit(connection, origin))
            self._strangers[task] = origin
            task.add_done_callback(self._forget)
            await asyncio.sleep(0)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        """A connection has ended, or its node is known now."""
        if (origin := self._strangers.pop(task, None)) is not None:
            self._origins.leave(origin)

    async def _visit(self, connection: socket.socket, origin: str) -> None:
        """Serves one connection."""
        writer = None
        try:
            async with asyncio.timeout(STRANGER_SECONDS) as limit:
                reader, writer = await self._open(connection)
                await _Conversation(self, reader, writer, origin, limit).run()
        except RefusedError as refusal:
            self._refused[refusal.reason] += 1
            if refusal.is_failure:
                self._origins.fail(origin)
        except (TimeoutError, asyncio.CancelledError):
            self._refused["too slow"] += 1
            self._origins.fail(origin)
        except (OSError, ssl.SSLError, EOFError):
            self._refused["broken off"] += 1
            self._origins.fail(origin)
        except Exception as error:  # whatever one connection does must not reach the others, nor fill the log
            self._refused[type(error).__name__] += 1
        finally:
            if writer is not None:
                writer.transport.abort()
            connection.close()

    async def _open(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Does the handshake of TLS."""
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self._tls,
            ssl_handshake_timeout=STRANGER_SECONDS,
            ssl_shutdown_timeout=1.0,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _report(self) -> None:
        """Prints what was refused in the last minute."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(1)
            if self._refused and time.monotonic() - last >= 60:
                last = time.monotonic()
                what = ", ".join(f"{count} {reason}" for reason, count in self._refused.most_common(8))
                print(f"{time.strftime('%Y-%m-%d %H:%M')} refused: {what}", flush=True)
                self._refused.clear()

    def examine(self, request: Any, origin: str) -> tuple[Node, int]:
        """Examines a request; afterwards its connection is no stranger's any more. Errors as for `Nodes.examine`."""
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if len(request.headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:  # h11 limits what is not complete yet
            raise RefusedError(431, "too many headers")
        headers: dict[str, str] = {}
        for name, value in request.headers:
            headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        node, size = self._nodes.examine(request.method.decode("ascii"), request.target.decode("ascii"), headers)
        if (task := asyncio.current_task()) is not None:
            self._forget(task)
        self._origins.know(origin)
        return node, size

    async def forward(self, request: Any, body: AsyncIterator[bytes]) -> Any:
        """Sends a request to the SuperLink; returns its answer, whose body has not been read yet.

        Raises:
            RefusedError: the SuperLink does not answer.
        """
        import httpx

        headers = [(name, value) for name, value in request.headers if name.decode("ascii") not in HOP_BY_HOP]
        outgoing = self._client.build_request("POST", request.target.decode("ascii"), headers=headers, content=body)
        try:
            return await self._client.send(outgoing, stream=True)
        except httpx.TransportError:
            raise RefusedError(503, "the server of the run is starting", is_failure=False) from None


class _Conversation:
    """The requests of one connection."""

    def __init__(
        self,
        gateway: Gateway,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        origin: str,
        limit: asyncio.Timeout,
    ) -> None:
        import h11

        self._h11, self._gateway, self._reader, self._writer = h11, gateway, reader, writer
        self._origin, self._limit = origin, limit
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)

    async def run(self) -> None:
        """Answers requests until the other side leaves.

        Raises:
            RefusedError: a request was refused; the answer has been sent.
            EOFError: the other side has left without a request.
        """
        h11, is_first = self._h11, True
        try:
            while True:
                event = await self._next()
                if isinstance(event, h11.ConnectionClosed):
                    if is_first:
                        raise EOFError
                    return
                node, _ = self._gateway.examine(event, self._origin)
                is_first = False
                self._limit.reschedule(asyncio.get_running_loop().time() + self._gateway.request_seconds)
                node.in_progress += 1
                try:
                    await self._answer(await self._gateway.forward(event, self._body()))
                finally:
                    node.in_progress -= 1
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    return
                self._http.start_next_cycle()
                self._limit.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
        except h11.RemoteProtocolError as error:
            refusal = RefusedError(error.error_status_hint, "not HTTP as expected")
            await self._refuse(refusal)
            raise refusal from None
        except RefusedError as refusal:
            await self._refuse(refusal)
            raise

    async def _next(self) -> Any:
        """The next part of what the other side sends."""
        while (event := self._http.next_event()) is self._h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(CHUNK_BYTES))
        return event

    async def _body(self) -> AsyncIterator[bytes]:
        """The body of the current request."""
        while isinstance(event := await self._next(), self._h11.Data):
            yield bytes(event.data)

    async def _answer(self, answer: Any) -> None:
        """Passes an answer on."""
        h11 = self._h11
        try:
            headers = [(name, value) for name, value in answer.headers.raw if name.decode().lower() not in HOP_BY_HOP]
            self._writer.write(self._http.send(h11.Response(status_code=answer.status_code, headers=headers)))
            async for chunk in answer.aiter_raw(CHUNK_BYTES):
                self._writer.write(self._http.send(h11.Data(data=chunk)))
                await self._writer.drain()
            self._writer.write(self._http.send(h11.EndOfMessage()))
            await self._writer.drain()
        finally:
            await answer.aclose()

    async def _refuse(self, refusal: RefusedError) -> None:
        """Answers with a reason, without reading what else the other side may send."""
        h11, text = self._h11, f"{refusal.reason}\n".encode()
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(text))), ("Connection", "close")]
        with suppress(OSError, h11.LocalProtocolError):
            answer = h11.Response(status_code=refusal.status, headers=headers)
            self._writer.write(self._http.send(answer) + self._http.send(h11.Data(data=text)))
            await self._writer.drain()
            self._writer.close()
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


def main() -> None:
    """Serves until it is killed."""
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    gateway = Gateway(settings)
    confine([], [])
    asyncio.run(gateway.serve())


if __name__ == "__main__":
    main()
