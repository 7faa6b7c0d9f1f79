"""The front: the Fleet API passes, everything else is refused, and no second node comes in under a key."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from confrere.consortium.authority import certificate_pem, new_authority, new_server, now
from confrere.errors import NetworkError
from confrere.flower import front as fronts
from confrere.flower.front import Front, serve
from confrere.flower.processes import free_port


async def echo(request: Request) -> Response:
    """Stand for a SuperLink: say what came."""
    body = await request.body()
    headers = {"seen-key": request.headers.get("flwr-public-key", ""), "seen-path": request.url.path}
    return Response(body[::-1], status_code=201, headers=headers)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datetime import timedelta

    folder, authority = tmp_path_factory.mktemp("tls"), new_authority("front")
    key, certificate = new_server(authority, "127.0.0.1", now() + timedelta(days=1))
    for name, content in (("ca.crt", certificate_pem(authority.certificate)), ("s.key", key), ("s.crt", certificate)):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def served(tls: Path) -> Iterator[tuple[httpx.Client, list[dict[str, Any]], int]]:
    target, port = free_port(), free_port()
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=target,
        ssl_certfile=tls / "s.crt",
        ssl_keyfile=tls / "s.key",
        log_level="error",
        ws="none",
    )
    link = uvicorn.Server(config)
    thread = threading.Thread(target=link.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not link.started and time.monotonic() < until:
        time.sleep(0.02)
    assert link.started
    told: list[dict[str, Any]] = []
    front = Front(f"https://127.0.0.1:{target}", tls / "ca.crt", {"KEY": "north"}, told.append)
    stop = serve(front, "127.0.0.1", port, tls / "s.crt", tls / "s.key")
    trusted = ssl.create_default_context(cafile=str(tls / "ca.crt"))
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False) as client:
        yield client, told, port
    stop()
    link.should_exit = True
    thread.join(10)


def test_the_fleet_api_passes_whole(served: tuple[httpx.Client, list[dict[str, Any]], int]) -> None:
    client, told, _ = served
    body = bytes(range(256)) * 20_000
    answer = client.post("/v1/fleet/push-object", content=body, headers={"flwr-public-key": "FIRST"})
    assert (answer.status_code, answer.content) == (201, body[::-1])
    assert (answer.headers["seen-key"], answer.headers["seen-path"]) == ("FIRST", "/v1/fleet/push-object")
    assert not told


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/push-messages"),
        ("GET", "/v1/fleet/get-run"),
        ("GET", "/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleetx"),
        ("DELETE", "/v1/fleet/get-run"),
    ],
)
def test_everything_else_is_refused(
    method: str, path: str, served: tuple[httpx.Client, list[dict[str, Any]], int]
) -> None:
    client, told, port = served
    answer = client.send(httpx.Request(method, httpx.URL(f"https://127.0.0.1:{port}", raw_path=path.encode())))
    assert answer.status_code == 404
    assert told[-1]["code"] == "not-fleet"


def test_a_second_node_under_a_key_is_refused_while_the_first_lives(
    served: tuple[httpx.Client, list[dict[str, Any]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3."""
    client, told, _ = served
    key = {"flwr-public-key": "KEY"}
    assert client.post("/v1/fleet/activate-node", headers=key).status_code == 201
    assert client.post("/v1/fleet/pull-messages", headers=key).status_code == 201
    assert client.post("/v1/fleet/activate-node", headers=key).status_code == 409
    assert (told[-1]["code"], told[-1]["site"]) == ("site-twice", "north")
    assert client.post("/v1/fleet/pull-messages", headers=key).status_code == 201  # the first one goes on
    assert client.post("/v1/fleet/activate-node", headers={"flwr-public-key": "OTHER"}).status_code == 201
    assert client.post("/v1/fleet/deactivate-node", headers=key).status_code == 201
    assert client.post("/v1/fleet/activate-node", headers=key).status_code == 201  # it said that it ended
    monkeypatch.setattr(fronts, "LIVE", 0.0)
    assert client.post("/v1/fleet/activate-node", headers=key).status_code == 201  # it was killed, a while ago


def test_a_port_that_is_taken_is_said(served: tuple[httpx.Client, list[dict[str, Any]], int], tls: Path) -> None:
    with pytest.raises(NetworkError) as caught:
        serve(Front("https://x", tls / "ca.crt", {}), "127.0.0.1", served[2], tls / "s.crt", tls / "s.key")
    assert caught.value.code == "port-in-use"
