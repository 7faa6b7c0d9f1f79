"""``confrere status`` and ``confrere watch`` as they are typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer
import watch_runs as runs
from typer.testing import CliRunner, Result

from confrere.errors import ConfrereError, MissingExtraError
from confrere.record.run import Run
from confrere.watch.commands import add_to
from confrere.watch.serve import VARIABLE, Served

APP = typer.Typer()
add_to(APP)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(a) for a in arguments], env={"COLUMNS": "160"})


def test_a_run_that_goes_on_has_a_table_a_verdict_and_status_0(tmp_path: Path) -> None:
    run, now = runs.begin(tmp_path), time.time()
    runs.one_round(run, 1, ("north", "south"), runs.failed(1, "west"))
    sites = {
        "north": {"online": True, "seen": now, "waiting": False, "refused": ""},
        "south": {"online": True, "seen": now, "waiting": True, "refused": ""},
        "west": {"online": False, "seen": now - 100, "waiting": False, "refused": ""},
    }
    runs.status(run, updated=now, sites=sites)
    found = call("status", run)
    assert found.exit_code == 0, found.output
    for words in (
        r"north +online +58\.0 +1\.000 +1\.00 kB +2\.00 kB", r"south +waited for",
        r"west +offline, seen 1 min 4\d s ago .*update-values \(1\)",
        r"fedopal: training, 1 of 20 rounds; about 38\.0 s of training left; 2 of 3 sites online; 1 failed answer",
    ):  # fmt: skip
        assert re.search(words, found.output), found.output
    told = json.loads(call("status", run, "--json").output)
    assert (told["round"], told["stalled"], len(told["sites"])) == (1, False, 3)


def test_refused_and_unseen_sites_are_told(tmp_path: Path) -> None:
    never = {"online": False, "seen": None, "waiting": False, "refused": ""}
    sites = {"north": never, "south": never | {"refused": "kit-expired"}}
    runs.status(runs.begin(tmp_path), "waiting", updated=time.time(), sites=sites)
    found = call("status", tmp_path)
    assert "offline, never seen" in found.output
    assert "refused: kit-expired" in found.output


def test_a_site_that_may_come_later_is_expected_and_does_not_count(tmp_path: Path) -> None:
    never = {"online": False, "seen": None, "waiting": False, "refused": "", "expected": True}
    here = never | {"online": True, "expected": False}
    sites = {"north": here, "south": here, "east": never, "west": never | {"refused": "version"}}
    runs.status(runs.begin(tmp_path), "waiting", updated=time.time(), sites=sites)
    found = call("status", tmp_path)
    assert re.search(r"east +expected", found.output), found.output
    assert "refused: version" in found.output
    assert "2 of 2 sites online" in found.output


@pytest.mark.parametrize(
    ("phase", "age", "code", "said"),
    [
        ("done", 10_000, None, "done"),
        ("failed", 0, "run-failed", "FAILED"),
        ("train", 10_000, "run-stalled", "STALLED"),
        ("train", 100, None, "training"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_status_says_whether_someone_must_look(
    tmp_path: Path, phase: str, age: float, code: str | None, said: str, form: list[str]
) -> None:
    run = runs.begin(tmp_path)
    runs.one_round(run, 1)
    then = time.time() - age
    for file in run.iterdir():
        os.utime(file, (then, then))
    runs.status(run, phase, updated=then, error="0 of 3 sites answered" if phase == "failed" else "")
    found = call("status", run, *form)
    if form:
        assert json.loads(found.stdout)["phase"] == phase
    else:
        assert said in found.stdout
    assert (found.exit_code == 0) == (code is None)
    if code:
        assert isinstance(found.exception, ConfrereError)
        assert found.exception.code == code
        assert found.exception.exit_code == 5


@pytest.mark.parametrize(("across", "again"), [(False, "resume"), (True, "coordinator KIT --out")])
def test_a_run_that_no_process_holds_has_stopped_and_says_how_to_go_on(
    tmp_path: Path, across: bool, again: str
) -> None:
    run = runs.begin(tmp_path, rounds=1, controls=("local",))
    runs.one_round(run, 1)
    if across:
        (run / "job.json").write_text("{}")
        runs.status(run, updated=time.time())
    with Run(run).lock():
        Run(run).append({"event": "end", "round": 1, "files": {}})
        runs.one_round(run / "controls" / "local", 1)
        found = call("status", run)
        assert "training controls" in found.output
        assert "stopped" not in found.output
    found = call("status", run)
    assert f"fedopal: stopped, 1 of 1 rounds; continue with: confrere {again} {run}" in found.output
    assert "online" not in found.output
    assert isinstance(found.exception, ConfrereError)
    assert (found.exception.code, found.exception.exit_code) == ("run-stalled", 5)
    Run(run / "controls" / "local").append({"event": "end", "round": 1, "files": {}})
    if across:
        runs.status(run, "done", updated=time.time())
    found = call("status", run)
    assert (found.exit_code, "online" in found.output) == (0, False)


def test_how_long_a_silence_is_a_stall_can_be_said(tmp_path: Path) -> None:
    runs.status(runs.begin(tmp_path), updated=time.time() + 1)
    os.utime(tmp_path / "experiment.toml", (1, 1))
    runs.status(tmp_path, updated=time.time() - 100)
    assert call("status", tmp_path).exit_code == 0
    assert call("status", tmp_path, "--stalled-after", 50).exit_code == 1


def test_watch_serves_until_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def asked(served: Served) -> None:
        with httpx.Client(follow_redirects=True, verify=False) as client:
            seen.append((client.get(served.address).text, served))
        raise KeyboardInterrupt

    monkeypatch.setattr(Served, "wait", asked)
    found = call("watch", runs.begin(tmp_path), "--port", 0)
    ((page, served),) = seen
    assert "<title>Confrere</title>" in page
    assert found.exit_code == 0
    assert served.address in found.output
    assert not served.thread.is_alive()
    monkeypatch.setenv(VARIABLE, "0123456789" * 4)
    found = call("watch", tmp_path, "--port", 0)
    assert "0123456789" not in found.output
    assert VARIABLE in found.output


@pytest.mark.slow
def test_watch_prints_the_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = runs.begin(tmp_path)
    code = "import typer\nfrom confrere.watch.commands import add_to\napp = typer.Typer()\nadd_to(app)\napp()"
    command = [sys.executable, "-c", code, "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().split(": ", 1)[1].strip()
        with httpx.Client(follow_redirects=True) as client:
            assert "<title>Confrere</title>" in client.get(address).text
        process.send_signal(signal.SIGINT)
        assert "the run goes on" in process.stdout.read()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert err == ""


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "confrere.watch.serve", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = call("watch", runs.begin(tmp_path))
    assert isinstance(found.exception, MissingExtraError)
    assert "uvicorn" in str(found.exception)
