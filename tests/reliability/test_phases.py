"""A1, A4 to A7: a process that ends in any phase of a round, or a site that fails in it, changes no byte of the end.

Where a process is killed for real is the matter of kills.py; here it stops in place, in every phase, for methods whose
server or sites keep more than adapters.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from faults import Faults, Stopped
from tiny_federation import SITES, tiny_run

from confrere.errors import RunError
from confrere.method import make
from confrere.record.run import Run
from confrere.tensors import digest

ROUNDS = 2
METHODS = ("fedopal", "fedavgm", pytest.param("scaffold", marks=pytest.mark.slow))
PHASES = (
    "task", "step", "trained", "before_upload", "kept", "after_upload", "aggregate", "aggregated", "judge", "commit",
    "journal", "committed",
)  # fmt: skip


Whole = tuple[str, dict[str, str], Counter[str]]


def finish(name: str, folder: Path) -> dict[str, str]:
    server, sites = tiny_run(make(name), folder, rounds=ROUNDS, disk=True)
    return {"server": digest(server), **{n: digest(s.store.before(ROUNDS + 1) or {}) for n, s in sites.items()}}


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a method, what it ends in when nothing happens, and how often it reaches each phase."""
    with Faults() as faults:
        found = finish(request.param, tmp_path_factory.mktemp("whole"))
    return request.param, found, faults.counts


@pytest.mark.parametrize("phase", PHASES)
def test_a_process_may_end_in_every_phase(tmp_path: Path, whole: Whole, phase: str) -> None:
    """In its last turn in the run, so that as much as possible was done before it."""
    name, expected, counts = whole
    with Faults(f"stop:{phase}:{counts[phase] - 1}"), pytest.raises(Stopped):
        finish(name, tmp_path / "cut")
    with Faults() as again:
        assert finish(name, tmp_path / "cut") == expected
    # What a site had kept is not trained again; at most the one in hand is.
    trained = len(list((tmp_path / "cut" / "sites").glob("*/*.safetensors")))
    assert trained == ROUNDS * len(SITES)
    assert again.counts["trained"] <= ROUNDS * len(SITES)
    if phase in ("aggregate", "aggregated", "judge", "commit"):
        assert again.counts["trained"] <= len(SITES)


@pytest.mark.parametrize(("phase", "redone"), [("trained", 1), ("before_upload", 1), ("kept", 0), ("after_upload", 0)])
def test_at_most_one_training_is_lost(tmp_path: Path, phase: str, redone: int) -> None:
    """A4, A5, A6: before its state and reply are on disk a training is lost, after it is counted exactly once."""
    with Faults(f"stop:{phase}:2") as cut, pytest.raises(Stopped):
        finish("fedopal", tmp_path)
    with Faults() as rest:
        finish("fedopal", tmp_path)
    assert cut.counts["trained"] == 2
    assert cut.counts["trained"] + rest.counts["trained"] == ROUNDS * len(SITES) + redone


def test_state_and_reply_carry_the_same_round(tmp_path: Path) -> None:
    """A6: there is no moment at which one is newer than the other, as they are one file."""
    with Faults("stop:kept:5"), pytest.raises(Stopped):
        finish("fedopal", tmp_path)
    for site in SITES:
        store = Run(tmp_path).store(site)
        for round_ in (1, 2):
            assert (store.reply(round_) is not None) == (store.folder / f"{round_:05d}.safetensors").exists()


@pytest.mark.parametrize("name", ["fedopal", "fedit"])
def test_a_site_that_fails_before_upload_is_absent_and_comes_back(tmp_path: Path, name: str) -> None:
    """A4: absent in this round, asked again in the next, and its own state is that of its last whole round."""
    with Faults("raise:before_upload:5"):  # the second site of the second round
        tiny_run(make(name), tmp_path, rounds=3, disk=True)
    events = Run(tmp_path).events()
    rounds = {e["round"]: sorted(e["sites"]) for e in events if e["event"] == "round"}
    assert rounds == {1: list(SITES), 2: ["a", "c"], 3: list(SITES)}
    assert [(e["round"], e["site"]) for e in events if e["event"] == "failure"] == [(2, "b")]
    assert Run(tmp_path).store("b").reply(2) is None


def test_a_site_that_dies_of_something_else_stops_the_run_which_can_go_on(tmp_path: Path) -> None:
    """In one process a bug or a lack of memory at a site is not hidden as an absence."""
    with Faults("crash:before_upload:5"), pytest.raises(RuntimeError, match="injected"):
        finish("fedopal", tmp_path / "cut")
    assert Run(tmp_path / "cut").last_round() == 1
    assert finish("fedopal", tmp_path / "cut") == finish("fedopal", tmp_path / "whole")


@pytest.mark.parametrize("name", ["fedopal", "fedavgm", "local"])
def test_when_all_sites_fail_the_run_stops_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    """A9, from the first round and from the second."""
    for first in (1, len(SITES) + 1):
        folder = tmp_path / str(first)
        with (
            Faults(f"raise:before_upload:{first}+"),
            pytest.raises(RunError, match=r"0 of 3 sites answered: a: [\s\S]*b: [\s\S]*c: ") as error,
        ):
            finish(name, folder)
        last = 0 if first == 1 else 1
        assert error.value.where == f"round {last + 1}"
        assert Run(folder).last_round() == last
        assert sorted(f.stem for f in (folder / "server").iterdir()) == [f"{r:05d}" for r in range(last + 1)]
        for tensors in Run(folder).server(last).values():
            assert all(torch.isfinite(t).all() for t in tensors.values())
        assert finish(name, folder) == finish(name, tmp_path / f"whole-{first}")
        assert all(math.isfinite(e["criterion"]) for e in Run(folder).events() if e["event"] == "evaluation")
