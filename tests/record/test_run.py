"""The run directory: a journal that tears cleanly, one process at a time, every state in its own place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confrere.errors import RunError
from confrere.method import Reply
from confrere.record import files, journal
from confrere.record.files import write_state
from confrere.record.run import Run
from confrere.record.store import DirectoryStore, MemoryStore, Store
from confrere.tensors import digest

STATE = {"shared": {"w": torch.ones(2)}}
HOLD = """
import sys
from pathlib import Path
from confrere.record.files import write_state
from confrere.record import journal
from confrere.record.run import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def event(round_: int) -> dict[str, object]:
    return {"event": "round", "round": round_, "sites": {"köln": {"loss": 0.5 / round_}}}


def test_another_process_is_refused_named_and_then_gone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {other.pid} is using this run") as error, Run(tmp_path).lock():
            pass
        assert error.value.where == str(tmp_path)
        other.kill()  # a killed holder leaves its files behind, but not the lock
    with (
        Run(tmp_path).lock(),
        pytest.raises(RunError, match=f"process {os.getpid()} "),
        Run(tmp_path).lock(),
    ):
        pass


def test_a_lock_that_is_refused_sweeps_nothing(tmp_path: Path) -> None:
    with Run(tmp_path).lock():
        (tmp_path / ".tmp-writing").write_bytes(b"half")
        with pytest.raises(RunError), Run(tmp_path).lock():
            pass
        assert (tmp_path / ".tmp-writing").exists()


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), Run(tmp_path).lock():
        raise ValueError("mine")
    with Run(tmp_path).lock():
        pass


@given(cut=st.integers(0, 400))
def test_a_journal_cut_anywhere_holds_the_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    run = Run(tmp_path_factory.mktemp("cut"))
    written = [event(r) for r in range(1, 5)]
    run.append(*written)
    content = run.events_file.read_bytes()[:cut]
    run.events_file.write_bytes(content)
    whole = content.count(b"\n")
    assert run.events() == written[:whole]
    assert run.last_round() == whole
    run.append(event(whole + 1))
    assert run.events() == [*written[:whole], event(whole + 1)]


@pytest.mark.parametrize("rubbish", [b"rubbish", b'{"event": "rou', b"\xff\xfe", b"\x00\x00", b""])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_damaged_line_is_named_not_skipped(tmp_path: Path, rubbish: bytes, line: int) -> None:
    run = Run(tmp_path)
    lines = journal.seal([event(r) for r in (1, 2, 3)], 1, journal.START)[0].splitlines()
    lines[line - 1] = rubbish
    run.events_file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RunError, match="damaged") as error:
        run.last_round()
    assert error.value.where == f"{run.events_file}, line {line}"


def test_a_new_run_has_no_events(tmp_path: Path) -> None:
    run = Run(tmp_path / "new")
    assert run.events() == []
    assert run.last_round() == 0


def test_events_of_one_round_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.commit(1, STATE, event(1))
    before = run.events_file.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        with pytest.raises(RunError, match=r"events\.jsonl"):
            run.append({"event": "stop", "round": 2, "reason": "x"}, event(2))
    assert run.events_file.read_bytes() == before
    assert run.last_round() == 1
    assert digest(run.server(1)) == digest(STATE)


def test_a_servers_state_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.commit(1, STATE)
    shutil.copy(run.server_file(1), run.server_file(2))
    with pytest.raises(RunError, match="state of round 1") as error:
        run.server(2)
    assert error.value.where == str(run.server_file(2))


def test_a_server_without_tensors_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.commit(0, {"shared": {}})
    assert run.server(0) == {"shared": {}}


def filled(store: Store, rounds: tuple[int, ...]) -> Store:
    for round_ in rounds:
        reply = Reply(site="a", round=round_, state={"shared": {"w": torch.full((2,), -float(round_))}}, weight=3.0)
        store.write(round_, {"private": {"v": torch.full((1,), float(round_))}}, reply)
    return store


@given(rounds=st.sets(st.integers(1, 12), max_size=5), asked=st.integers(0, 13))
def test_both_stores_read_strictly_before_and_reply_exactly(
    tmp_path_factory: pytest.TempPathFactory, rounds: set[int], asked: int
) -> None:
    order = tuple(rounds)
    folder = tmp_path_factory.mktemp("store")
    for store in (filled(MemoryStore(), order), filled(DirectoryStore(folder, "a"), order)):
        earlier = [r for r in rounds if r < asked]
        found = store.before(asked)
        assert (found is None) == (not earlier)
        if found is not None:
            assert float(found["private"]["v"]) == max(earlier)
        reply = store.reply(asked)
        assert (reply is not None) == (asked in rounds)
        if reply is not None:
            assert (reply.site, reply.round, reply.weight) == ("a", asked, 3.0)
            assert torch.equal(reply.state["shared"]["w"], torch.full((2,), -float(asked)))


def test_a_reply_that_sent_nothing_is_still_a_reply(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, "a")
    store.write(1, {"private": {}}, Reply(site="a", round=1))
    found = store.reply(1)
    assert found is not None
    assert found.state == {}
    assert store.before(2) == {}


def test_a_failed_write_leaves_the_site_in_the_round_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(DirectoryStore(tmp_path, "a"), (1,))

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        with pytest.raises(RunError, match="No space left"):
            filled(store, (2,))
    assert store.reply(2) is None
    state = store.before(3)
    assert state is not None
    assert float(state["private"]["v"]) == 1.0


@pytest.mark.parametrize("read", ["before", "reply"])
def test_a_file_of_another_site_or_round_is_refused(tmp_path: Path, read: str) -> None:
    ours = filled(DirectoryStore(tmp_path / "a", "a"), (1, 2))
    foreign = DirectoryStore(tmp_path / "b", "b")
    foreign.write(1, {}, Reply(site="b", round=1))
    asked = 3 if read == "before" else 2
    shutil.copy(tmp_path / "a" / "00001.safetensors", tmp_path / "a" / "00002.safetensors")
    with pytest.raises(RunError, match="site 'a', round 1"):
        getattr(ours, read)(asked)
    shutil.copy(tmp_path / "b" / "00001.safetensors", tmp_path / "a" / "00002.safetensors")
    with pytest.raises(RunError, match="site 'b', round 1"):
        getattr(ours, read)(asked)


def test_predictions_beside_the_states_are_no_states(tmp_path: Path) -> None:
    store = filled(DirectoryStore(tmp_path, "a"), (1,))
    files.write_state(tmp_path / "test-personalised.safetensors", {"test": {}}, {"site": "a"})
    state = store.before(9)
    assert state is not None
    assert float(state["private"]["v"]) == 1.0


def test_a_round_counts_once_its_line_stands(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_state(run.server_file(1), STATE, {"round": 1})
    assert run.last_round() == 0
    run.commit(1, STATE, {"event": "round", "round": 1})
    assert run.last_round() == 1
    assert digest({k: v for k, v in run.server(1).items() if k in STATE}) == digest(STATE)
    with pytest.raises(RunError, match="missing"):
        run.server(7)


def test_a_second_user_of_a_run_is_refused(tmp_path: Path) -> None:
    with (
        Run(tmp_path).lock(),
        pytest.raises(RunError, match=f"process {os.getpid()} is using this run"),
        Run(tmp_path).lock(),
    ):
        pass
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / ".tmp-x").write_bytes(b"torn")
    with Run(tmp_path).lock():
        assert not (tmp_path / "sites" / ".tmp-x").exists()
