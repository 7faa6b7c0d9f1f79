"""One look at the coordinator from a site: name, port, certificate and clock, each with an error of its own.

The certificate is judged by OpenSSL, with the consortium's authority as the only one that is trusted.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from confrere.errors import NetworkError

AHEAD, BEHIND = 5.0, 305.0
"""Seconds that a site's clock may be ahead of the coordinator's and behind it: Flower refuses requests beyond."""
T = TypeVar("T")
Place = tuple[int, tuple[Any, ...]]  # address family and socket address

# By OpenSSL's X509_V_ERR_*.
_VERDICTS = {
    9: dict(
        code="tls-early",
        what="the server's certificate is not valid yet",
        fix="check this machine's clock, then the server's",
    ),
    10: dict(
        code="tls-expired",
        what="the server's certificate has expired",
        fix="check this machine's clock; whoever provisions runs `confrere provision --renew`",
    ),
    18: dict(
        code="tls-self-signed",
        what="the server's certificate is signed by itself, not by the consortium's authority",
        fix="find out who answers at this address: it is not the coordinator of this kit",
    ),
    62: dict(
        code="tls-name",
        what="the server's certificate is for another name",
        fix="correct the address in the roster, then `confrere provision --renew`",
    ),
}
_VERDICTS[64] = _VERDICTS[62]  # the same for an IP address
_UNTRUSTED = dict(
    code="tls-ca",
    what="the server's certificate is not signed by the consortium's authority",
    fix="a proxy may open TLS here: have this address exempted; else compare the authority's fingerprint by telephone",
)


@dataclass(frozen=True)
class Probe:
    """What was seen: TLS version, names and end of the server's certificate, and ``skew``.

    ``skew``: seconds that the coordinator's clock is ahead of this one, to within a second or so.
    """

    address: str
    port: int
    protocol: str
    names: tuple[str, ...]
    expires: datetime
    skew: float


def probe(address: str, port: int, ca: Path, *, timeout: float = 5.0) -> Probe:
    """Connect to a coordinator as a site does, but without a key, and ask for nothing.

    Args:
        address: DNS name or IP address.
        port: TCP port.
        ca: certificate (PEM) of the only authority that is trusted.
        timeout: seconds for the name, and again for the rest.

    Raises:
        NetworkError: ``net-dns``, ``net-refused``, ``net-time-out``, ``net-unreachable``, ``net-plaintext``;
            ``tls-ca``, ``tls-self-signed``, ``tls-expired``, ``tls-early``, ``tls-name``, ``tls-handshake``;
            ``net-answer``, ``clock-skew``; ``kit-ca`` where ``ca`` is no certificate.
    """
    where = f"{address}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except OSError:  # ssl.SSLError is one
        fix = "ask for a new kit from whoever ran `confrere provision`"
        raise NetworkError("ca.crt is not a certificate", where=str(ca), fix=fix, code="kit-ca") from None
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 has it by itself
    slow = _unknown(where, f"no name server answered within {timeout:g} s")
    places = _within(timeout, lambda: _resolve(address, port), slow)
    found = _within(timeout, lambda: _ask(places, address, port, context, timeout), _timed_out(timeout, where))
    if not -BEHIND < -found.skew < AHEAD:
        side = "behind" if found.skew > 0 else "ahead of"
        raise NetworkError(
            f"this machine's clock is {abs(found.skew):.0f} s {side} the coordinator's; Flower refuses more than "
            f"{AHEAD:.0f} s ahead and {BEHIND:.0f} s behind",
            where=where,
            fix="set both clocks by NTP (`timedatectl set-ntp true`)",
            code="clock-skew",
        )
    return found


def _within(seconds: float, action: Callable[[], T], late: NetworkError) -> T:
    """Return what ``action`` returns, or raise ``late``: looking up names and slow drips of bytes have no time-out."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise late
    return results[0]


