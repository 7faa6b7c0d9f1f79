"""The only port that hospitals reach: it passes Flower's Fleet API on and refuses everything else.

A SuperLink serves three interfaces on one port. By two of them whoever holds the CA's certificate could start runs, and
so run code on the coordinator's machine. So the SuperLink listens on loopback only, and this stands in front of it with
the certificate.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from confrere.errors import NetworkError

FLEET = "/v1/fleet/"
HEADERS = frozenset({"content-length", "connection", "transfer-encoding", "host", "keep-alive", "upgrade"})
"""Headers of one connection, which are not passed on."""
LIVE = 10.0
"""Seconds after its last request during which a node counts as running: nodes ask every three seconds."""
STARTS = ("/activate-node", "/register-node")
"""Ends of the paths by which a node begins."""
KEY = "flwr-public-key"
"""Header in which a node sends its public key: base64 of PEM."""
Notify = Callable[[dict[str, Any]], None]


@dataclass
class Front:
    """Passes requests on, and lets no second process in under a key whose first one is alive.

    Args:
        target: where the SuperLink listens, e.g. ``https://127.0.0.1:8010``.
        ca: certificate of the authority by which the SuperLink is known.
        names: public key as nodes send it -> site, for the log.
        notify: called with what was refused.
        revoked: public keys that were struck off, as nodes send them.
    """

    target: str
    ca: Path
    names: dict[str, str]
    notify: Notify = lambda event: None
    revoked: frozenset[str] = frozenset()
    _seen: dict[str, float] = field(default_factory=dict, init=False)
    _client: httpx.AsyncClient = field(init=False, repr=False)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        everything = Route("/{path:path}", self._pass, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
        return Starlette(routes=[everything], lifespan=self._connected)

    @contextlib.asynccontextmanager
    async def _connected(self, app: Starlette) -> AsyncIterator[None]:
        """Keep connections to the SuperLink open while the front serves."""
        trusted, waits = ssl.create_default_context(cafile=str(self.ca)), httpx.Timeout(120.0)
        async with httpx.AsyncClient(
            base_url=self.target, verify=trusted, timeout=waits, trust_env=False
        ) as self._client:
            yield

    async def _pass(self, request: Request) -> Response:
        path, key = request.url.path, request.headers.get(KEY, "")
        host = request.client.host if request.client else "?"
        if request.method != "POST" or not path.startswith(FLEET) or ".." in path:
            if (request.method, path) != ("HEAD", "/"):  # so a site looks at certificate and clock
                self.notify({"event": "refused", "code": "not-fleet", "address": host})
            return PlainTextResponse("only the Fleet API is served here", status_code=404)
        start, site = path.endswith(STARTS), self.names.get(key, "an unregistered key")
        if key in self.revoked:
            self.notify({"event": "refused", "code": "node-revoked", "address": host})
            return PlainTextResponse("this key was struck off", status_code=410)
        if start and time.monotonic() - self._seen.get(key, -LIVE) < LIVE:
            self.notify({"event": "refused", "code": "site-twice", "site": site, "address": host})
            return PlainTextResponse("a node with this key is running already", status_code=409)
        kept = {name: value for name, value in request.headers.items() if name not in HEADERS}
        sent = self._client.build_request("POST", path, headers=kept, content=await request.body())
        try:
            answer = await self._client.send(sent, stream=True)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink is not running", status_code=503)
        if answer.is_success:  # the SuperLink has verified the signature: nobody else can speak for a node
            self._seen[key] = -LIVE if path.endswith("/deactivate-node") else time.monotonic()
        elif start:
            self.notify({"event": "refused", "code": "node-refused", "site": site, "address": host})
        back = {name: value for name, value in answer.headers.items() if name not in HEADERS}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, back, background=BackgroundTask(answer.aclose))


def serve(front: Front, host: str, port: int, certificate: Path, key: Path) -> Callable[[], None]:
    """Serve in a thread of this process; return what ends it.

    Raises:
        NetworkError: the port cannot be taken.
    """
    config = uvicorn.Config(
        front.app(),
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        loop="asyncio",
        ws="none",
    )
    server = uvicorn.Server(config)

    def run() -> None:
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that it cannot bind
            server.run()

    thread = threading.Thread(target=run, name="front", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            fix = "stop what listens there, or change the port in consortium.toml and provision again"
            raise NetworkError("the port cannot be taken", where=f"{host}:{port}", fix=fix, code="port-in-use")
        time.sleep(0.05)

    def stop() -> None:
        server.should_exit = True
        thread.join(10.0)

    return stop
