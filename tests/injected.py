"""A generated federation and the command line under the injector of faults, for tests that need real processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nursery import Forked, Nursery

from confrere.data.synthetic import make_microscopy

FAULTS = Path(__file__).parent / "reliability" / "faults.py"
OPTIONS = (
    "--backbone", "test-vit", "adapter.blocks=2", "train.steps=2", "train.batch_size=8", "threads=1", "workers=1",
    "controls=[]",
)  # fmt: skip
Process = subprocess.Popen[bytes] | Forked


def make_place(folder: Path, *, sites: int = 2, images: tuple[int, int] = (16, 20)) -> Path:
    """Write generated hospitals; return the folder."""
    make_microscopy(folder / "hospitals", seed=3, sites=sites, images=images, size=32)
    return folder


def resumable(run: Path) -> bool:
    """Return whether a run can be resumed."""
    return (run / "experiment.toml").exists()


def start(
    place: Path,
    run: Path,
    fault: str,
    *options: str,
    nursery: Nursery | None = None,
    begin: Sequence[str] = ("rounds=3",),
    under: Path | None = None,
    log: Path | None = None,
    cache: Path | None = None,
) -> Process:
    """Start ``confrere run``, or ``resume`` where it was begun, with a fault.

    Args:
        place: holds ``hospitals`` and, unless another ``cache`` is given, the cache.
        run: its folder.
        fault: as ``reliability/faults.py`` has it.
        options: of either command.
        nursery: whose fork the process is, which has its imports done; without one it stands alone.
        begin: options of ``run`` alone, beside OPTIONS.
        under: where files are counted, by default the run.
        log: of the injector.
        cache: of this run.
    """
    words = (
        ["resume", str(run)]
        if resumable(run)
        else ["run", str(place / "hospitals"), "--out", str(run), *OPTIONS, *begin]
    )
    line = ["--under", str(under or run), *(["--log", str(log)] if log else []), fault, "--", *words, *options]
    environment = {**os.environ, "CONFRERE_CACHE": str(cache or place / "cache"), "OMP_NUM_THREADS": "1"}
    if nursery:
        return nursery.start(line, environment, FAULTS)
    command = [sys.executable, str(FAULTS), *line]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: Process) -> tuple[int | None, str]:
    """Return exit code and all that a process said."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, (output + errors).decode()


def tensors(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of a run."""
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}
