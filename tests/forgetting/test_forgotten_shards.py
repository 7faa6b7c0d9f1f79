"""A run of shards forgets a patient to the byte by training one shard again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgetting_runs import SITE, hospitals, never_had, patients_of, states, trained

from confrere.forgetting import shards as forgetting_shards
from confrere.forgetting.forget import forget
from confrere.forgetting.who import Whom
from confrere.tokenset import keys_of, shard_of
from confrere.verify import verify

SHARDS, STEPS, ROUNDS, SITES = 3, 7, 3, 3
CHOICE = {"method": {"name": "shards", "shards": SHARDS}, "train": {"steps": STEPS, "batch_size": 4, "lr": 0.02}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shards")
    data = hospitals(folder)
    return data, trained(data, folder / "run", **CHOICE)


def test_a_patient_is_forgotten_to_the_byte_for_a_third_of_the_steps(place: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = place
    name = patients_of(data, SITE, run)[1]
    found = forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    gold = states(never_had(run, data, tmp_path / "gold", patients=(name,)))
    assert states(tmp_path / "new") == gold
    assert gold["server/00003.safetensors"] != states(run)["server/00003.safetensors"]
    assert found["cost"]["steps"] in {ROUNDS * SITES * steps for steps in (3, 2)}  # seven divided by three
    assert found["retraining"]["steps"] == ROUNDS * SITES * STEPS
    assert verify(tmp_path / "new")[0].recomputed == ROUNDS
    print(f"shards: {found['cost']['steps']} of {found['retraining']['steps']} steps, {len(gold)} files byte-equal")


def test_a_site_had_a_part_in_every_shard(place: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = place
    found = forget(run, Whom(site=SITE), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", site=SITE))
    assert found["cost"]["steps"] == found["retraining"]["steps"] == ROUNDS * (SITES - 1) * STEPS


def test_a_patient_who_only_judged_costs_no_step(place: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = place
    name = patients_of(data, SITE, run, "val")[0]
    found = forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", patients=(name,)))
    assert found["cost"]["steps"] == 0


@pytest.mark.parametrize("damage", ["answer", "server"])
def test_what_is_not_what_the_journal_says_is_trained_again(
    damage: str, place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = place
    name = patients_of(data, SITE, run)[1]

    told = forgetting_shards.of_round

    def other(folder: Path, round_: int) -> tuple[dict[str, Any], dict[str, Any]]:
        before, answers = told(folder, round_)
        if damage == "answer":
            return before, {}
        return {key: value + 1 for key, value in before.items()}, answers

    monkeypatch.setattr(forgetting_shards, "of_round", other)
    found = forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    assert found["cost"]["steps"] == ROUNDS * SITES * STEPS
    gold = states(never_had(run, data, tmp_path / "gold", patients=(name,)))
    assert states(tmp_path / "new") == gold


def test_a_patients_key_does_not_depend_on_who_else_is_there() -> None:
    groups = np.array([4, 1, 4, 2, 1, 9])
    digests = [f"{k:064x}" for k in (2**200, 2**201, 5, 2**202, 2**255, 2**254 + 2**193)]
    keys = keys_of(groups, digests)
    assert keys.tolist() == [0, 2**9, 0, 2**10, 2**9, 2**62 + 2]
    assert shard_of(keys, 3).tolist() == [0, 2, 0, 1, 2, 0]
    left = np.array([0, 2, 3, 5])
    renumbered = keys_of(np.array([1, 1, 0, 2]), [digests[i] for i in left])
    assert renumbered.tolist() == keys[left].tolist()
