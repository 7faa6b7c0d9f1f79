"""An experiment with secure aggregation from data to ``confrere verify``, and a site that is not set up for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import tiny_sites

from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, RunError, UpdateRefusedError
from confrere.federation.secure.total import SUMS, read_total
from confrere.job import run_experiment
from confrere.method import Request, make
from confrere.record.files import read_state, write_state
from confrere.record.run import Run
from confrere.verify import verify

ROUNDS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("secure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(folder / "cache"))
        make_microscopy(folder / "data", seed=3, sites=3, images=(16, 18, 20), size=32)
        run_experiment(validate(values(folder)), folder / "run")
        yield folder / "run"


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": str(folder / "data"),
        "backbone": {"name": "test-vit"},
        "adapter": {"blocks": 2, "rank": 4},
        "rounds": ROUNDS,
        "threads": 1,
        "train": {"steps": 2, "batch_size": 4},
        "controls": ["local"],
        "secure": {"aggregation": True},
        "gate": {"norm": 0.0, "factor": 0.0},
        **changes,
    }


def test_a_masked_experiment_is_verified_from_its_sums(finished: Path) -> None:
    own, control = verify(finished)
    assert (own.rounds, own.recomputed) == (ROUNDS, ROUNDS)
    assert (control.rounds, control.recomputed) == (ROUNDS, ROUNDS)
    assert len(list((finished / SUMS).iterdir())) == ROUNDS
    assert not (finished / "controls" / "local" / SUMS).exists()
    rounds = [event for event in Run(finished).events() if event["event"] == "round"]
    assert all(event["averaged"] and event["secure"]["asked"] == 3 for event in rounds)
    assert len(list((finished / "sites").glob("*/opened-*.json"))) == 3 * ROUNDS


def test_a_changed_or_missing_sum_is_noticed(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = run / SUMS / "00002.safetensors"
    state, meta = read_state(file)
    words = state["sum"]["words"].clone()
    words[7] += 1
    write_state(file, {"sum": {**state["sum"], "words": words}}, meta)
    with pytest.raises(RunError, match="not what the journal says") as caught:
        verify(run)
    assert caught.value.code == "verification"
    write_state(file, state, {**meta, "sites": meta["sites"][1:]})
    with pytest.raises(RunError, match="other sites than the journal"):
        verify(run)
    write_state(file, state, {**meta, "round": 1})
    with pytest.raises(RunError) as caught:
        read_total(run / SUMS, 2)
    assert caught.value.code == "state-misplaced"
    file.unlink()
    with pytest.raises(RunError, match="missing"):
        verify(run)


def test_old_sums_go_with_old_states(tmp_path: Path, finished: Path) -> None:
    run = Run(Path(shutil.copytree(finished, tmp_path / "run")))
    run.retain({2, 3})
    assert sorted(file.stem for file in (run.path / SUMS).iterdir()) == ["00002", "00003"]


def test_a_threshold_above_the_sites_is_refused_before_anything_is_trained(finished: Path, tmp_path: Path) -> None:
    experiment = validate(values(finished.parent, secure={"aggregation": True, "threshold": 4}))
    with pytest.raises(ConfigError) as caught:
        run_experiment(experiment, tmp_path / "run")
    assert caught.value.where == "secure.threshold"


def test_a_site_without_masks_sends_nothing_when_masks_are_asked_for() -> None:
    sites = tiny_sites(make("fedit"))
    for kind in ("keys", "shares", "masked", "unmask"):
        request = Request(kind=kind, round=1, state={"secure": {"message": torch.zeros(1)}})  # type: ignore[arg-type]
        with pytest.raises(UpdateRefusedError) as caught:
            sites["a"].handle(request)
        assert caught.value.code == "secure-off"
