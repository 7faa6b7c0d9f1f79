"""Processes that begin with everything imported: forks of one that waits. Each is a real process, and killed as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


class Forked:
    """One process of a nursery, with the few things of ``subprocess.Popen`` that kills.py uses."""

    def __init__(self, nursery: Nursery, pid: int, errors: Path) -> None:
        self.pid, self._errors = pid, errors
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

    def communicate(self) -> tuple[str, str]:
        self._ended.wait()
        return "", self._errors.read_text()


class Nursery:
    """Starts one process at a time: ``start`` waits for nothing but the fork."""

    def __init__(self, environment: dict[str, str], errors: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the end of its input ends it, not a signal to its parent
        )
        self._errors = errors

    def start(self, arguments: list[str], environment: dict[str, str]) -> Forked:
        if self._server.stdin is None:
            raise RuntimeError("no pipe")
        asked = {"arguments": arguments, "environment": environment, "errors": str(self._errors)}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Forked(self, self.answer()["pid"], self._errors)

    def close(self) -> None:
        """End the process that waits; those it started have ended."""
        self._server.communicate()

    def answer(self) -> Any:
        if self._server.stdout is None:
            raise RuntimeError("no pipe")
        return json.loads(self._server.stdout.readline())


def _live(asked: dict[str, Any]) -> int:
    import faults

    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, os.devnull, os.O_WRONLY)):
        os.dup2(os.open(name, flags), number)
    os.dup2(os.open(asked["errors"], os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600), 2)
    os.environ.update(asked["environment"])
    sys.argv = ["faults.py", *asked["arguments"]]
    try:
        faults.main()
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
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
