"""The server, asked over real sockets: who may read, what may be done, and what every answer says to browsers."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
import watch_runs as runs
from prometheus_client.parser import text_string_to_metric_families

from confrere.errors import ConfigError, NetworkError, RunError
from confrere.watch.guard import HEADERS
from confrere.watch.serve import VARIABLE, Served, start

PATHS = ("/", "/page.css", "/page.js", "/state.json", "/metrics")


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_told(served: Served, stranger: httpx.Client, path: str) -> None:
    for headers in (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {served.token}"},
        {"Cookie": "confrere-watch-1=x"}, {"Authorization": "Bearer \xe4".encode("latin-1")},
    ):  # fmt: skip
        answer = stranger.get(path, headers=headers)
        assert answer.status_code == 401
        assert "north" not in answer.text
    assert stranger.get(path, params={"token": "wrong"}).status_code == 401


def test_the_token_in_the_address_becomes_a_cookie(served: Served, stranger: httpx.Client) -> None:
    answer = stranger.get(served.address)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    for path in PATHS:
        assert stranger.get(path).status_code == 200


def test_bearers_of_the_token_read_state_and_metrics(client: httpx.Client) -> None:
    state = client.get("/state.json").json()
    assert (state["round"], state["rounds"], state["phase"]) == (1, 20, "train")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"confrere_round", "confrere_site_bytes", "confrere_failures", "confrere_phase"} <= names


@pytest.mark.parametrize("path", [*PATHS, "/healthz", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(client: httpx.Client, path: str, method: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "[::2]", ""])
def test_a_name_that_was_rebound_to_this_address_gets_nothing(client: httpx.Client, host: str) -> None:
    for path in ("/state.json", "/healthz"):
        assert client.get(path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9464", "127.0.0.1:1", "[::1]:9464"])
def test_names_of_this_machine_are_known(client: httpx.Client, host: str) -> None:
    assert client.get("/state.json", headers={"Host": host}).status_code == 200


def test_every_answer_has_the_headers(client: httpx.Client, stranger: httpx.Client) -> None:
    answers = [client.get(path) for path in (*PATHS, "/healthz", "/nothing", "/../state.py")]
    answers += [stranger.get("/"), client.post("/"), client.get("/", headers={"Host": "x"})]
    assert [a.status_code for a in answers] == [200] * 6 + [404, 404, 401, 405, 421]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "server" not in answer.headers
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert "http" not in HEADERS["Content-Security-Policy"]


def test_health_needs_no_token_and_tells_nothing(stranger: httpx.Client) -> None:
    answer = stranger.get("/healthz")
    assert (answer.status_code, answer.text) == (200, "ok\n")


def test_a_journal_that_is_damaged_meanwhile_is_told(client: httpx.Client, tmp_path: Path) -> None:
    with (tmp_path / "run" / "events.jsonl").open("ab") as file:
        file.write(b"rubbish\n")
    answer = client.get("/state.json")
    assert (answer.status_code, answer.json()["code"]) == (503, "journal")
    assert str(tmp_path) not in answer.text
    assert client.get("/metrics").status_code == 503


def test_many_readers_see_the_same_run(client: httpx.Client, tmp_path: Path) -> None:
    seen: list[int] = []

    def read() -> None:
        seen.extend(client.get("/state.json").json()["round"] for _ in range(5))

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    runs.one_round(tmp_path / "run", 2)
    for reader in readers:
        reader.join()
    assert len(seen) == 40
    assert set(seen) <= {1, 2}
    assert client.get("/state.json").json()["round"] == 2


def test_a_port_that_is_taken_is_told_and_free_after_stopping(tmp_path: Path) -> None:
    run = runs.begin(tmp_path)
    first = start(run, port=0)
    port = int(first.url.rpartition(":")[2])
    with pytest.raises(NetworkError, match="--port") as told:
        start(run, port=port)
    assert told.value.code == "port-in-use"
    first.stop()
    again = start(run, port=port)
    assert again.token != first.token
    again.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_an_address_of_another_machine_cannot_be_listened_on(tmp_path: Path, authority: tuple[Path, Path]) -> None:
    cert, key = authority
    with pytest.raises(NetworkError) as told:
        start(runs.begin(tmp_path), "192.0.2.1", 0, cert=cert, key=key)
    assert told.value.code == "cannot-listen"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*made.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "watch.example"])
def test_other_machines_are_let_in_by_tls_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(NetworkError, match="TLS") as told:
        start(runs.begin(tmp_path), host, 0)
    assert told.value.code == "watch-tls"


def test_with_tls_the_cookie_is_secure_and_other_names_are_served(tmp_path: Path, authority: tuple[Path, Path]) -> None:
    import ssl

    cert, key = authority
    served = start(runs.begin(tmp_path), port=0, cert=cert, key=key, names=["watch.example"])
    try:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(cert))) as client:
            answer = client.get(served.address, headers={"Host": "watch.example"})
            assert answer.status_code == 303
            assert "secure" in answer.headers["set-cookie"].lower().split("; ")
            assert "strict-transport-security" in answer.headers
    finally:
        served.stop()


def test_a_certificate_that_cannot_be_used_is_told_and_the_port_is_free(
    tmp_path: Path, authority: tuple[Path, Path]
) -> None:
    run, (cert, key) = runs.begin(tmp_path / "run"), authority
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for one, other in ((cert, None), (None, key), (wrong, key), (cert, wrong), (tmp_path / "gone", key)):
        with pytest.raises(NetworkError) as told:
            start(run, port=0, cert=one, key=other)
        assert told.value.code == "watch-tls"


def test_the_token_comes_from_the_environment_if_it_is_long_and_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.begin(tmp_path)
    monkeypatch.setenv(VARIABLE, "0123456789" * 4)
    served = start(run, port=0)
    assert served.token == "0123456789" * 4
    served.stop()
    for weak in ("", "secret", "twenty characters; and more"):
        monkeypatch.setenv(VARIABLE, weak)
        with pytest.raises(ConfigError) as told:
            start(run, port=0)
        assert told.value.code == "watch-token"


def test_without_a_run_nothing_is_served(tmp_path: Path) -> None:
    with pytest.raises(RunError) as told:
        start(tmp_path, port=0)
    assert told.value.code == "no-run"
