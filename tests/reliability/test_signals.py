"""A2, A3, A13: interrupted at ten moments, met by a second process, or asked to resume what is no unfinished run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from injected import finished, make_place, start, tensors
from nursery import Nursery

from confrere.config import validate
from confrere.errors import RunError
from confrere.fingerprint import stored_experiment
from confrere.job import run_experiment
from confrere.record.run import Run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, str]:
    code, said = finished(start(place, place / "whole", "none", "--quiet"))
    assert code == 0, said
    return tensors(place / "whole")


MOMENTS = (
    "data:1", "step:1", "step:5", "before_upload:2", "after_upload:3", "aggregate:2", "judge:3", "journal:4",
    "examine:2", "export_file:2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_is_130_with_the_way_back(
    place: Path, whole: dict[str, str], tmp_path: Path, nursery: Nursery, moment: str
) -> None:
    signal_ = "int" if MOMENTS.index(moment) % 2 else "term"
    run = tmp_path / "run"
    code, said = finished(start(place, run, f"{signal_}:{moment}", "--quiet", nursery=nursery))
    assert code == 130, said
    assert f"confrere resume {run}" in said
    assert "Traceback" not in said
    assert not list(run.rglob(".tmp-*")), "an interrupt, unlike a kill, cleans up"
    code, said = finished(start(place, run, "none", "--quiet", nursery=nursery))
    assert code == 0, said
    assert tensors(run) == whole


@pytest.fixture(scope="module")
def reporting(place: Path) -> tuple[int, str]:
    """Return exit code and words of a run that is interrupted while it writes its report."""
    return finished(start(place, place / "reporting", "term:report_file:1"))


@pytest.mark.slow
def test_an_interrupt_of_the_report_is_130_and_the_run_is_whole(
    place: Path, whole: dict[str, str], reporting: tuple[int, str]
) -> None:
    code, said = reporting
    assert code == 130, said
    assert "Traceback" not in said
    assert tensors(place / "reporting") == whole


@pytest.mark.slow
def test_an_interrupt_of_the_report_says_the_way_back(reporting: tuple[int, str]) -> None:
    assert "confrere resume" in reporting[1]


@pytest.mark.slow
def test_a_second_process_is_refused_by_name_and_a_killed_one_is_not_in_the_way(
    place: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """A3: the first is held in its second round by the injector."""
    run = tmp_path / "run"
    first = start(place, run, "sleep=120:aggregate:2", "--quiet")
    while not (run / "server" / "00001.safetensors").exists() and first.poll() is None:
        os.sched_yield()
    before = tensors(run)
    code, said = finished(start(place, run, "none", "--quiet"))
    assert code == RunError.exit_code, said
    assert f"process {first.pid} is using this run" in said
    assert "Traceback" not in said
    assert before.items() <= tensors(run).items()
    first.kill()
    first.communicate()
    assert (run / ".lock-holder").exists(), "stale, as a kill leaves it"
    code, said = finished(start(place, run, "none", "--quiet"))
    assert code == 0, said
    assert tensors(run) == whole


def test_a_lock_whose_holder_is_dead_is_free(tmp_path: Path) -> None:
    hold = "import os, signal, sys; from pathlib import Path; from confrere.record.run import Run\n"
    hold += "with Run(Path(sys.argv[1])).lock(): os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", hold, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert re.fullmatch(r"process \d+.*", (tmp_path / ".lock-holder").read_text())
    with Run(tmp_path).lock():
        assert f"process {os.getpid()}" in (tmp_path / ".lock-holder").read_text()


def _experiment(place: Path, rounds: int) -> object:
    return validate(
        {
            "path": str(place / "hospitals"),
            "backbone": {"name": "test-vit"},
            "adapter": {"blocks": 2},
            "train": {"steps": 1, "batch_size": 4},
            "rounds": rounds,
            "threads": 1,
            "controls": [],
        }
    )


def test_resuming_a_finished_run_changes_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A13: no file is written anew, no line is added."""
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run_experiment(_experiment(place, 1), run)  # type: ignore[arg-type]
    before = {
        f: (f.stat().st_mtime_ns, f.read_bytes()) for f in run.rglob("*") if f.is_file() and ".lock" not in f.name
    }
    run_experiment(stored_experiment(run), run)
    after = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in run.rglob("*") if f.is_file() and ".lock" not in f.name}
    assert after == before


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "file"])
def test_resuming_what_is_no_run_is_refused_and_writes_nothing(tmp_path: Path, kind: str) -> None:
    """A13: also where a run could be made."""
    run = tmp_path / "run"
    if kind == "file":
        run.write_text("x")
    elif kind != "missing":
        run.mkdir()
    if kind == "foreign":
        (run / "thesis.doc").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="no run here") as error:
        stored_experiment(run)
    assert error.value.where == str(run)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_other_data_is_not_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A13: the directory is a run, but the images behind it are not those it began with."""
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "place"
    subprocess.run(["cp", "-r", str(place), str(mine)], check=True)
    run_experiment(_experiment(mine, 1), tmp_path / "run")  # type: ignore[arg-type]
    (tmp_path / "run" / "results.json").unlink()
    image = next((mine / "hospitals").rglob("*.png"))
    image.unlink()
    before = tensors(tmp_path / "run")
    with pytest.raises(Exception, match=r"changed since|not in the data|splits|split"):
        run_experiment(stored_experiment(tmp_path / "run"), tmp_path / "run")
    assert tensors(tmp_path / "run") == before
