"""A hospital that starts when round 1 has begun, over a real SuperLink and SuperNodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from absent import without_west
from hospital_processes import PATIENCE, Hospitals, hospitals, in_the_middle, tensors, until
from members import CLASSES, SITES, SMALL

from confrere.config import validate

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(900)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Hospitals]:
    with hospitals(tmp_path / "consortium") as made:
        yield made


def test_a_site_that_starts_in_round_1(place: Hospitals, tmp_path: Path) -> None:
    """A10: it joins; a coordinator that is killed after that goes on with it, see test_late.py."""
    out = tmp_path / "out"
    place.site("north")
    place.site("south")
    run = place.coordinator(out, "--late", "west", "rounds=3")
    in_the_middle(place, out, "north", 1)
    place.site("west")

    def joined() -> int:
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if line.endswith("}")]
        since = [event["since"] for event in events if event["event"] == "joined"]
        return since[0] if since and [e["round"] for e in events if e["event"] == "begin"][-1:] == since else 0

    since = until(joined, PATIENCE, "west has joined and its first round has begun")
    assert place.ended("coordinator", run, PATIENCE) == 0, place.said("coordinator")
    assert "never came" not in place.said("coordinator")
    assert sorted(json.loads((out / "results.json").read_text())["sites"]) == [*SITES]
    values = {**SMALL, "path": "set", "data": {"classes": CLASSES}, "rounds": 3}
    one = tensors(without_west(validate(values), place.images, tmp_path / "one", since))
    found = {file: digest for file, digest in place.bytes_of(out).items() if "adapters/general/" not in file}
    assert found == one
    print(f"A10: joined before round {since} of 3: {len(one)} of {len(one)} tensor files byte-equal to one process")
