"""Rebuilding a run whose sites hide their images: the result is distributed as a run that never had them (G36)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forgetting_runs import SITE, never_had, states, trained

from confrere.forgetting.forget import NOISY, REBUILT, forget
from confrere.forgetting.who import Whom
from confrere.record.files import read_json
from confrere.verify import verify

pytest.importorskip("dp_accounting")

TRAIN = {"steps": 2, "batch_size": 4, "lr": 0.02, "balance": "none"}
PRIVACY = {"unit": "record", "sigma": 1.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Path]:
    return trained(data, tmp_path_factory.mktemp("hidden") / "run", rounds=2, train=TRAIN, privacy=PRIVACY)


def test_a_run_with_noise_is_rebuilt_with_new_noise_and_says_so(tmp_path: Path, hidden: Path) -> None:
    said = [forget(hidden, Whom(site=SITE), tmp_path / name) for name in ("one", "two")]
    for found, name in zip(said, ("one", "two"), strict=True):
        assert found["statement"] == NOISY != REBUILT
        assert any("epsilon of the first run" in line for line in found["not_shown"])
        assert (found["cost"]["rounds"], found["cost"]["reused"], found["cost"]["steps"]) == (2, 0, 2 * 2 * 2)
        promised = read_json(tmp_path / name / "results.json")["privacy"]
        assert promised["epsilon"] > 0
        assert SITE not in promised["sites"]
        (part,) = verify(tmp_path / name)
        assert (part.rounds, part.recomputed) == (2, 2)
    assert verify(hidden)[0].recomputed == 2
    one, two = (states(tmp_path / name) for name in ("one", "two"))
    assert one["server/00002.safetensors"] != two["server/00002.safetensors"], "noise may never be drawn twice"
    cost = said[0]["cost"]
    print(f"G36: with noise, equal in distribution: {cost['rounds']} rounds replayed, {cost['reused']} taken over")


@pytest.mark.slow
def test_where_noise_is_seeded_the_rebuilt_is_what_never_had_them(tmp_path: Path, data: Path) -> None:
    """Equal in distribution: of the same draws it makes the same bytes."""
    seeded = {**PRIVACY, "noise_seed": 5}
    run = trained(data, tmp_path / "run", rounds=2, train=TRAIN, privacy=seeded)
    forget(run, Whom(site=SITE), tmp_path / "new")
    gold = states(never_had(run, data, tmp_path / "gold", site=SITE))
    assert {n for n, content in states(tmp_path / "new").items() if content != gold[n]} == set()
