"""Across hospitals over a real SuperLink and SuperNodes: the same bytes as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hospital_processes import Hospitals, hospitals

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(900)]
# One round, as every message takes seconds: Flower looks for one every three. What servers carry is a frame of bytes
# whatever the method is; test_conduct.py has more methods and rounds over frames alone.
KINDS = {
    "fedopal, with a control": ("method=fedopal", 'controls=["local"]', "rounds=1"),
    "fedopal, masked": ("method=fedopal", "secure.aggregation=true", "gate.norm=0", "gate.factor=0", "rounds=1"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    with hospitals(tmp_path_factory.mktemp("consortium")) as made:
        made.sites()
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_in_one_process(place: Hospitals, tmp_path: Path, kind: str) -> None:
    place.conduct(tmp_path / "out", *KINDS[kind])
    same = place.compare(tmp_path / "out", *KINDS[kind])
    print(f"G7: {kind}: {same} of {same} tensor files byte-equal to the run in one process")
