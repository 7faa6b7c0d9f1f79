"""A killed hospital, SuperNode or coordinator changes no byte; other versions and second processes stay out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hospital_processes import MAIN, PATIENCE, Hospitals, hospitals, in_the_middle, until
from members import SITES

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(900)]
DISTURBED = ("method=fedopal", "selection.every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    with hospitals(tmp_path_factory.mktemp("consortium")) as made:
        made.sites()
        yield made


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text()) if (out / "status.json").exists() else {}


def test_a_killed_hospital_and_a_killed_supernode(place: Hospitals, tmp_path: Path) -> None:
    """Nothing is lost, nothing is done differently, and no process is left."""
    run = place.coordinator(tmp_path / "out", *DISTURBED)
    in_the_middle(place, tmp_path / "out", "north", 1)
    assert len(place.kill("north")) >= 3  # its own process, the SuperNode, what carries the message
    assert not place.running("north")
    place.site("north")
    in_the_middle(place, tmp_path / "out", "south", 2)
    assert len(place.kill("south", "flower-supernode")) == 1
    assert place.ended("coordinator", run, PATIENCE) == 0, place.said("coordinator")
    place.compare(tmp_path / "out", *DISTURBED)
    for site in SITES:  # SuperNodes come and go with the coordinator, but there are never two
        until(lambda site=site: "flwr-clientapp" not in str(place.running(site)), 60.0, f"nothing is left at {site}")
        assert sum("flower-supernode" in line for line in place.running(site).values()) <= 1


def test_a_killed_coordinator_goes_on(place: Hospitals, tmp_path: Path) -> None:
    run = place.coordinator(tmp_path / "out", *DISTURBED)
    in_the_middle(place, tmp_path / "out", "west", 2)
    run.kill()  # it alone: what it started must find out
    assert place.ended("coordinator", run, 60.0) == -signal.SIGKILL
    assert status(tmp_path / "out")["phase"] == "train"
    place.conduct(tmp_path / "out")
    assert status(tmp_path / "out")["phase"] == "done"
    place.compare(tmp_path / "out", *DISTURBED)


OTHER_VERSION = (
    "from confrere.record import machine as m; own = m.machine; m.machine = lambda: {**own(), 'confrere': '0.99.0'}; "
)


def test_another_version_is_refused_before_round_1(place: Hospitals, tmp_path: Path) -> None:
    """G37, one of twelve."""
    place.kill("north")
    place.site("north", code=OTHER_VERSION + MAIN)
    try:
        run = place.coordinator(tmp_path / "out")
        assert place.ended("coordinator", run, PATIENCE) == 5
    finally:
        place.kill("north")
        place.site("north")
    said = place.said("coordinator")
    assert "it has confrere 0.99.0, the coordinator" in said, said
    assert "Code: version" in said, said
    assert not (tmp_path / "out" / "events.jsonl").exists()
    print("G37: another version: refused")


def test_a_second_process_with_the_same_kit(place: Hospitals, tmp_path: Path) -> None:
    """It is refused and named while the first one lives, which goes on as if nothing had happened. G37."""
    run = place.coordinator(tmp_path / "out", *DISTURBED, "rounds=1")
    in_the_middle(place, tmp_path / "out", "north", 1)
    clone = place.site("north", "--retry", "0", state="clone", process="clone")
    assert place.ended("clone", clone, PATIENCE) == 9, place.said("clone")
    assert "Code: site-twice" in place.said("clone"), place.said("clone")
    assert place.ended("coordinator", run, PATIENCE) == 0, place.said("coordinator")
    assert "north  site-twice  127.0.0.1" in place.said("coordinator")
    place.compare(tmp_path / "out", *DISTURBED, "rounds=1")
    print("G37: a second process with the same kit: refused")
