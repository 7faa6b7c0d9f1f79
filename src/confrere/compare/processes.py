"""Trainings side by side: each in a process of its own, which is only given a TOML file and ends with this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from confrere.config import Experiment
from confrere.errors import RunError
from confrere.record.files import write_bytes
from confrere.record.machine import cores

T = TypeVar("T")
Task = tuple[T, Experiment, Path, str]


def in_processes(
    tasks: Sequence[Task[T]], jobs: int, notify: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[T, RunError | None]]:
    """Run experiments, ``jobs`` at a time; yield each one's key when it is done, and its error if it failed.

    Args:
        tasks: key, experiment, run directory and name for readers.
        jobs: processes. The cores are divided among them.
        notify: called with the events ``run`` and ``run-done``.
    """
    waiting = list(tasks)
    running: list[tuple[Task[T], subprocess.Popen[str]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                notify({"event": "run", "path": task[2], "name": task[3]})
                running.append((task, _start(task[1], task[2], jobs)))
            for pair in [pair for pair in running if pair[1].poll() is not None]:
                running.remove(pair)
                (key, _, path, name), process = pair
                _, errors = process.communicate()
                _plan(path).unlink(missing_ok=True)
                yield key, told(errors) if process.returncode else None
                notify({"event": "run-done", "path": path, "name": name})
            time.sleep(0.2)
    finally:
        for _, process in running:
            process.terminate()
            process.communicate()


def told(errors: str) -> RunError:
    """Return the error that a training's last words tell: what the command line prints, taken apart again."""
    before, mark, words = errors.strip().rpartition("confrere: ")
    if not mark or (before and not before.endswith("\n")):
        return RunError(errors.strip() or "a run failed", code="training-in-comparison")
    first, *rest = words.splitlines()
    said = dict(line.strip().partition(": ")[::2] for line in rest)
    return RunError(first, fix=said.get("Fix", ""), code=said.get("Code", ""))


def _start(experiment: Experiment, path: Path, jobs: int) -> subprocess.Popen[str]:
    share = experiment.workers or max(1, cores() // jobs)
    write_bytes(_plan(path), experiment.model_copy(update={"workers": share}).toml().encode())
    if (path / "experiment.toml").exists():
        verb = ["resume", str(path), "--quiet"]
    else:
        verb = ["run", str(_plan(path)), "--out", str(path), "--quiet"]
    command = [sys.executable, "-m", "confrere.compare.child", str(os.getpid()), *verb]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _plan(path: Path) -> Path:
    return path.parent / f"{path.name}.toml"
