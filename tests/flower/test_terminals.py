"""What the terminals of a coordinator and of a hospital say, without a network."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from members import SMALL

pytest.importorskip("flwr", reason="the extra flower is not installed")

import tomli_w
import typer
from typer.testing import CliRunner

from confrere.consortium.kit import load
from confrere.errors import NetworkError
from confrere.flower import coordinator as coordinators
from confrere.flower import lead as leads
from confrere.flower import site as connection
from confrere.flower.commands import _teller, add_to
from confrere.flower.coordinator import Coordinator, told
from confrere.flower.server import teller
from confrere.record.files import write_json
from confrere.watch.log import entries

APP = typer.Typer()
add_to(APP)
METHOD = {"event": "method", "name": "fedopal", "rounds": 2}
JUDGED = {"event": "evaluation", "round": 1, "sites": {"north": 0.75, "south": None}, "mean": 0.75}
LOST = {"event": "failure", "round": 1, "site": "south", "code": "no-answer", "reason": "no \x1b[31manswer"}
DATA = {"event": "data", "sheet": {"sites": {}, "warnings": []}}
GONE = NetworkError("nothing listens on this port", where="here:1", code="net-refused")


def test_events_of_the_run_reach_the_coordinator_a_line_each(tmp_path: Path) -> None:
    file, seen = tmp_path / "events.jsonl", list[Any]()
    file.write_bytes(b"")
    tell = teller(file, None)
    for event in (DATA, METHOD, LOST):
        tell(event)
    at = told(file, 0, seen.append)
    with file.open("ab") as half:
        half.write(json.dumps(JUDGED).encode())
    assert told(file, at, seen.append) == at
    with file.open("ab") as rest:
        rest.write(b"\n{torn\n")
    assert told(file, at, seen.append) == file.stat().st_size
    assert seen == [METHOD, {**LOST, "reason": "no \ufffd[31manswer"}, JUDGED]
    teller(tmp_path / "no" / "folder", None)(METHOD)  # a disk that takes nothing is not the run's end


def test_the_coordinator_shows_what_happens_until_the_run_is_done(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, out = list[Any](), tmp_path / "out"
    held = Coordinator(kit=load(kits / "coordinator", "coordinator"), show=seen.append)
    held.home, held._link = tmp_path, SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (METHOD, JUDGED)))
    write_json(out / "status.json", {"run": "token", "phase": "done", "process": 0})
    monkeypatch.setattr(coordinators, "POLL", 0.0)
    assert held._follow(out, "token", lambda: seen.append("begun")) == {}
    assert seen == ["begun", METHOD, JUDGED]


@pytest.mark.parametrize("quiet", [False, True])
def test_confrere_coordinator_prints_a_line_a_round(
    quiet: bool, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        def __init__(self, show: Callable[[Any], None], **how: Any) -> None:
            self.show = show

        def __enter__(self) -> Made:
            return self

        def __exit__(self, *error: object) -> None: ...

        def conduct(self, experiment: Any, out: Path, begun: Callable[[], None], **how: Any) -> dict[str, Any]:
            begun()
            write_json(out / "status.json", {"sites": {}})
            for event in (METHOD, JUDGED):
                self.show(event)
            return {"headline": "Joining paid."}

    monkeypatch.setattr(leads, "Coordinator", Made)
    monkeypatch.setattr(leads, "write_report", lambda out: out / "report.html")
    config, out = tmp_path / "experiment.toml", tmp_path / "out"
    config.write_text(tomli_w.dumps({"path": "set by the kit", **SMALL}))
    words = ["coordinator", str(kits / "coordinator"), "--out", str(out), "--config", str(config)]
    found = CliRunner().invoke(APP, words + ["--quiet"] * quiet, env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    for said in (
        "fedopal    round   1/2",
        "validation mean 0.750  north 0.75",
        f"confrere status {out}",
        "Joining paid.",
    ):
        assert (said in found.output) == (not quiet), found.output


def test_a_site_says_once_that_the_coordinator_has_ended(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away twice, a run, its end, away thrice, a run whose end is a fault of the SuperNode."""
    probes = iter([GONE, GONE, None, GONE, GONE, GONE, GONE, None, None, KeyboardInterrupt()])
    seen = list[dict[str, Any]]()

    def probe(*where: Any) -> None:
        if (found := next(probes)) is not None:
            raise found

    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "supernode.log").write_bytes(b"")
    ended = SimpleNamespace(wait=lambda: 1)
    for name, made in (("probe", probe), ("start", lambda *a: ended), ("stop", lambda p: None)):
        monkeypatch.setattr(connection, name, made)
    monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=lambda s: None, monotonic=itertools.count().__next__))
    with pytest.raises(KeyboardInterrupt):
        connection._keep_connected(load(kits / "sites" / "north", "site"), tmp_path, tmp_path / "s", 1e9, seen.append)
    assert [(event["event"], event.get("code"), event.get("reason")) for event in seen] == [
        ("waiting", None, "nothing listens on this port [here:1]; waiting for the coordinator"),
        ("connecting", None, None),
        ("waiting", None, "the coordinator has ended; waiting for the next run"),
        ("connecting", None, None),
        ("disconnected", "flower-ended", seen[-1]["reason"]),
    ]


@pytest.mark.parametrize(("control", "named"), [(False, "method fedopal"), (True, "control local")])
def test_a_site_names_the_training_that_is_asked_for(
    control: bool, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"event": "request", "kind": "train", "site": "north", "round": 1}
    event |= {"method": named.split()[1], "control": control}
    _teller(None, quiet=False)(event)
    assert capsys.readouterr().out == f"request       train  north  {named}  round 1\n"
    assert [entry.method for entry in entries(event)] == [named.split()[1]]
