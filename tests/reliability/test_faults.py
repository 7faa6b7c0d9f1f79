"""The injector does what it says, and nothing once it is left: otherwise no test of this folder means anything."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FILES, PHASES, Fault, Faults, Stopped
from tiny_federation import SITES, tiny_run

from confrere.errors import RunError
from confrere.method import make
from confrere.record.files import write_bytes

HERE = Path(__file__).parent


def test_calls_are_counted_under_the_folder_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with Faults(under=tmp_path / "in") as faults:
        write_bytes(tmp_path / "out" / "x", b"x")
        assert not faults.counts
        write_bytes(tmp_path / "in" / "x", b"x")
        (tmp_path / "in" / "x").read_bytes()
        (tmp_path / "in" / "x").unlink()
    assert set(faults.counts) == set(FILES)
    assert faults.counts["fsync"] == 2


@pytest.mark.parametrize("point", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
def test_an_error_strikes_once_at_its_number(tmp_path: Path, point: str, name: str) -> None:
    with Faults(f"{name}:{point}:2", under=tmp_path) as faults:
        failed = []
        for n in range(4):
            try:
                write_bytes(tmp_path / str(n), b"content")
            except RunError as error:
                failed.append((n, str(error)))
        assert faults.counts[point] >= 4
    [(n, said)] = failed
    assert n == (0 if point in ("open", "fsync") else 1)  # two of them a file
    assert os.strerror(getattr(errno, name)) in said
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".tmp-")]


def test_a_lasting_error_goes_on(tmp_path: Path) -> None:
    with Faults("ENOSPC:write:2+", under=tmp_path):
        write_bytes(tmp_path / "0", b"x")
        for n in range(3):
            with pytest.raises(RunError, match="No space"):
                write_bytes(tmp_path / str(n), b"y")
    assert (tmp_path / "0").read_bytes() == b"x"


def test_a_full_disk_takes_half_a_write(tmp_path: Path) -> None:
    with Faults("ENOSPC:write:1+", under=tmp_path), pytest.raises(OSError, match="No space"):
        (tmp_path / "x").write_bytes(b"12345678")
    assert (tmp_path / "x").read_bytes() == b"1234"


@pytest.mark.parametrize(("lie", "left"), [("cut=3", b"\x00" * 5), ("flip=9", b"\x00\x02" + b"\x00" * 6)])
def test_a_disk_that_lies(tmp_path: Path, lie: str, left: bytes) -> None:
    with Faults(f"{lie}:write:1", under=tmp_path):
        write_bytes(tmp_path / "x", b"\x00" * 8)
    assert (tmp_path / "x").read_bytes() == left


def test_text_files_are_counted_too(tmp_path: Path) -> None:
    with Faults("EIO:write:2", under=tmp_path):
        (tmp_path / "a").write_text("ä\n", encoding="utf-8")
        with pytest.raises(OSError, match="Input/output"):
            (tmp_path / "b").write_text("b")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä\n"


def test_nothing_is_left_of_it() -> None:
    before = (os.replace, os.open, os.fsync, io.open, open)
    with Faults("stop:replace:1"):
        assert os.replace is not before[0]
    assert (os.replace, os.open, os.fsync, io.open, open) == before


def test_every_phase_of_a_round_is_reached_where_it_is(tmp_path: Path) -> None:
    """A renamed function of the product would otherwise leave a phase that no kill ever meets."""
    with Faults(under=tmp_path) as faults:
        tiny_run(make("fedopal"), tmp_path, rounds=2, disk=True, steps=3)
    each_round = 2 * len(SITES)
    for point in ("task", "trained", "before_upload", "kept", "after_upload", "judge"):
        assert faults.counts[point] == each_round, point
    assert faults.counts["step"] == 3 * each_round
    assert faults.counts["aggregate"] == faults.counts["aggregated"] == 2
    assert faults.counts["commit"] == faults.counts["committed"] == 3
    assert faults.counts["journal"] >= 3


@pytest.mark.parametrize("fault", ["stop:aggregate:2", "stop-after:replace:4", "stop:step:5"])
def test_stopping_ends_everything_there(tmp_path: Path, fault: str) -> None:
    with Faults(fault, under=tmp_path) as faults, pytest.raises(Stopped):
        tiny_run(make("fedit"), tmp_path, rounds=3, disk=True)
    asked = Fault.parse(fault)
    assert faults.counts[asked.point] == asked.first


@pytest.mark.parametrize("text", ["boom:write:1", "kill:nowhere:1", "kill:write", "kill:write:x"])
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no such|unpack|int"):
        Fault.parse(text)


def test_points_have_one_name() -> None:
    points = [phase.point for phase in PHASES]
    assert len({*points, *FILES}) == len(points) + len(FILES)


@pytest.mark.slow
def test_the_launcher_runs_the_command_line_and_logs(tmp_path: Path) -> None:
    line = [sys.executable, HERE / "faults.py", "--log", tmp_path / "log", "--under", tmp_path, "none", "--", "methods"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "fedopal" in done.stdout
    points = [json.loads(entry)["point"] for entry in (tmp_path / "log").read_text().splitlines()]
    assert points == ["ready", "end"]
