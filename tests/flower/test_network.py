"""A bad network between coordinator and hospitals changes nothing but the time it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hospital_processes import PATIENCE, hospitals, in_the_middle
from lossy_network import LossyNetwork, NotAllowedError
from members import SITES

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(900)]
DELAY, LOSS, CUT = 0.05, 0.02, 20.0
METHOD = ("method=fedopal", "selection.every=2")


@pytest.fixture
def network() -> Iterator[LossyNetwork]:
    try:
        with LossyNetwork(SITES, delay=DELAY, loss=LOSS) as made:
            yield made
    except NotAllowedError as error:
        pytest.skip(f"no network namespaces here: {error}")


def test_delays_losses_and_a_cut_link(network: LossyNetwork, tmp_path: Path) -> None:
    with hospitals(tmp_path, network.address, network.inside()) as place:
        place.sites()
        run = place.coordinator(tmp_path / "out", *METHOD)
        in_the_middle(place, tmp_path / "out", "south", 1)
        network.cut.add("south")
        time.sleep(CUT)
        network.cut.clear()
        assert place.ended("coordinator", run, PATIENCE) == 0, place.said("coordinator")
        found, one = place.bytes_of(tmp_path / "out"), place.bytes_in_one_process(*METHOD)
    assert {file: found.get(file) for file in one} == one
    assert network.severed > 0
    share = network.lost / (network.lost + network.passed)
    assert LOSS / 2 < share < 2 * LOSS
    print(f"{DELAY:g} s each way, {network.lost} packets lost ({share:.1%}), a link cut for {CUT:g} s: same bytes")
