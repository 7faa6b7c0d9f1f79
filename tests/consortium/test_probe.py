"""What a site finds when it looks at the coordinator: each thing that is wrong has a code and words of its own."""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from tls_server import Answer, answering, dripping, serving

from confrere.consortium import authority, keys
from confrere.consortium.authority import Authority
from confrere.consortium.probe import probe
from confrere.errors import NetworkError

OWN = authority.new_authority("Skin")
OTHER = authority.new_authority("Skin")  # the same name, another key
NOW = authority.now()


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "ca.crt"
    path.write_bytes(authority.certificate_pem(OWN.certificate))
    return path


def server(
    folder: Path,
    by: Authority = OWN,
    address: str = "localhost",
    days: tuple[int, int] = (0, 9),
    text: bytes | None = None,
    ahead: float = 0,
) -> Answer:
    """Return the answer of a server with a certificate by ``by``, valid from ``days`` to ``days`` from now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "now", lambda: NOW + timedelta(days=days[0]))
        key, certificate = authority.new_server(by, address, NOW + timedelta(days=days[1]))
    return answering(folder, certificate, key, text, ahead=ahead)


def self_signed(folder: Path) -> Answer:
    return answering(folder, authority.certificate_pem(OTHER.certificate), keys.pem(OTHER.key))


def plaintext(connection: socket.socket) -> None:
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def refused(answer: Answer, ca: Path, address: str = "localhost", timeout: float = 5.0) -> NetworkError:
    with serving(answer) as port, pytest.raises(NetworkError) as caught:
        probe(address, port, ca, timeout=timeout)
    assert caught.value.fix
    assert caught.value.where == f"{address}:{port}"
    return caught.value


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
def test_a_right_server_is_described(tmp_path: Path, ca: Path, address: str) -> None:
    with serving(server(tmp_path)) as port:
        found = probe(address, port, ca)
    assert found.names == ("localhost", "127.0.0.1")
    assert found.expires == NOW + timedelta(days=9)
    assert found.protocol == "TLSv1.3"
    assert abs(found.skew) < 2


def test_six_bad_servers_are_refused_each_in_its_own_words(tmp_path: Path, ca: Path) -> None:
    cases = {
        "net-plaintext": plaintext,
        "tls-ca": server(tmp_path, OTHER),
        "tls-expired": server(tmp_path, days=(-9, -1)),
        "tls-early": server(tmp_path, days=(2, 9)),
        "tls-self-signed": self_signed(tmp_path),
        "tls-name": server(tmp_path, address="other.example"),
    }
    found = {code: refused(answer, ca) for code, answer in cases.items()}
    assert {code: error.code for code, error in found.items()} == {code: code for code in cases}
    assert len({error.what for error in found.values()}) == len(cases)
    print(f"\nG37 (probe): {len(found)} of {len(cases)} refused, each with its own message")


def test_a_certificate_for_another_address_is_refused(tmp_path: Path, ca: Path) -> None:
    assert refused(server(tmp_path, address="10.0.0.7"), ca, "127.0.0.1").code == "tls-name"
    assert refused(server(tmp_path, address="other.example"), ca, "127.0.0.1").code == "tls-name"


def test_a_server_of_the_same_machine_but_no_coordinator_is_refused(tmp_path: Path, ca: Path) -> None:
    for text in (b"hello\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nDate: today\r\n\r\n"):
        assert refused(server(tmp_path, text=text), ca).code == "net-answer"


def test_a_handshake_that_is_cut_off_is_told(ca: Path) -> None:
    assert refused(lambda connection: None, ca).code == "tls-handshake"
    assert refused(lambda connection: connection.sendall(b"\x15\x03\x03\x00\x02\x02\x28"), ca).code == "tls-handshake"


@pytest.mark.parametrize(("ahead", "words"), [(600, "behind"), (-10, "ahead of"), (-90_000, "ahead of")])
def test_a_clock_that_flower_would_refuse_is_refused(tmp_path: Path, ca: Path, ahead: float, words: str) -> None:
    error = refused(server(tmp_path, ahead=ahead), ca)
    assert error.code == "clock-skew"
    seconds = int(error.what.split(" s ")[0].split()[-1])
    assert abs(seconds - abs(ahead)) <= 2
    assert f"s {words} the coordinator's" in error.what


@pytest.mark.parametrize("ahead", [200, -2])
def test_a_clock_that_flower_takes_is_measured(tmp_path: Path, ca: Path, ahead: float) -> None:
    with serving(server(tmp_path, ahead=ahead)) as port:
        assert abs(probe("localhost", port, ca).skew - ahead) < 2


def test_a_closed_port_is_told(ca: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address in ("127.0.0.1", "localhost"):
        with pytest.raises(NetworkError, match="nothing listens") as caught:
            probe(address, port, ca)
        assert caught.value.code == "net-refused"


def test_a_name_that_is_none_is_told(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(NetworkError, match="no DNS name") as caught:
        probe("a" * 70, 443, ca)
    assert caught.value.code == "net-dns"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NetworkError, match="Name or service not known") as caught:
        probe("coordinator.invalid", 443, ca)
    assert caught.value.code == "net-dns"


def test_a_network_without_a_way_there_is_told(ca: Path) -> None:
    with pytest.raises(NetworkError, match="cannot be reached") as caught:
        probe("255.255.255.255", 443, ca)
    assert caught.value.code == "net-unreachable"


def silent(connection: socket.socket) -> None:
    connection.recv(10_000)
    connection.recv(10_000)  # until the other side gives up


@pytest.mark.parametrize("answer", [silent, dripping], ids=["silent", "dripping"])
def test_nothing_is_waited_for_longer_than_the_time_out(ca: Path, answer: Answer) -> None:
    started = time.monotonic()
    assert refused(answer, ca, timeout=0.3).code == "net-time-out"
    assert time.monotonic() - started < 4


def test_a_name_server_that_does_not_answer_is_not_waited_for(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    with pytest.raises(NetworkError, match="no name server answered") as caught:
        probe("coordinator.example", 443, ca, timeout=0.1)
    assert caught.value.code == "net-dns"


def test_a_full_queue_times_out(ca: Path) -> None:
    """A server that never accepts: the connection stands, and nothing comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as deaf, pytest.raises(NetworkError) as caught:
        probe("127.0.0.1", deaf.getsockname()[1], ca, timeout=0.2)
    assert caught.value.code == "net-time-out"


def test_a_certificate_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    for content in (None, b"x"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(NetworkError) as caught:
            probe("localhost", 1, path)
        assert caught.value.code == "kit-ca"


def test_the_probe_sends_no_key_and_no_name(tmp_path: Path, ca: Path) -> None:
    seen: list[bytes] = []
    inner = server(tmp_path)

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            seen.append(connection.recv(10_000, socket.MSG_PEEK))
        inner(connection)

    with serving(answer) as port:
        probe("127.0.0.1", port, ca)
    assert seen
    assert b"north" not in b"".join(seen)
