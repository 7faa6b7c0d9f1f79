"""Trainings of `compare --jobs N` end with the process that started them, however that ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import pytest

from confrere.compare.child import end_with
from confrere.compare.processes import told
from confrere.data.synthetic import make_microscopy


def test_a_parent_that_is_gone_is_noticed() -> None:
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        end_with(os.getppid(), every=0.01)
        time.sleep(0.1)
        assert not caught, "it is there"
        end_with(0, every=0.01)  # no process has this one as its parent's
        limit = time.monotonic() + 5
        while not caught and time.monotonic() < limit:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM]


def test_what_a_training_said_last_is_one_error() -> None:
    said = "a warning\nconfrere: no site 'b' [attack.sites]\n  Fix: valid: a, c\n  Code: value\n"
    found = told(said)
    assert (found.what, found.fix, found.code) == ("no site 'b' [attack.sites]", "valid: a, c", "value")
    assert told("Killed").what == "Killed"
    assert told("").what == "a run failed"
    assert told("odd confrere: text").what == "odd confrere: text"
    assert told("confrere: 0 of 2 sites answered: a").what == "0 of 2 sites answered: a"


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.slow
def test_trainings_whose_parent_was_killed_end_and_leave_their_locks(tmp_path: Path) -> None:
    make_microscopy(tmp_path / "data", seed=3, sites=2, images=(24, 30), size=32)
    options = ["backbone.name=test-vit", "adapter.blocks=2", "rounds=2000", "train.steps=3", "threads=1"]
    env = {**os.environ, "CONFRERE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "confrere", "compare", str(tmp_path / "data"), *options, "--no-controls",
               "--methods", "fedit,fedopal", "--seeds", "0", "--jobs", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    parent = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while len(list(tmp_path.glob("out/cells/*/events.jsonl"))) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    holders = [path.read_text() for path in tmp_path.glob("out/cells/*/.lock-holder")]
    children = [int(number) for text in holders if (number := re.sub(r"\D", "", text))]
    try:
        assert len(children) == 2, holders
        assert all(alive(child) for child in children)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        limit = time.monotonic() + 20
        while any(alive(child) for child in children) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(alive(child) for child in children)
    finally:
        for process in [parent.pid, *children]:
            if alive(process):
                os.kill(process, signal.SIGKILL)
    again = [sys.executable, "-m", "confrere", "resume", str(next(tmp_path.glob("out/cells/*/events.jsonl")).parent)]
    resumed = subprocess.Popen(again, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(10)
    assert resumed.poll() is None, "its lock was free and it goes on"
    resumed.send_signal(signal.SIGINT)
    assert "is using this run" not in resumed.communicate(timeout=60)[1]
