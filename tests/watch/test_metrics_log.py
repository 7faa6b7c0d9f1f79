"""Metrics that Prometheus' own parser reads, and a log that cannot hold what it should not."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from pathlib import Path

import pytest
import watch_runs as runs
from prometheus_client.parser import text_string_to_metric_families

from confrere.errors import RunError
from confrere.watch.log import Entry, Log, entries
from confrere.watch.metrics import exposition
from confrere.watch.reader import Watcher
from confrere.watch.state import PHASES

sys.path.insert(0, str(Path(__file__).parents[1] / "privacy"))
from canaries import CELLS, FILES, PEOPLE, hits


def samples(content: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return values by name of the sample and its labels' values, these in the order of the labels' names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def test_metrics_are_the_numbers_of_the_state(tmp_path: Path) -> None:
    run, now = runs.begin(tmp_path), time.time()
    runs.one_round(run, 1)
    runs.one_round(run, 2, ("north", "south"), runs.failed(2, "west"), runs.failed(2, None, ""))
    offline = {"west": {"online": False, "seen": now, "waiting": True, "refused": ""}}
    runs.status(run, updated=now, sites=offline)
    found = samples(exposition(Watcher(run).state()))
    assert found["confrere_round", ()] == 2
    assert found["confrere_rounds", ()] == 20
    assert found["confrere_round_seconds_sum", ()] == 4.0
    assert found["confrere_round_seconds_count", ()] == 2
    assert found["confrere_updated_timestamp_seconds", ()] == pytest.approx(now, abs=60)
    assert {phase: found["confrere_phase", (phase,)] for phase in PHASES} == dict.fromkeys(PHASES, 0) | {"train": 1}
    assert found["confrere_site_up", ("west",)] == 0
    assert ("confrere_site_up", ("north",)) not in found, "nobody says whether it is online"
    assert found["confrere_site_waiting", ("west",)] == 1
    assert found["confrere_site_loss", ("north",)] == 0.5
    assert found["confrere_site_score", ("south",)] == runs.judged(2)["sites"]["south"]
    assert found["confrere_site_bytes_total", ("sent", "north")] == 2000
    assert found["confrere_site_bytes_total", ("received", "west")] == 2000
    assert found["confrere_failures_total", ("update-values", "west")] == 1
    assert found["confrere_failures_total", ("unknown", "")] == 1


def test_a_run_before_round_1_has_metrics(tmp_path: Path) -> None:
    found = samples(exposition(Watcher(runs.begin(tmp_path)).state()))
    assert found["confrere_phase", ("waiting",)] == 1
    assert found["confrere_round", ()] == 0


def test_the_type_refuses_all_that_is_not_on_the_list() -> None:
    Entry(event="update", site="north", code="update-values", round=3, loss=0.5, method="fedit")
    wrong = [
        {"event": "hello"}, {"event": "round", "level": "loud"}, {"event": "round", "site": "Mary Smith"},
        {"event": "round", "method": "/home/x.png"}, {"event": "failure", "code": "the file x.png is broken"},
        {"event": "refused", "address": "host of Mary Smith"}, {"event": "request", "kind": "Mary"},
        {"event": "round", "loss": float("nan")}, {"event": "round", "round": "3"}, {"event": "round", "score": True},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(ValueError, match="listed words"):
            Entry(**fields)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Entry(event="round", reason="anything")  # type: ignore[call-arg]


def test_every_event_of_the_loop_becomes_lines(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    told = [
        {"event": "data", "sheet": {}, "classes": []}, {"event": "prefix", "site": "north", "done": 1, "total": 2},
        {"event": "method", "name": "fedopal", "rounds": 2}, runs.failed(1, "west"), runs.failed(1, None, "quorum"),
        runs.judged(1, ("north",)), runs.done(1, ("north",)), {"event": "fallback", "to": 0, "from": 1, "damaged": []},
        {"event": "stop", "round": 2, "reason": "no better score"}, {"event": "examine", "round": 1},
        {"event": "request", "kind": "train", "round": 3, "site": "north"},
        {"event": "refused", "code": "not-fleet", "address": "192.0.2.7"},
        {"event": "refused", "code": "", "address": "<script>"}, {"event": "refused", "code": 7, "address": 7},
        {"event": "request", "kind": ["x"], "round": "3", "site": {"x": 1}},
        {"event": "disconnected", "code": "tls-ca", "reason": "?"},
    ]  # fmt: skip
    for event in told:
        log(event)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("ts")) for line in lines)
    bytes_ = {"sent_bytes": 1000, "received_bytes": 2000}
    assert lines == [
        {"level": "info", "event": "method", "method": "fedopal"},
        {"level": "warning", "event": "failure", "site": "west", "code": "update-values", "round": 1},
        {"level": "warning", "event": "failure", "code": "quorum", "round": 1},
        {"level": "info", "event": "score", "site": "north", "round": 1, "score": runs.judged(1)["sites"]["north"]},
        {"level": "info", "event": "update", "site": "north", "round": 1, "seconds": 1.5, **bytes_, "loss": 1.0},
        {"level": "info", "event": "round", "round": 1, "seconds": 2.0},
        {"level": "warning", "event": "fallback", "round": 0},
        {"level": "info", "event": "stop", "round": 2},
        {"level": "info", "event": "examine", "round": 1},
        {"level": "info", "event": "request", "site": "north", "kind": "train", "round": 3},
        {"level": "warning", "event": "refused", "code": "not-fleet", "address": "192.0.2.7"},
        {"level": "warning", "event": "refused"},
        {"level": "warning", "event": "refused", "code": "unknown"},
        {"level": "info", "event": "request", "site": "unnamed", "kind": "unknown"},
        {"level": "warning", "event": "disconnected", "code": "tls-ca"},
    ]


def test_no_canary_reaches_the_log_or_the_metrics(tmp_path: Path) -> None:
    run, log = runs.begin(tmp_path / "run"), Log(tmp_path / "log.jsonl")
    for number, canary in enumerate(PEOPLE, 1):
        log(runs.failed(number, canary, canary, f"{canary} in {FILES[0]}") | {"address": canary, "kind": canary})
        log({"event": "method", "name": canary, "rounds": 1, CELLS[0]: canary})
        log(runs.judged(number) | {"sites": {canary: 0.5}, canary: 1})
        log(runs.done(number) | {"sites": {canary: {"loss": 1.0, "reply": canary}}})
        runs.one_round(run, number, runs.SITES, runs.failed(number, "west", reason=canary))
    log.close()
    content = (tmp_path / "log.jsonl").read_bytes()
    assert content.count(b"\n") == 5 * len(PEOPLE)
    assert hits(content, PEOPLE) == []
    assert hits(exposition(Watcher(run).state()), PEOPLE) == []


def test_the_file_is_its_owners_and_its_size_is_bounded(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        log = Log(tmp_path / "log.jsonl", most_bytes=2000, keep=2)
        for round_ in range(100):
            log(runs.done(round_ + 1))
        log.close()
    finally:
        os.umask(mask)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log.jsonl", "log.jsonl.1", "log.jsonl.2"]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_size <= 2000
        assert all(json.loads(line)["ts"] for line in file.read_text().splitlines())


def test_without_a_file_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Log().write(Entry(event="connecting", site="north"))
    assert json.loads(capsys.readouterr().err)["event"] == "connecting"


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as told:
        Log(tmp_path / "file" / "log.jsonl")
    assert told.value.code == "cannot-write"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_ends_the_log_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(Path("/dev/full"))
    log({"event": "stop", "round": 3})
    log.close()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("log-lost", "error"), ("stop", "info")]


def test_events_that_are_not_for_the_log_give_no_line() -> None:
    assert list(entries({"event": "verdicts", "files": {"x": "y"}})) == []
