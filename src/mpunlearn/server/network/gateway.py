"""A reverse proxy in front of Flower's SuperLink that forwards only the requests of nodes.

A SuperLink serves nodes, users and apps on the same port, and its open-source build does not authenticate users: anyone
who can reach the control API can start runs and register keys. Therefore the SuperLink listens on the loopback address
only, and this proxy is exposed instead, with the same certificate. Nodes are authenticated by the SuperLink itself,
with their registered keys.
"""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mpunlearn.errors import NetworkError

NODE_PATHS = "/v1/fleet/"
"""Path prefix of the API for nodes."""


class Gateway:
    """The proxy, served from a thread of this process.

    Args:
        host: address to listen on.
        port: port to listen on.
        upstream: port of the SuperLink on the loopback address.
        ca: certificate of the authority, for verifying the SuperLink.
        certificate: the server's certificate.
        key: private key of the certificate.
    """

    def __init__(self, host: str, port: int, upstream: int, ca: Path, certificate: Path, key: Path) -> None:
        import uvicorn

        self._address = f"{host}:{port}"
        config = uvicorn.Config(
            proxy(f"https://127.0.0.1:{upstream}", ca),
            host=host,
            port=port,
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            log_level="error",
            access_log=False,
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self) -> None:
        """Starts serving.

        Raises:
            NetworkError: the port is not available.
        """
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.05)
        if not self._server.started:
            raise NetworkError(f"--port: cannot listen on {self._address}; if it is in use, choose another --port")

    def stop(self) -> None:
        """Stops serving."""
        self._server.should_exit = True
        self._thread.join(5)


def proxy(upstream: str, ca: Path) -> Any:
    """The ASGI application: forwards POST requests to paths below `NODE_PATHS`, answers all others with 404."""
    import ssl

    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    client = httpx.AsyncClient(
        base_url=upstream, verify=ssl.create_default_context(cafile=str(ca)), timeout=None, trust_env=False
    )
    hop_by_hop = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "content-length"}

    async def forward(request: Request) -> Response:
        path = request.scope["raw_path"].decode("latin-1").split("?")[0]
        if not path.startswith(NODE_PATHS) or ".." in path or "%" in path or "//" in path:
            return PlainTextResponse("not found", 404)
        headers = [(name, value) for name, value in request.headers.items() if name not in hop_by_hop]
        if "content-length" in request.headers:
            headers.append(("content-length", request.headers["content-length"]))
        try:
            outgoing = client.build_request("POST", path, headers=headers, content=request.stream())
            answer = await client.send(outgoing, stream=True)
        except httpx.TransportError:
            return PlainTextResponse("the server of the run is starting", 503)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        dropped = hop_by_hop - {"content-length"}
        forwarded = {name: value for name, value in answer.headers.items() if name not in dropped}
        return StreamingResponse(body(), answer.status_code, forwarded)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await client.aclose()

    return Starlette(routes=[Route("/{path:path}", forward, methods=["POST"])], lifespan=lifespan)
