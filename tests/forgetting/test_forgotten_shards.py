"""A run of shards forgets a patient to the byte by training one shard again."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgetting_runs import SITE, hospitals, never_had, patients_of, states, trained

from confrere.forgetting.forget import forget
from confrere.forgetting.who import Whom
from confrere.record.files import read_state, write_state
from confrere.record.run import Run
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
    # Seven divided by three; in round 1 the other sites begin with what they began with.
    assert found["cost"]["steps"] in {(ROUNDS * SITES - (SITES - 1)) * steps for steps in (3, 2)}
    assert found["retraining"]["steps"] == ROUNDS * SITES * STEPS
    assert verify(tmp_path / "new")[0].recomputed == ROUNDS
    print(f"shards: {found['cost']['steps']} of {found['retraining']['steps']} steps, {len(gold)} files byte-equal")


def test_a_site_had_a_part_in_every_shard(place: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = place
    found = forget(run, Whom(site=SITE), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", site=SITE))
    assert found["cost"]["steps"] == (ROUNDS - 1) * (SITES - 1) * STEPS  # in round 1 those who stay began the same
    assert found["retraining"]["steps"] == ROUNDS * (SITES - 1) * STEPS


@pytest.mark.slow
def test_a_site_whose_images_are_deleted_already(place: tuple[Path, Path], tmp_path: Path) -> None:
    data = Path(shutil.copytree(place[0], tmp_path / "h"))
    run = trained(data, tmp_path / "run", **CHOICE)
    gold = states(never_had(run, data, tmp_path / "gold", site=SITE))
    shutil.rmtree(data / SITE)
    forget(run, Whom(site=SITE), tmp_path / "new")
    assert states(tmp_path / "new") == gold


def test_a_patient_who_only_judged_costs_no_step(place: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = place
    name = patients_of(data, SITE, run, "val")[0]
    found = forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", patients=(name,)))
    assert found["cost"]["steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["another answer", "a torn answer", "another start"])
def test_what_is_not_what_the_journal_says_is_trained_again(
    damage: str, place: tuple[Path, Path], tmp_path: Path
) -> None:
    data, whole = place
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    name = patients_of(data, SITE, run)[1]
    spared = forget(whole, Whom(patients=frozenset({name})), tmp_path / "spared")["cost"]["steps"]
    if damage == "another start":
        harm(Run(run).server_file(1))
    else:
        harm(run / "sites" / "ashford" / "00002.safetensors", torn=damage == "a torn answer")
    found = forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    assert states(tmp_path / "new") == states(tmp_path / "spared")
    assert found["cost"]["steps"] > spared


def harm(file: Path, *, torn: bool = False) -> None:
    """Tear a file, or write it with another number in every tensor: a state that can be read."""
    if torn:
        file.write_bytes(file.read_bytes()[:-8])
        return
    groups, meta = read_state(file)
    write_state(file, {g: {n: t + 1 for n, t in tensors.items()} for g, tensors in groups.items()}, meta)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["shards", "fedit"])
@pytest.mark.parametrize("kind", ["label-noise", "quantity"])
def test_what_a_simulated_shift_draws_anew_is_trained_again(
    kind: str, method: str, place: tuple[Path, Path], tmp_path: Path
) -> None:
    """It draws among all images of the site: with one less, others are changed."""
    data = place[0]
    shift = {"kind": kind, "sites": [SITE], "strength": 0.5}
    run = trained(data, tmp_path / "run", **{**CHOICE, "method": method}, data={"shift": [shift]})
    name = patients_of(data, SITE, run)[1]
    forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", patients=(name,)))


def test_rows_of_a_table_are_standardised_by_those_who_are_left(tmp_path: Path) -> None:
    """Every shard of the patient's site changes, as all of its rows do."""
    rng, name = np.random.default_rng(0), "north5"
    rows = [(f"{s}{k}", s, str(k % 2), *rng.normal(k % 2, 1, 3)) for s in ("north", "south") for k in range(30)]
    for file, gone in (("all", ""), ("less", name)):
        with (tmp_path / f"{file}.csv").open("w", newline="") as out:
            heads = ("patient", "site", "label", "x", "y", "z")
            csv.writer(out).writerows([heads, *(row for row in rows if row[0] != gone)])
    how: dict[str, Any] = {**CHOICE, "backbone": {"name": "mlp"}, "adapter": {"rank": 2}}
    run = trained(tmp_path / "all.csv", tmp_path / "run", **how)
    assert name in patients_of(tmp_path / "all.csv", "north", run)
    forget(run, Whom(patients=frozenset({name})), tmp_path / "new")
    gold = tmp_path / "gold"
    gold.mkdir()
    shutil.copy(tmp_path / "new" / "splits.csv", gold / "splits.csv")
    assert states(trained(tmp_path / "less.csv", gold, **how)) == states(tmp_path / "new")


def test_a_patients_key_does_not_depend_on_who_else_is_there() -> None:
    groups = np.array([4, 1, 4, 2, 1, 9])
    digests = [f"{k:064x}" for k in (2**200, 2**201, 5, 2**202, 2**255, 2**254 + 2**193)]
    keys = keys_of(groups, digests)
    assert keys.tolist() == [0, 2**9, 0, 2**10, 2**9, 2**62 + 2]
    assert shard_of(keys, 3).tolist() == [0, 2, 0, 1, 2, 0]
    left = np.array([0, 2, 3, 5])
    renumbered = keys_of(np.array([1, 1, 0, 2]), [digests[i] for i in left])
    assert renumbered.tolist() == keys[left].tolist()
