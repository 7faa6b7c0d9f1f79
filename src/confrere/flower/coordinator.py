"""``confrere coordinator``: a SuperLink behind its front, the sites' keys registered, a run submitted and followed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from confrere.config import Experiment
from confrere.consortium.authority import certificate_pem, new_authority, new_server, now
from confrere.consortium.keys import node_pem
from confrere.consortium.kit import Kit
from confrere.errors import RunError, printable
from confrere.flower.front import Front, serve
from confrere.flower.processes import environment, flwr, free_port, lost, start, stop
from confrere.record.files import read_json, write_bytes, write_files, write_json
from confrere.record.run import Run

APP = """[project]
name = "confrere"
version = "{version}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "confrere"

[tool.flwr.app.components]
serverapp = "confrere.flower.server:app"
clientapp = "confrere.flower.client:app"

[tool.flwr.app.config]
settings = ""
"""
LOOPBACK_DAYS = 825
POLL = 0.5
STARTED = 60.0
"""Seconds until our application must have said that it runs."""
Notify = Callable[[dict[str, Any]], None]


class RemoteError(RunError):
    """The end of a run in Flower's process: what it said in status.json, and its exit code."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        super().__init__(str(status["what"]), where=status["where"], fix=status["fix"], code=status["code"])
        self.exit_code = int(status["exit_code"])


