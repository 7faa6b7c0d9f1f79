"""``confrere site``: the long-lived process of a hospital, with a SuperNode beside it that carries messages."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confrere.consortium import frame
from confrere.consortium.kit import Kit
from confrere.consortium.probe import probe
from confrere.consortium.worker import Worker
from confrere.errors import NetworkError, UpdateRefusedError
from confrere.flower.processes import environment, free_port, lost, start, stop

TRIES = 3
"""A SuperNode makes so many attempts to connect before it ends; then we look why, and start it again."""
Notify = Callable[[dict[str, Any]], None]


def run_site(kit: Kit, worker: Worker, *, retry: float, notify: Notify = lambda event: None) -> None:
    """Serve until interrupted.

    Args:
        kit: the site's.
        worker: answers.
        notify: called with events, for a log.
        retry: seconds during which a coordinator that cannot be reached, or does not know us, is tried again; 0: once.

    Raises:
        NetworkError: the coordinator cannot be reached, shows a certificate that does not hold, or refuses this site.
    """
    folder = Path(tempfile.mkdtemp(prefix="confrere-"))  # the path of a socket may have 100 characters
    try:
        with _listening(folder / "site.sock", worker):
            _keep_connected(kit, worker.state, folder / "site.sock", retry, notify)
    finally:
        shutil.rmtree(folder)


class _listening:  # noqa: N801  a context, like those of contextlib
    """Answer frames at a Unix socket of ours, each in a thread, until the context ends."""

    def __init__(self, path: Path, worker: Worker) -> None:
        self._path, self._worker = path, worker

    def __enter__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(8)
        threading.Thread(target=self._accept, name="socket", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:  # closed: the context has ended
                return
            threading.Thread(target=self._serve, args=(line,), name="request", daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with line:
            content = frame.receive(line)
            if content is None:
                return
            try:
                header, arrays = self._worker.answer(*frame.unpack(content))
            except UpdateRefusedError as error:
                header, arrays = frame.failure(error.reason, error.fix, error.code), {}
            # The carrier may have been ended meanwhile: then we are asked again, and send the stored answer.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                frame.send(line, frame.pack(header, arrays))


def _keep_connected(kit: Kit, state: Path, path: Path, retry: float, notify: Notify) -> None:
    """Start the SuperNode, and start it again when it ends, as long as that may help."""
    env = environment(state / "flower", **{frame.SOCKET: str(path)})
    log, until, pause = state / "flower" / "supernode.log", time.monotonic() + retry, 1.0
    away, ended = "", False  # the code of why the coordinator cannot be reached, said once; whether it was there
    while True:
        begun = time.monotonic()
        try:
            probe(kit.address, kit.port, kit.folder / "ca.crt")
            away, ended = "", True
            _one_connection(kit, env, log, notify)
        except NetworkError as error:
            if time.monotonic() - begun > 60.0:  # it was connected: the coordinator is away, for now
                until, pause = time.monotonic() + retry, 1.0
            if time.monotonic() > until:
                raise
            if error.code != away:
                notify(_apart(error, ended=ended))
            away = error.code
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _apart(error: NetworkError, *, ended: bool) -> dict[str, Any]:
    """Return the event of being apart from the coordinator; that none runs is the usual state between two runs."""
    if error.code != "net-refused":
        return {"event": "disconnected", "code": error.code, "reason": error.reason}
    words = "the coordinator has ended; waiting for the next run"
    return {"event": "waiting", "reason": words if ended else f"{error.reason}; waiting for the coordinator"}


def _one_connection(kit: Kit, env: dict[str, str], log: Path, notify: Notify) -> None:
    """Run one SuperNode until it ends, which is an error.

    Raises:
        NetworkError: always, with the reason.
    """
    arguments = ["--superlink", kit.target, "--root-certificates", str(kit.folder / "ca.crt")]
    arguments += ["--auth-supernode-private-key", str(kit.folder / "node.key"), "--max-retries", str(TRIES)]
    before = log.stat().st_size if log.exists() else 0
    process = start("flower-supernode", [*arguments, "--port", str(free_port())], env, log)
    notify({"event": "connecting", "site": kit.site})
    try:
        process.wait()
    finally:
        stop(process)
    said = log.read_bytes()[before:].decode("utf-8", "replace")
    refused = refusal(said, kit.site)
    if refused is None:  # it ends when the coordinator has: then that is the reason
        probe(kit.address, kit.port, kit.folder / "ca.crt")
    raise refused or lost("flower-supernode", log)


def refusal(said: str, site: str) -> NetworkError | None:
    """Return the error that a SuperNode's output tells of: the coordinator turned it away; None for any other end."""
    where = f"site {site}"
    if "[code: 2001]" in said:
        what, fix = "the coordinator wants a key and none was sent", "start this site with `confrere site KIT`"
        return NetworkError(what, where=where, fix=fix, code="node-key")
    if "[code: 2004]" in said:
        what = "the coordinator does not know this site's key, or another process uses it"
        fix = "start no second process with this kit; else the coordinator needs a kit that holds this site"
        return NetworkError(what, where=where, fix=fix, code="node-refused")
    if "409 Conflict" in said:  # this and the next are the front's
        what, fix = "another process with this site's kit is connected", "find it; if nobody knows it, revoke the key"
        return NetworkError(what, where=where, fix=fix, code="site-twice")
    if "410 Gone" in said:
        what, fix = "the coordinator has struck off this site's key", "ask for a new kit"
        return NetworkError(what, where=where, fix=fix, code="node-revoked")
    return None
