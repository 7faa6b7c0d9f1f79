"""A server of one thread that answers each connection as it is told."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def serving(answer: Answer, listening: socket.socket | None = None) -> Iterator[int]:
    """Answer connections to a free port of this machine, which is yielded, until the end."""
    with listening or socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):  # the other side went away, or refused the certificate
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(5)
                        if not done.is_set():
                            answer(connection)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            with contextlib.suppress(OSError):
                socket.create_connection(server.getsockname()[:2], timeout=5).close()  # wakes accept()
            thread.join()


def answering(folder: Path, certificate: bytes, key: bytes, text: bytes | None = None, *, ahead: float = 0) -> Answer:
    """Return a TLS server's answer: ``text``, or what a coordinator says whose clock is so many seconds ahead."""
    file = folder / "served.pem"
    file.write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(10_000)
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
            secured.sendall(text or f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\n\r\n".encode())

    return answer


def dripping(connection: socket.socket) -> None:
    """Begin an answer of TLS, and go on with a byte now and then, for ever."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:
        connection.sendall(b"\x02")
        time.sleep(0.02)
