"""A generated federation and the command line under the injector, for tests that need real processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def start(place: Path, run: Path, fault: str, verb: str, *options: str) -> subprocess.Popen[str]:
    """Start ``confrere VERB`` with a fault."""
    words = ["resume", str(run)] if verb == "resume" else ["run", str(place / "hospitals"), "--out", str(run), *OPTIONS]
    line = [sys.executable, str(FAULTS), "--under", str(run), fault, "--", *words, *options]
    return subprocess.Popen(
        line,
        env={**os.environ, "CONFRERE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell would have it ignored
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return exit code and all that a process said."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, output + errors


def tensors(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of a run."""
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}
