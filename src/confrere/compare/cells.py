"""Cells: trainings that are kept by their content, so that none is done twice.

What decides a cell's result is its experiment (without where the data lie and how many work at a time), the digest
of its data and split, the versions of the packages, and the source that it runs. The digest of all this names its
directory, ``cells/<digest>/``, which is an ordinary run directory. ``cell.json`` in it says what the digest is of and
marks it as finished; ``index.json`` tells a reader which cell is which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from confrere.compare.processes import in_processes
from confrere.compare.source import source_of
from confrere.config import Experiment
from confrere.errors import ConfrereError, RunError
from confrere.job import run_experiment
from confrere.method import METHODS
from confrere.record.files import read_json, write_json
from confrere.record.machine import machine

Notify = Callable[[dict[str, Any]], None]
NOT_OF_CONTENT = ("experiment.track", "experiment.controls")
NOT_VERSIONS = ("threads", "cpu_capability", "cores", "system")
DIVERGED = ("sites answered", "examination failed")
"""What the errors of a training that diverged say; any other error is no property of the settings."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of one method: its experiment, its data and what it is for.

    Args:
        experiment: with the method, the seed and no controls.
        data: name of the data set. data_digest: of its images, labels, patients and split.
        label: the method as it was asked for. trial: of tuning: its test data are never read.
    """

    experiment: Experiment
    data: str
    data_digest: str
    label: str
    trial: bool = False

    @cached_property
    def content(self) -> dict[str, Any]:
        """Return everything that decides the result."""
        method = self.experiment.build_method()
        options = {f"experiment.method.{f.name}": getattr(method, f.name) for f in fields(method)}
        choices = {key: value for key, value in self.experiment.choices().items() if key not in NOT_OF_CONTENT}
        versions = {key: value for key, value in machine().items() if key not in NOT_VERSIONS}
        source = source_of(METHODS[str(self.experiment.method["name"])])
        return {"choices": choices | options, "data": self.data_digest, "versions": versions, "source": source}

    @cached_property
    def digest(self) -> str:
        """Return the name of the cell: 16 hexadecimal digits."""
        text = json.dumps(self.content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Return what a reader calls it."""
        return f"{self.data}, {self.label}, {'trial' if self.trial else f'seed {self.experiment.seed}'}"


def folder(out: Path, cell: Cell) -> Path:
    """Return the run directory of a cell."""
    return out / "cells" / cell.digest


def state(out: Path, cell: Cell) -> str:
    """Return ``finished``, ``diverged`` (a trial that did), or ``waiting``."""
    path = folder(out, cell)
    if (path / "cell.json").exists() and (path / "results.json").exists():
        return "finished"
    return "diverged" if cell.trial and (path / "diverged.json").exists() else "waiting"


def run_cells(out: Path, cells: Sequence[Cell], *, jobs: int, notify: Notify) -> None:
    """Train the cells that are not finished, ``jobs`` at a time.

    A trial that diverges is marked and passed over; any other failure ends the comparison.

    Raises:
        RunError: a training failed, or the data changed while it ran.
    """
    todo = list({cell.digest: cell for cell in cells if state(out, cell) == "waiting"}.values())
    done = len({cell.digest for cell in cells}) - len(todo)
    notify({"event": "runs", "total": done + len(todo), "done": done})
    write_index(out, cells)
    if jobs == 1:
        for cell in todo:
            notify({"event": "run", "path": folder(out, cell), "name": cell.name})
            try:
                run_experiment(cell.experiment, folder(out, cell), notify=notify)
            except ConfrereError as error:
                _failed(out, cell, error)
            else:
                _seal(out, cell)
            notify({"event": "run-done", "path": folder(out, cell), "name": cell.name})
    else:
        tasks = [(cell, cell.experiment, folder(out, cell), cell.name) for cell in todo]
        for cell, failure in in_processes(tasks, jobs, notify):
            if failure is None:
                _seal(out, cell)
            else:
                _failed(out, cell, failure)
    write_index(out, cells)


def _seal(out: Path, cell: Cell) -> None:
    """Mark a cell as finished, once its data are those its digest is of."""
    path = folder(out, cell)
    if read_json(path / "federation.json")["digest"] != cell.data_digest:
        raise RunError(
            "the data changed while this was trained",
            where=str(path),
            fix="run the same command again",
            code="data-changed",
        )
    write_json(path / "cell.json", cell.content)


def _failed(out: Path, cell: Cell, error: ConfrereError) -> None:
    if not cell.trial or not any(words in error.what for words in DIVERGED):
        raise RunError(error.what, where=f"{cell.name}: {folder(out, cell)}", fix=error.fix, code=error.code) from error
    write_json(folder(out, cell) / "diverged.json", {"reason": error.reason})


def write_index(out: Path, cells: Sequence[Cell]) -> None:
    """Write index.json: what is in which cell, for readers; cells of earlier calls stay listed."""
    path = out / "index.json"
    known = read_json(path)["cells"] if path.exists() else {}
    kept = {digest: entry for digest, entry in known.items() if (out / "cells" / digest).is_dir()}
    for cell in cells:
        method = cell.experiment.method
        kept[cell.digest] = {
            "data": cell.data,
            "method": cell.label,
            "seed": cell.experiment.seed,
            "for": "tuning" if cell.trial else "comparison",
            "lr": cell.experiment.train.lr,
            "options": {key: value for key, value in method.items() if key != "name"},
            "state": state(out, cell),
        }
    order = sorted(kept, key=lambda d: [str(kept[d][key]) for key in ("data", "method", "for", "seed")])
    write_json(path, {"format": 1, "cells": {digest: kept[digest] for digest in order}})