@dataclass(kw_only=True)
class Coordinator:
    """The processes of a coordinator, as a context: they start on entering and end on leaving.

    Args:
        kit: the coordinator's.
        host: where hospitals reach the front.
        log_file: the run's structured log, see :mod:`confrere.watch.log`.
        notify: called with what happens beside the run.
        show: called with every event of the run.
    """

    kit: Kit
    host: str = "0.0.0.0"
    log_file: Path | None = None
    notify: Notify = lambda event: None
    show: Notify = lambda event: None
    _link: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.home = self.kit.folder / "superlink"
        self.log = self.home / "superlink.log"
        self.env = environment(self.home)

    def __enter__(self) -> Coordinator:
        self._held = contextlib.ExitStack()
        self._held.enter_context(Run(self.home).lock())  # one coordinator a kit
        self._address = f"127.0.0.1:{free_port()}"
        try:
            self._start_link()
            self.nodes = self._registered()
            names = {_as_sent(member.node): site for site, member in self.kit.sites.items()}
            front = Front(f"https://{self._address}", self._ca, names, self.notify, self._revoked() - names.keys())
            certificate, key = self.kit.folder / "server.crt", self.kit.folder / "server.key"
            self._close = serve(front, self.host, self.kit.port, certificate, key)
        except BaseException:
            self._stop_link()
            self._held.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        self._stop_link()
        self._held.close()

    def _start_link(self) -> None:
        """Start the SuperLink on loopback, with a certificate of its own: it knows nodes by key only under TLS."""
        host, port = self._address.split(":")
        authority = new_authority("loopback")
        key, certificate = new_server(authority, host, now() + timedelta(days=LOOPBACK_DAYS))
        self._ca = self.home / "loopback" / "ca.crt"
        files = {"ca.crt": certificate_pem(authority.certificate), "server.crt": certificate, "server.key": key}
        write_files(self._ca.parent, files)
        arguments = ["--host", host, "--port", port, "--database", str(self.home / "state.db")]
        arguments += ["--ssl-ca-certfile", str(self._ca), "--ssl-certfile", str(self._ca.with_name("server.crt"))]
        arguments += ["--ssl-keyfile", str(self._ca.with_name("server.key"))]
        arguments += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self._link = start("flower-superlink", arguments, self.env, self.log)
        where = {"address": self._address, "root-certificates": str(self._ca.resolve())}
        config = tomli_w.dumps({"superlink": {"default": "here", "here": where}})
        write_bytes(self.home / "flwr" / "config.toml", config.encode())
        until = time.monotonic() + STARTED
        while not _answers(self._address, self._ca):
            if self._link.poll() is not None or time.monotonic() > until:
                self._stop_link()
                raise lost("flower-superlink", self.log)
            time.sleep(0.1)

    def _stop_link(self) -> None:
        if self._link is not None:
            stop(self._link)

    def _registered(self) -> dict[str, int]:
        """Return the node of every site of the kit, registering new ones and striking off those that left."""
        known: dict[str, Any] = read_json(self.home / "nodes.json") if (self.home / "nodes.json").exists() else {}
        for site, entry in list(known.items()):
            if site not in self.kit.sites or entry["key"] != self.kit.sites[site].node:
                flwr(["supernode", "unregister", str(entry["node"]), "here"], self.env)
                write_json(self.home / "revoked.json", {"keys": sorted({*self._revoked(), _as_sent(entry["key"])})})
                del known[site]
                write_json(self.home / "nodes.json", known)
        for site, member in sorted(self.kit.sites.items()):
            if site not in known:
                key = self.home / "keys" / f"{site}.pub"
                write_bytes(key, f"{member.node}\n".encode())
                said = flwr(["supernode", "register", str(key), "here", "--name", site], self.env)
                known[site] = {"node": str(said["node-id"]), "key": member.node}
                write_json(self.home / "nodes.json", known)
                self.notify({"event": "registered", "site": site})
        return {site: int(entry["node"]) for site, entry in known.items()}

    def _revoked(self) -> frozenset[str]:
        """Return the keys that were struck off, as nodes send them."""
        file = self.home / "revoked.json"
        return frozenset(read_json(file)["keys"]) if file.exists() else frozenset()

    def conduct(
        self,
        experiment: Experiment,
        out: Path,
        begun: Callable[[], None],
        *,
        deadline: float,
        patience: float,
        late: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Submit the run and follow it; return verdicts.json, empty without controls. ``begun`` is called once.

        Raises:
            ConfrereError: the run failed; text and exit code are those of the process in which it ran.
        """
        token = secrets.token_hex(8)
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(self.home / "experiment.toml", experiment.toml().encode())
        settings = {
            "out": str(out.resolve()),
            "run": token,
            "consortium": self.kit.consortium,
            "nodes": self.nodes,
            "identities": {site: identity.hex() for site, identity in self.kit.identities.items()},
            "log": str(self.log_file.resolve()) if self.log_file else "",
            "events": str((self.home / "events.jsonl").resolve()),
            "experiment": str((self.home / "experiment.toml").resolve()),
            "deadline": deadline,
            "patience": patience,
            "late": list(late),
        }
        write_json(self.home / "settings.json", settings)
        write_bytes(self.home / "events.jsonl", b"")
        write_bytes(self.home / "app" / "pyproject.toml", APP.format(version=self.kit.confrere).encode())
        chosen = "settings=" + json.dumps(str((self.home / "settings.json").resolve()))
        flwr(["run", str(self.home / "app"), "here", "--run-config", chosen], self.env)
        return self._follow(out, token, begun)

    def _follow(self, out: Path, token: str, begun: Callable[[], None]) -> dict[str, Any]:
        until, started, shown = time.monotonic() + STARTED, False, 0
        while True:
            time.sleep(POLL)
            if self._link is None or self._link.poll() is not None:
                raise lost("flower-superlink", self.log)
            status = read_json(out / "status.json") if (out / "status.json").exists() else {}
            if status.get("run") != token:
                if time.monotonic() > until:
                    raise lost("the application", self.log)
                continue
            if not started:
                begun()
                started = True
            shown = told(self.home / "events.jsonl", shown, self.show)
            if status["phase"] == "done":
                return dict(read_json(out / "verdicts.json")) if (out / "verdicts.json").exists() else {}
            if status["phase"] == "failed":
                raise RemoteError(status["failure"])
            if not _lives(int(status["process"])):
                time.sleep(POLL)  # its last words may be on their way
                if read_json(out / "status.json")["phase"] in ("done", "failed"):
                    continue
                fix = "run the same command again: it goes on where it was"
                raise RunError("the process of the run was killed", where=str(out), fix=fix, code="flower")


def told(file: Path, seen: int, show: Notify) -> int:
    """Show the events that stand in a file behind its first ``seen`` bytes, a line each; return how far it was read."""
    with file.open("rb") as read:
        read.seek(seen)
        new = read.read()
    whole = new[: new.rfind(b"\n") + 1]  # the last line may be half written
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):  # torn by a full disk
            event = json.loads(line)
            if "reason" in event:  # a site may have sent it
                event["reason"] = printable(str(event["reason"]))
            show(event)
    return seen + len(whole)


def _as_sent(node: str) -> str:
    """Return an OpenSSH public key as nodes send it in a header: base64 of PEM."""
    return base64.b64encode(node_pem(node)).decode()


def _answers(address: str, ca: Path) -> bool:
    trusted = ssl.create_default_context(cafile=str(ca))
    try:
        return httpx.get(f"https://{address}/health", timeout=2.0, trust_env=False, verify=trusted).status_code < 500
    except httpx.HTTPError:
        return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
