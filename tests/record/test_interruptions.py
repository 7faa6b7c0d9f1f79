"""Every write of a run fails once, or is the last thing a killed process did: the next start ends in the same bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tiny_federation import SITES, tiny_run

from confrere.errors import RunError
from confrere.method import Method, make
from confrere.methods.fedopal import FedOPAL
from confrere.record.files import read_json, write_json
from confrere.record.run import BEFORE_TRAINING, Run
from confrere.record.store import DirectoryStore
from confrere.tensors import digest

ROUNDS = 2
WRITES = 2 + ROUNDS * (len(SITES) + 2)  # the server and the journal at the start; then each round, with every site


def finish(method: Method, folder: Path) -> tuple[str, dict[str, str]]:
    server, sites = tiny_run(method, folder, rounds=ROUNDS, disk=True)
    return digest(server), {name: digest(site.store.before(ROUNDS + 1) or {}) for name, site in sites.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return finish(make("fedopal"), tmp_path_factory.mktemp("whole"))


class Nth:
    """Wraps an os call: what happens at the n-th time is not what was asked."""

    def __init__(self, call: str, n: int, after: bool) -> None:
        self.original, self.left, self.after = getattr(os, call), n, after

    def __call__(self, *arguments: object) -> object:
        self.left -= 1
        if self.left:
            return self.original(*arguments)
        if not self.after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.original(*arguments)
        raise KeyboardInterrupt  # nothing after the call happens, as when the process is killed here


@pytest.mark.parametrize("n", range(1, WRITES + 1))
@pytest.mark.parametrize("after", [False, True], ids=["refused", "killed-after"])
def test_an_interrupted_write_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[str, dict[str, str]], n: int, after: bool
) -> None:
    method = make("fedopal")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Nth("replace", n, after))
        with pytest.raises(KeyboardInterrupt if after else RunError) as stopped:
            finish(method, tmp_path)
    if not after:
        assert os.strerror(errno.ENOSPC) in str(stopped.value)
        assert str(tmp_path) in str(stopped.value)
    assert finish(method, tmp_path) == whole


def test_the_number_of_writes_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Nth("replace", 10_000, False)
    monkeypatch.setattr(os, "replace", counter)
    finish(make("fedopal"), tmp_path)
    assert 10_000 - counter.left == WRITES


@pytest.mark.parametrize("harm", ["cut", "flip", "other round", "other site"])
def test_a_harmed_site_state_stops_the_run_by_name(tmp_path: Path, harm: str) -> None:
    method = FedOPAL()
    tiny_run(method, tmp_path, rounds=1, disk=True)
    file = tmp_path / "sites" / "a" / "00001.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "cut":
        content = content[:-3]
    elif harm == "flip":
        content[-5] ^= 4
    elif harm == "other site":
        content = bytearray((tmp_path / "sites" / "b" / "00001.safetensors").read_bytes())
    else:
        file = file.with_name("00002.safetensors")
    file.write_bytes(content)
    with pytest.raises(RunError, match=file.name):
        tiny_run(method, tmp_path, rounds=2, disk=True)


def test_other_files_beside_the_states_are_not_taken_for_states(tmp_path: Path) -> None:
    for name in ("00001 (copy).safetensors", "test-general.safetensors", "1a.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert DirectoryStore(tmp_path, "a").before(9) is None


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot be written[\s\S]*file/run"), Run(tmp_path / "file" / "run").lock():
        pass


def test_an_error_inside_a_lock_passes_and_frees_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Run(tmp_path).lock():
        raise FileNotFoundError("another matter")
    with Run(tmp_path).lock():
        pass


def test_a_start_that_failed_before_training_leaves_the_place_free(tmp_path: Path) -> None:
    with Run(tmp_path / "run").lock():
        for name in BEFORE_TRAINING:
            write_json(tmp_path / "run" / name, {})
    (tmp_path / "run" / ".tmp-x").write_bytes(b"torn")
    Run(tmp_path / "run").make_new()
    assert {f.name for f in (tmp_path / "run").iterdir()} <= {".lock", ".lock-holder"}
    Run(tmp_path / "none").make_new()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["thesis.doc", "splits.csv", "backbone.json"])
def test_what_is_not_ours_or_has_trained_is_not_touched(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"kept": True})
    with pytest.raises(RunError, match="already there" if name == "backbone.json" else "not empty"):
        Run(tmp_path).make_new()
    assert read_json(tmp_path / name) == {"kept": True}


@pytest.mark.parametrize("line", ["3", '"x"', "null", "{", "[1]"])
def test_a_journal_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    Run(tmp_path).append({"event": "round", "round": 1})
    with Run(tmp_path).events_file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="line 2"):
        Run(tmp_path).events()
