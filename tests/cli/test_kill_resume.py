"""Kill a run anywhere; resume leaves the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nursery import Forked, Nursery

from confrere.data.synthetic import make_microscopy

OPTIONS = [
    "--backbone", "test-vit", "adapter.blocks=2", "rounds=4", "train.steps=4", "train.batch_size=8", "threads=1",
    "controls=['local']",
]  # fmt: skip


def start(*arguments: object, cache: Path, nursery: Nursery | None = None) -> subprocess.Popen[bytes] | Forked:
    environment = {**os.environ, "CONFRERE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    words = [str(one) for one in arguments]
    if nursery:
        return nursery.start(words, environment)
    return subprocess.Popen(
        [sys.executable, "-m", "confrere", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell would have it ignored
    )


def tensors(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


def committed(run: Path) -> int:
    file = run / "events.jsonl"
    return file.read_text().count('"event": "round"') if file.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first round": lambda run: (run / "server" / "00000.safetensors").exists(),
    "within a round": lambda run: committed(run) >= 1 and len(list((run / "sites").glob("*/00002.safetensors"))) >= 2,
    "in the control": lambda run: committed(run / "controls" / "local") >= 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    make_microscopy(folder / "hospitals", seed=3, sites=2, images=(24, 30), size=32)
    done = start("run", folder / "hospitals", "--out", folder / "whole", *OPTIONS, cache=folder / "cache")
    _, errors = done.communicate(timeout=200)
    assert done.returncode == 0, errors.decode()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_then_resume_gives_the_same_bytes(place: Path, tmp_path: Path, nursery: Nursery, moment: str) -> None:
    run = tmp_path / "cut"
    process = start("run", place / "hospitals", "--out", run, *OPTIONS, cache=place / "cache", nursery=nursery)
    limit = time.monotonic() + 120
    while not MOMENTS[moment](run) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = start("resume", run, cache=place / "cache", nursery=nursery)
    _, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors.decode()
    assert tensors(run) == tensors(place / "whole")
    assert not [f for f in run.rglob("*") if f.name.startswith(".tmp-")], "temporary files are swept"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_prints_the_way_back(place: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "cut"
    process = start("run", place / "hospitals", "--out", run, *OPTIONS, "rounds=5000", cache=place / "cache")
    while not (run / "server" / "00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    second = start("resume", run, cache=place / "cache")
    _, refused = second.communicate(timeout=60)
    assert second.returncode == 5
    assert b"is using this run" in refused
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert f"confrere resume {run}" in errors.decode()
    assert b"Traceback" not in errors