def _resolve(address: str, port: int) -> list[Place]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unknown(f"{address}:{port}", getattr(error, "strerror", None) or "it is no DNS name") from None
    return [(family, there) for family, _, _, _, there in found]


def _ask(places: Sequence[Place], address: str, port: int, context: ssl.SSLContext, timeout: float) -> Probe:
    where = f"{address}:{port}"
    with _connected(places, where, timeout) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=address) as secured:
                return _look(secured, address, port)
        except ssl.SSLCertVerificationError as error:
            found = _VERDICTS.get(error.verify_code, _UNTRUSTED)
            raise NetworkError(found["what"], where=where, fix=found["fix"], code=found["code"]) from None
        except TimeoutError:
            raise _timed_out(timeout, where) from None
        except (OSError, http.client.HTTPException) as error:
            raise _no_tls(error, where) from None


def _connected(places: Sequence[Place], where: str, timeout: float) -> socket.socket:
    """Return a connection to the first place that takes one: a name may have an address of version 6 and one of 4."""
    for family, there in places:
        plain = socket.socket(family, socket.SOCK_STREAM)
        plain.settimeout(timeout)
        try:
            plain.connect(there)
            return plain
        except OSError as error:
            plain.close()
            last = error
    if isinstance(last, TimeoutError):
        raise _timed_out(timeout, where)
    if isinstance(last, ConnectionRefusedError):
        fix = "is the coordinator running? does a firewall on its machine let this port through?"
        raise NetworkError("nothing listens on this port", where=where, fix=fix, code="net-refused")
    fix, what = "check the network, routing and firewall of this machine", f"cannot be reached: {last.strerror}"
    raise NetworkError(what, where=where, fix=fix, code="net-unreachable")


def _look(secured: ssl.SSLSocket, address: str, port: int) -> Probe:
    """Return what the certificate says, and the clock by the Date header of any answer."""
    seen: dict[str, Any] = secured.getpeercert() or {}
    names = tuple(name for _, name in seen.get("subjectAltName", ()))
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(seen["notAfter"]), UTC)
    sent = time.time()
    secured.sendall(f"HEAD / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
    with http.client.HTTPResponse(secured, method="HEAD") as answer:
        answer.begin()
        middle, told = (sent + time.time()) / 2, answer.getheader("Date") or ""
    try:
        date = parsedate_to_datetime(told)
    except ValueError:
        raise _no_coordinator(f"{address}:{port}") from None
    skew = date.timestamp() + 0.5 - middle  # the header has whole seconds, cut off
    return Probe(address, port, secured.version() or "", names, ends, skew)


def _unknown(where: str, why: str) -> NetworkError:
    fix = "check the spelling, the network and this machine's name server; or put the IP address into the roster"
    return NetworkError(f"the name cannot be resolved: {why}", where=where, fix=fix, code="net-dns")


def _no_tls(error: Exception, where: str) -> NetworkError:
    reason = getattr(error, "reason", None) or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return NetworkError(
            "the server answers without TLS",
            where=where,
            fix="check the port; the coordinator must be started from its kit, never insecurely",
            code="net-plaintext",
        )
    if isinstance(error, http.client.HTTPException):
        return _no_coordinator(where)
    what = f"the TLS handshake failed: {reason or getattr(error, 'strerror', None) or type(error).__name__}"
    fix = "a firewall or proxy may cut the connection: ask for this address and port to be let through unopened"
    return NetworkError(what, where=where, fix=fix, code="tls-handshake")


def _no_coordinator(where: str) -> NetworkError:
    what, fix = "the server speaks TLS, but does not answer as a coordinator", "check address and port in the roster"
    return NetworkError(what, where=where, fix=fix, code="net-answer")


def _timed_out(seconds: float, where: str) -> NetworkError:
    fix = "a firewall may drop packets without a word: ask for this address and port to be let through"
    return NetworkError(f"no answer within {seconds:g} s", where=where, fix=fix, code="net-time-out")
