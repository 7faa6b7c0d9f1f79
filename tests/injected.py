"""A generated federation and the command line under the injector, for tests that need real processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from nursery import Forked, Nursery

from confrere.data.synthetic import make_microscopy

FAULTS = Path(__file__).with_name("faults.py")
OPTIONS = (
    "--backbone", "test-vit", "adapter.blocks=2", "train.steps=2", "train.batch_size=8", "threads=1", "workers=1",
    "controls=[]", "rounds=3",
)  # fmt: skip


def make_place(folder: Path) -> Path:
    """Write two generated hospitals; return the folder."""
    make_microscopy(folder / "hospitals", seed=3, sites=2, images=(16, 20), size=32)
    return folder


def start(
    place: Path, run: Path, fault: str, verb: str, *options: str, nursery: Nursery | None = None
) -> subprocess.Popen[bytes] | Forked:
    """Start ``confrere VERB`` with a fault, as a process of its own or as a fork, which has its imports done."""
    words = ["resume", str(run)] if verb == "resume" else ["run", str(place / "hospitals"), "--out", str(run), *OPTIONS]
    line = ["--under", str(run), fault, "--", *words, *options]
    environment = {**os.environ, "CONFRERE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    if nursery:
        return nursery.start(line, environment, FAULTS)
    return subprocess.Popen(
        [sys.executable, str(FAULTS), *line],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell would have it ignored
    )


def finished(process: subprocess.Popen[bytes] | Forked) -> tuple[int | None, str]:
    """Return exit code and all that a process said."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, (output + errors).decode()


def tensors(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of a run."""
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}
