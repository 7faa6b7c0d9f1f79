"""The live page and the metrics of one run over HTTP: read-only, on this machine unless TLS is given."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from confrere.errors import ConfigError, ConfrereError, NetworkError
from confrere.watch.guard import Guard
from confrere.watch.metrics import CONTENT_TYPE, exposition
from confrere.watch.reader import Watcher
from confrere.watch.state import STALLED

VARIABLE = "CONFRERE_WATCH_TOKEN"
"""Environment variable with the token; without it, each start makes a new one."""
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{20,}")
_STATIC = Path(__file__).parent / "static"
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Served:
    """A page that is served by a thread of this process, until :meth:`stop` or the end of the process."""

    url: str
    token: str
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def address(self) -> str:
        """Return what to open in a browser: the address with the token, a secret."""
        return f"{self.url}/?token={self.token}"

    def stop(self) -> None:
        """Stop serving; return when the port is free."""
        self.server.should_exit = True
        self.thread.join()

    def wait(self) -> None:
        """Wait until it is stopped, or this thread is interrupted."""
        self.thread.join()


def token_of_environment() -> str:
    """Return the token of ``CONFRERE_WATCH_TOKEN``, or a new one.

    Raises:
        ConfigError: it is too short to be hard to guess, or has characters that cannot stand in an address.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return secrets.token_urlsafe()
    if not _TOKEN.fullmatch(given):
        what = "the token must have 20 characters or more, of A-Z a-z 0-9 . _ ~ -"
        fix = 'python -c "import secrets; print(secrets.token_urlsafe())" makes one'
        raise ConfigError(what, where=f"${VARIABLE}", fix=fix, code="watch-token")
    return given


def start(
    run: Path,
    host: str = "127.0.0.1",
    port: int = 9464,
    token: str | None = None,
    *,
    cert: Path | None = None,
    key: Path | None = None,
    names: Sequence[str] = (),
    stalled_after: float = STALLED,
) -> Served:
    """Serve ``run`` from a daemon thread; return when it listens.

    Args:
        run: the directory of a run; it must hold one.
        host: address to listen on; other machines reach it only where that is not the loopback, which needs TLS.
        port: 0 takes any that is free.
        token: what readers must know; None for :func:`token_of_environment`.
        cert: PEM file of the certificate chain.
        key: PEM file of its private key.
        names: host names, besides ``host``, under which readers may ask.
        stalled_after: seconds without a sign of life after which the page says that the run stalled.

    Raises:
        RunError: there is no run. ConfigError: see :func:`token_of_environment`.
        NetworkError: the port is taken, the address cannot be listened on, or it needs TLS that is not given.
    """
    token = token or token_of_environment()
    watcher = Watcher(run)
    secure = _check_tls(host, cert, key)
    listener = _listen(host, port)
    bound = listener.getsockname()[1]
    app = Guard(
        Starlette(routes=_routes(watcher, stalled_after)),
        token=token,
        names={*_LOOPBACK, host, *names},
        cookie=f"confrere-watch-{bound}",
        secure=secure,
    )
    server = uvicorn.Server(_config(app, listener, cert, key))
    thread = threading.Thread(target=server.run, args=([listener],), name="watch", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    shown = f"[{host}]" if ":" in host else host
    return Served(f"http{'s' if secure else ''}://{shown}:{bound}", token, server, thread)


def _routes(watcher: Watcher, stalled_after: float) -> list[Route]:
    def state(request: Request) -> Response:
        try:
            return JSONResponse(watcher.state().as_json(time.time(), stalled_after))
        except ConfrereError as error:  # the page shows it and asks again
            return JSONResponse({"error": error.what, "code": error.code}, 503)

    def metrics(request: Request) -> Response:
        try:
            return Response(exposition(watcher.state()), media_type=CONTENT_TYPE)
        except ConfrereError as error:  # the scrape fails, and Prometheus' `up` says so
            return PlainTextResponse(f"{error.what}\n", 503)

    def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    def page(request: Request) -> Response:
        return FileResponse(_STATIC / _FILES[request.url.path])

    answers = {"/state.json": state, "/metrics": metrics, "/healthz": health, **dict.fromkeys(_FILES, page)}
    return [Route(path, answer) for path, answer in answers.items()]


def _check_tls(host: str, cert: Path | None, key: Path | None) -> bool:
    """Return whether TLS is given; without it, only this machine may reach the page: the token would be readable."""
    if cert and key:
        return True
    fix = "give --cert and --key, or listen on 127.0.0.1 and reach it through ssh -L"
    if cert or key:
        raise NetworkError("a certificate needs its key, and a key its certificate", fix=fix, code="watch-tls")
    if not _is_loopback(host):
        raise NetworkError("other machines may be let in by TLS only", where=host, fix=fix, code="watch-tls")
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            what, fix = "another process listens on this port", "choose another --port, or stop that process"
            raise NetworkError(what, where=where, fix=fix, code="port-in-use") from error
        what = f"this address cannot be listened on: {error.strerror}"
        fix = "choose an address of this machine and a port above 1023"
        raise NetworkError(what, where=where, fix=fix, code="cannot-listen") from error


def _config(app: Guard, listener: socket.socket, cert: Path | None, key: Path | None) -> uvicorn.Config:
    """Return how to serve, certificate and key read already: in the thread, nobody would learn that they are wrong."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # it would hold the token
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
        ssl_certfile=cert,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        listener.close()
        what, fix = "the certificate or its key cannot be used", "give PEM files that belong together, without password"
        raise NetworkError(what, where=str(cert), fix=fix, code="watch-tls") from error
    return config
