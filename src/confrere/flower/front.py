"""The only port that hospitals reach: it passes Flower's Fleet API on and refuses everything else.

A SuperLink serves three interfaces on one port. By two of them whoever holds the CA's certificate could start runs, and
so run code on the coordinator's machine. So the SuperLink listens on loopback only, and this stands in front of it with
the certificate.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
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
    """

    target: str
    ca: Path
    names: dict[str, str]
    notify: Notify = lambda event: None
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict, init=False)
    _client: httpx.AsyncClient = field(init=False, repr=False)

    def __post_init__(self) -> None:
        trusted = ssl.create_default_context(cafile=str(self.ca))
        waits = httpx.Timeout(120.0)
        self._client = httpx.AsyncClient(base_url=self.target, verify=trusted, timeout=waits, trust_env=False)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(routes=[Route("/{path:path}", self._pass, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])])

    async def _pass(self, request: Request) -> Response:
        path, key = request.url.path, request.headers.get(KEY, "")
        host = request.client.host if request.client else "?"
        if request.method != "POST" or not path.startswith(FLEET) or ".." in path:
            self.notify({"event": "refused", "code": "not-fleet", "address": host})
            return PlainTextResponse("only the Fleet API is served here", status_code=404)
        if self._is_clone(key, host, path):
            site = self.names.get(key, "an unregistered key")
            self.notify({"event": "refused", "code": "site-twice", "site": site, "address": host})
            return PlainTextResponse("a node with this key is running already", status_code=409)
        kept = {name: value for name, value in request.headers.items() if name not in HEADERS}
        sent = self._client.build_request("POST", path, headers=kept, content=await request.body())
        try:
            answer = await self._client.send(sent, stream=True)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink is not running", status_code=503)
        back = {name: value for name, value in answer.headers.items() if name not in HEADERS}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, back, background=BackgroundTask(answer.aclose))

    def _is_clone(self, key: str, host: str, path: str) -> bool:
        """Return whether this is the start of a second node under a key whose first one asked a moment ago."""
        now = time.monotonic()
        last = self._seen.get(key, ("", -LIVE))
        if path.endswith(("/activate-node", "/register-node")) and now - last[1] < LIVE:
            return True
        if key and not path.endswith("/deactivate-node"):
            self._seen[key] = host, now
        elif key:
            self._seen.pop(key, None)
        return False


def serve(front: Front, host: str, port: int, certificate: Path, key: Path) -> uvicorn.Server:
    """Serve in a thread of this process; return the server, whose ``should_exit`` ends it.

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
        lifespan="off",
    )
    server = uvicorn.Server(config)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except SystemExit as error:  # uvicorn's way to say that it cannot bind
            failed.append(error)

    threading.Thread(target=run, name="front", daemon=True).start()
    until = time.monotonic() + 10.0
    while not server.started:
        if failed or time.monotonic() > until:
            fix = "stop what listens there, or change the port in consortium.toml and provision again"
            raise NetworkError("the port cannot be taken", where=f"{host}:{port}", fix=fix, code="port-in-use")
        time.sleep(0.05)
    return server
