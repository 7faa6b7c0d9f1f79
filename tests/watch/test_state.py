"""What a watcher makes of a run directory that grows, is damaged, or is half written."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import watch_runs as runs
from tiny_federation import tiny_run

from confrere.errors import RunError
from confrere.method import make
from confrere.record import journal
from confrere.record.run import Run
from confrere.watch.follow import Follower
from confrere.watch.log import Log
from confrere.watch.reader import Watcher


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.begin(tmp_path / "run")


def test_a_run_in_one_process_is_told_by_its_journals(run: Path) -> None:
    runs.begin(run, rounds=2, controls=("fedopal", "local"))
    watcher, phases = Watcher(run), []
    phases.append(watcher.state().phase)
    Run(run).append(runs.asked(1))
    state = watcher.state()
    phases.append(state.phase)
    assert [site.waiting for site in state.sites] == [True] * 3
    assert {site.online for site in state.sites} == {None}
    Run(run).append(runs.judged(1), runs.done(1))
    runs.one_round(run, 2)
    phases.append(watcher.state().phase)
    Run(run).append({"event": "end", "round": 2, "files": {}})
    phases.append(watcher.state().phase)
    runs.one_round(run / "controls" / "local", 1)
    state = watcher.state()
    assert [(c.name, c.round, c.done) for c in state.controls] == [("local", 1, False)]
    Run(run / "controls" / "local").append({"event": "end", "round": 1, "files": {}})
    phases.append(watcher.state().phase)
    assert phases == ["waiting", "train", "examine", "controls", "done"]


def test_numbers_are_those_of_the_journal(run: Path) -> None:
    runs.one_round(run, 1)
    runs.one_round(run, 2, ("north", "south"), runs.failed(2, "west"), runs.failed(2, None, "quorum"))
    state = Watcher(run).state()
    assert (state.method, state.round, state.rounds, state.seconds) == ("fedopal", 2, 20, (2.0, 2.0))
    north, _, west = state.sites
    assert (north.loss, north.sent_bytes, north.received_bytes) == (0.5, 2000, 4000)
    assert north.score == runs.judged(2)["sites"]["north"]
    assert (west.loss, west.sent_bytes, west.refusals) == (1.0, 1000, {"update-values": 1})
    assert [(f.site, f.code) for f in state.failures] == [("west", "update-values"), ("", "quorum")]
    assert state.bytes == 5 * 3000
    assert state.eta == 18 * 2.0
    assert [score.round for score in state.scores] == [1, 2]
    json.dumps(state.as_json(time.time()), allow_nan=False)


def test_the_journal_of_a_real_run_is_understood(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    tiny_run(make("fedit"), tmp_path / "run", rounds=2)
    for event in journal.read(tmp_path / "run" / "events.jsonl")[0]:
        log(event)
    log.close()
    state = Watcher(tmp_path / "run").state()
    assert (state.round, state.phase, len(state.scores), len(state.seconds)) == (2, "train", 2, 2)
    assert [site.name for site in state.sites] == ["a", "b", "c"]
    assert all(site.loss and site.score is not None and site.sent_bytes > 1000 for site in state.sites)
    told = Counter(json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert told == {"update": 6, "score": 6, "round": 2}


def test_the_coordinators_status_says_who_is_there(run: Path) -> None:
    now = time.time()
    sites = {
        "north": {"online": True, "seen": now, "waiting": True, "refused": ""},
        "south": {"online": False, "seen": None, "waiting": False, "refused": "kit-expired"},
    }
    runs.one_round(run, 1)
    runs.status(run, updated=now, sites=sites)
    state = Watcher(run).state()
    assert state.name == "dermatology"
    assert [(s.name, s.online, s.waiting, s.refused) for s in state.sites] == [
        ("north", True, True, ""), ("south", False, False, "kit-expired"), ("west", None, False, ""),
    ]  # fmt: skip
    assert "1 of 2 sites online" in state.verdict(now)
    runs.status(run, "failed", updated=now, error="0 of 3 sites answered")
    assert Watcher(run).state().error == "0 of 3 sites answered"


def test_the_coordinators_training_of_a_control_is_told_apart(run: Path) -> None:
    runs.begin(run, rounds=1, controls=("local",))
    runs.one_round(run, 1)
    Run(run).append({"event": "end", "round": 1, "files": {}})
    runs.status(run, "train", updated=time.time(), method="local", round=0)
    state = Watcher(run).state()
    assert (state.phase, state.method, state.round) == ("controls", "fedopal", 1)
    Run(run / "controls" / "local").append({"event": "end", "round": 1, "files": {}})
    for phase in ("examine", "done", "failed"):
        runs.status(run, phase, updated=time.time(), method="verdicts")
        assert Watcher(run).state().phase == phase


def test_a_run_without_sign_of_life_is_stalled_unless_it_ended(run: Path) -> None:
    later = time.time() + 1000
    watcher = Watcher(run)
    assert watcher.state().stalled(later)
    assert not watcher.state().stalled(later, 2000)
    runs.status(run, updated=later - 1)
    assert not watcher.state().stalled(later)
    runs.status(run, "done", updated=1.0)
    assert not watcher.state().stalled(later)


def test_a_half_written_line_counts_when_it_is_whole(run: Path) -> None:
    watcher, file = Watcher(run), run / "events.jsonl"
    runs.one_round(run, 1)
    before = file.read_bytes()
    runs.one_round(run, 2)
    whole = file.read_bytes()
    for cut in (len(before) + 1, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert watcher.state().round == 1
        assert Watcher(run).state().round == 1
    file.write_bytes(whole)
    assert watcher.state().round == 2


def test_rounds_that_were_undone_do_not_count(run: Path) -> None:
    watcher = Watcher(run)
    for round_ in (1, 2, 3):
        runs.one_round(run, round_, runs.SITES, runs.failed(round_, None, "quorum"))
        watcher.state()
    Run(run).append({"event": "fallback", "to": 1, "from": 3, "damaged": []})
    state = watcher.state()
    assert (state.round, len(state.failures), len(state.scores), len(state.seconds)) == (1, 1, 1, 1)
    runs.one_round(run, 2)
    assert watcher.state() == Watcher(run).state()


def test_following_reads_what_reading_anew_would_and_only_what_is_new(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Follower(run / "events.jsonl")
    assert followed.events() == []
    for round_ in range(1, 4):
        runs.one_round(run, round_)
        assert followed.events() == Follower(run / "events.jsonl").events()
    read = []
    original = Follower._new
    monkeypatch.setattr(Follower, "_new", lambda self: read.append(original(self)) or read[-1])
    events = followed.events()
    assert followed.events() is events
    assert read == []
    runs.one_round(run, 4)
    followed.events()
    assert [part.count(b"\n") for part in read] == [3]


def test_another_journal_in_its_place_is_read_from_the_start(run: Path, tmp_path: Path) -> None:
    followed, file = Follower(run / "events.jsonl"), run / "events.jsonl"
    runs.one_round(run, 1)
    runs.one_round(run, 2)
    followed.events()
    runs.one_round(tmp_path / "other", 7, ("elsewhere",))
    file.write_bytes((tmp_path / "other" / "events.jsonl").read_bytes())
    assert [e["round"] for e in followed.events()] == [7, 7, 7]
    file.unlink()
    assert followed.events() == []


@pytest.mark.parametrize(
    "spoil", [b"rubbish\n", b"[]\n", b'{"event": "end", "seq": 4, "hash": "' + b"0" * 64 + b'"}\n']
)
def test_a_damaged_line_is_told_with_its_number(run: Path, spoil: bytes) -> None:
    runs.one_round(run, 1)
    watcher = Watcher(run)
    with (run / "events.jsonl").open("ab") as file:
        file.write(spoil)
    with pytest.raises(RunError, match="line 4") as told:
        watcher.state()
    assert told.value.code == "journal"


def test_a_changed_line_before_what_is_new_is_told(run: Path) -> None:
    runs.one_round(run, 1)
    watcher, file = Watcher(run), run / "events.jsonl"
    lines, _ = journal.seal([runs.done(2)], 4, "f" * 64)
    file.write_bytes(file.read_bytes() + lines)
    with pytest.raises(RunError, match="was changed"):
        watcher.state()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("status.json", b"{", "run-file"),
        ("status.json", b'{"format": 2, "phase": "train"}', "run-file"),
        ("status.json", b'{"format": 1, "phase": "dance"}', "run-file"),
        ("experiment.toml", b"rounds =", "run-file"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: bytes, code: str) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=name.replace(".", "\\.")) as told:
        Watcher(run)
    assert told.value.code == code


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError) as told:
        Watcher(tmp_path)
    assert told.value.code == "no-run"


def test_a_journal_that_may_not_be_read_is_told(run: Path) -> None:
    (run / "events.jsonl").mkdir()
    with pytest.raises(RunError) as told:
        Watcher(run)
    assert told.value.code == "journal"


def test_a_page_gets_a_thinned_curve_with_its_newest_point(run: Path) -> None:
    Run(run).append(*(runs.judged(round_) for round_ in range(1, 1002)))
    told = Watcher(run).state().as_json(0.0)
    assert len(told["scores"]) <= 400
    assert told["scores"][-1]["round"] == 1001


def test_words_of_a_site_are_short_and_printable(run: Path) -> None:
    runs.one_round(run, 1, runs.SITES, runs.failed(1, "west", "x\x1b[31m", "long\n" * 1000))
    (found,) = Watcher(run).state().failures
    assert found.code == "x\ufffd[31m"
    assert len(found.reason) == 400
    assert found.reason.isprintable()
