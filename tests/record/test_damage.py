"""Damaged states are noticed and made anew to the same bytes; old ones are deleted only when nothing needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_sites

from confrere.federation.loop import federate
from confrere.federation.selection import best_round
from confrere.federation.transport import InProcess
from confrere.method import make
from confrere.record.run import Run

ROUNDS = 4


def go(folder: Path, *, rounds: int = ROUNDS, method: str = "fedopal", **plan: object) -> Run:
    made, run = make(method), Run(folder)
    sites = tiny_sites(made, rounds=ROUNDS, stores={name: run.store(name) for name in SITES})
    server = made.init_server(initial_params(backbone_of(made), made, ""))
    federate(made, server, InProcess(sites), tiny_plan(made, rounds=rounds, **plan), run)
    return run


def states(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[:-3]
    elif how == "flip":
        content[-5] ^= 4
    elif how == "empty":
        content = bytearray()
    elif how == "of another round":
        content = bytearray(file.with_name("00001.safetensors").read_bytes())
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return states(folder)


@pytest.mark.parametrize("how", ["cut", "flip", "empty", "of another round"])
@pytest.mark.parametrize("file", ["server/00003", "sites/a/00003", "sites/c/00003"])
def test_a_harmed_state_is_made_anew(tmp_path: Path, whole: dict[str, bytes], how: str, file: str) -> None:
    go(tmp_path, rounds=3)
    harm(tmp_path / f"{file}.safetensors", how)
    run = go(tmp_path)
    assert states(tmp_path) == whole
    fallback = next(e for e in run.events() if e["event"] == "fallback")
    assert fallback == {"event": "fallback", "to": 2, "from": 3, "damaged": [f"{file}.safetensors"]}
    assert [e["round"] for e in run.events() if e["event"] == "round"] == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["cut", "of another round", "of another site"])
def test_a_harmed_state_of_a_round_that_was_not_done_is_made_anew(
    tmp_path: Path, whole: dict[str, bytes], how: str
) -> None:
    go(tmp_path, rounds=3)
    file = tmp_path / "sites" / "a" / "00004.safetensors"
    other = tmp_path / "sites" / ("b" if how == "of another site" else "a") / "00003.safetensors"
    file.write_bytes(other.read_bytes())
    harm(file, how)
    go(tmp_path)
    assert states(tmp_path) == whole


def test_all_server_states_harmed_begins_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    go(tmp_path, rounds=3)
    for file in (tmp_path / "server").glob("*.safetensors"):
        harm(file, "cut")
    go(tmp_path)
    assert states(tmp_path) == whole


def test_a_state_that_is_gone_is_made_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    go(tmp_path, rounds=3)
    (tmp_path / "sites" / "b" / "00003.safetensors").unlink()
    (tmp_path / "server" / "00002.safetensors").unlink()
    go(tmp_path)
    assert states(tmp_path) == whole


@pytest.mark.parametrize("fraction", [1.0, 0.34])
@pytest.mark.parametrize("keep", [1, 2])
def test_only_what_is_needed_is_kept(tmp_path: Path, keep: int, fraction: float) -> None:
    full = go(tmp_path / "full", fraction=fraction)
    run = go(tmp_path / "kept", keep=keep, fraction=fraction)
    best = best_round(run.events())
    rounds = {best, *range(ROUNDS - keep + 1, ROUNDS + 1)}
    assert {int(f.stem) for f in (run.path / "server").glob("*")} == rounds
    for site in SITES:
        for round_ in rounds:
            mine, theirs = (r.store(site).before(round_ + 1) for r in (run, full))
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert {g: {k: t.tolist() for k, t in ts.items()} for g, ts in mine.items()} == {
                    g: {k: t.tolist() for k, t in ts.items()} for g, ts in theirs.items()
                }
    assert len(states(run.path)) < len(states(full.path))


def test_harm_beyond_what_was_kept_begins_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A site whose older states are deleted must not go on from nothing as if it had never trained."""
    go(tmp_path, rounds=3, keep=1)
    harm(tmp_path / "sites" / "a" / "00003.safetensors", "flip")
    go(tmp_path, keep=1)
    now = states(tmp_path)
    assert {name: whole[name] for name in now} == now
