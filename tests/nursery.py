"""Processes that begin with everything imported: forks of one that waits. Each is a real process, and killed as one."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any


class Forked:
    """One process of a nursery, with the few things of ``subprocess.Popen`` that tests use."""

    def __init__(self, nursery: Nursery, pid: int, said: Path) -> None:
        self.pid, self._said = pid, said
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait, args=(nursery,), daemon=True).start()

    def _wait(self, nursery: Nursery) -> None:
        self.returncode = nursery.answer()["code"]
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for the end; return what was written to standard output and to standard error."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self._said.with_suffix(".out").read_bytes(), self._said.with_suffix(".err").read_bytes()


class Nursery:
    """Starts one process at a time: ``start`` waits for nothing but the fork; ``said`` keeps their words."""

    def __init__(self, environment: dict[str, str], said: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the end of its input ends it, not a signal to its parent
        )
        self._said = said

    def start(
        self, arguments: list[str], environment: dict[str, str], script: Path | None = None, cwd: Path | None = None
    ) -> Forked:
        """Fork ``confrere ARGUMENTS``, or a script; a ``sitecustomize`` of the environment's PYTHONPATH runs before."""
        if self._server.stdin is None:
            raise RuntimeError("no pipe")
        asked = {"arguments": arguments, "environment": environment, "said": str(self._said)}
        asked |= {"script": str(script) if script else None, "cwd": str(cwd or Path.cwd())}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Forked(self, self.answer()["pid"], self._said)

    def close(self) -> None:
        """End the process that waits; those it started have ended."""
        self._server.communicate()

    def answer(self) -> Any:
        if self._server.stdout is None:
            raise RuntimeError("no pipe")
        return json.loads(self._server.stdout.readline())


def _become(asked: dict[str, Any]) -> None:
    """Take over what a process of its own would have begun with."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, suffix in ((1, ".out"), (2, ".err")):
        path = Path(asked["said"]).with_suffix(suffix)
        os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if (Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))


def _live(asked: dict[str, Any]) -> int:
    _become(asked)
    script = asked["script"]
    sys.argv = [script or "confrere", *asked["arguments"]]
    try:
        if script:
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module("confrere", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    import confrere.cli
    import confrere.job
    import confrere.report  # noqa: F401
    from confrere.adapters.lora import LoraSpec
    from confrere.backbones import load

    load("test-vit", lora=LoraSpec(slots=("general",), blocks=1))  # imports the library of models
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = _live(json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
