"""Flower's own commands as child processes: their environment, their start, their end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confrere.errors import NetworkError, RunError

SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
"""No telemetry, no look for updates, nothing installed while it runs; a message waits 0.2 s to be taken up, not 1 s."""
SHIM = '#!/bin/sh\nexec {python} -m confrere.flower.child {command} "$@"\n'
OURS = ("flwr-clientapp", "flwr-serverapp")
"""Commands that Flower starts by name, which we start so that they end with their parent and run no sent code."""
CLI_SECONDS = 120.0


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of Flower's processes, with its files and our commands below ``home``."""
    binaries = home / "bin"
    binaries.mkdir(parents=True, exist_ok=True, mode=0o700)
    for command in OURS:
        shim = binaries / command
        shim.write_text(SHIM.format(python=sys.executable, command=command), encoding="utf-8")
        shim.chmod(0o700)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **SILENT, "FLWR_HOME": str(home / "flwr"), "PATH": path, **more}


def start(command: str, arguments: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start one of Flower's servers, which ends when this process does; what it prints goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "confrere.flower.child", command, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone: we end them in order
        )


def stop(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """End a process: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def flwr(arguments: Sequence[str], env: dict[str, str]) -> dict[str, Any]:
    """Run Flower's command line client with JSON as its output; return what it says.

    Raises:
        RunError: it failed, with what it said.
    """
    command = [sys.executable, "-m", "confrere.flower.child", "flwr", *arguments, "--format", "json"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CLI_SECONDS, check=False)
        said = json.loads(done.stdout[done.stdout.index("{") :])
    except subprocess.TimeoutExpired:
        what, fix = f"flwr {arguments[0]} did not end in {CLI_SECONDS:g} s", "is the machine overloaded?"
        raise RunError(what, fix=fix, code="flower") from None
    except ValueError:
        said = {"success": False, "error-message": (done.stderr or done.stdout).strip()[-300:]}
    if not said.get("success"):
        text = " ".join(str(said.get("error-message", "no reason given")).split())[:300]
        fix = "look at the log of the SuperLink, superlink.log"
        raise RunError(f"flwr {' '.join(arguments[:2])} failed: {text}", fix=fix, code="flower")
    return dict(said)


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log, for a message to the local user."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if log.exists() else ""


def lost(command: str, log: Path) -> NetworkError:
    """Return the error of a server of Flower's that ended by itself."""
    return NetworkError(
        f"{command} ended by itself", where=str(log), fix=f"its last lines:\n{tail(log)}", code="flower-ended"
    )
