"""Files are whole or absent, checked when read; the journal commits; one process a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confrere.errors import RunError
from confrere.method import Reply
from confrere.record import files
from confrere.record.files import read_json, read_state, write_bytes, write_json, write_state
from confrere.record.run import Run
from confrere.record.store import DirectoryStore, MemoryStore
from confrere.tensors import digest

STATE = {"shared": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}, "c": {"empty": torch.zeros(0, 2)}}


def test_states_survive_bit_for_bit_and_hold_no_clock(tmp_path: Path) -> None:
    write_state(tmp_path / "a.safetensors", STATE, {"round": 2})
    write_state(tmp_path / "b.safetensors", STATE, {"round": 2})
    state, meta = read_state(tmp_path / "a.safetensors")
    assert digest(state) == digest(STATE)
    assert meta == {"round": 2}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("errno", [28, 13, 5])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, errno: int
) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"old": 1})

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(RunError, match=r"cannot write .* bytes") as error:
            write_json(target, {"new": 2})
    assert str(target) in str(error.value)
    assert os.strerror(errno) in str(error.value)
    assert read_json(target) == {"old": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "s.safetensors"
    write_state(path, STATE, {"round": 1})
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        state, meta = read_state(path)
    except RunError:
        return
    assert digest(state) == digest(STATE)  # the flip was in the padding
    assert meta == {"round": 1}


@given(length=st.integers(0, 400))
def test_a_cut_file_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "s.safetensors"
    write_state(path, STATE, {})
    content = path.read_bytes()
    path.write_bytes(content[: min(length, len(content) - 1)])
    with pytest.raises(RunError, match=r"damaged|changed"):
        read_state(path)


def test_a_store_reads_strictly_before_a_round(tmp_path: Path) -> None:
    for store in (MemoryStore(), DirectoryStore(tmp_path, "a")):
        assert store.before(5) is None
        for round_ in (1, 3):
            state = {"private": {"v": torch.full((1,), float(round_))}}
            reply = Reply(
                site="a", round=round_, state={"shared": {"w": torch.ones(2)}}, weight=4.0, metrics={"loss": 1.5}
            )
            store.write(round_, state, reply)
        found = [store.before(r) for r in (1, 2, 3, 4, 99)]
        values = [None if s is None else float(s["private"]["v"]) for s in found]
        assert values == [None, 1.0, 1.0, 3.0, 3.0]
        again = store.reply(3)
        assert again is not None
        assert (again.weight, dict(again.metrics), set(again.state)) == (4.0, {"loss": 1.5}, {"shared"})
        assert store.reply(2) is None


def test_a_state_of_another_site_or_round_is_refused(tmp_path: Path) -> None:
    ours, theirs = DirectoryStore(tmp_path / "a", "a"), DirectoryStore(tmp_path / "b", "b")
    for store in (ours, theirs):
        store.write(1, {"private": {"v": torch.zeros(1)}}, Reply(site=store.site, round=1))
    write_bytes(tmp_path / "a" / "00001.safetensors", (tmp_path / "b" / "00001.safetensors").read_bytes())
    with pytest.raises(RunError, match="belongs to site 'b'"):
        ours.before(2)
    write_bytes(tmp_path / "b" / "00004.safetensors", (tmp_path / "b" / "00001.safetensors").read_bytes())
    with pytest.raises(RunError, match="round 1"):
        theirs.before(9)


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append({"event": "round", "round": 1})
    with run.events_file.open("ab") as file:
        file.write(b'{"event": "round", "rou')
    assert run.last_round() == 1
    run.append({"event": "round", "round": 2})
    assert [e["round"] for e in run.events()] == [1, 2]
    run.events_file.write_text('{"event": 1}\nrubbish\n{"event": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        run.events()


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
