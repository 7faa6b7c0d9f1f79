"""What is rebuilt is what a run that never had the forgotten holds, byte for byte; what can be taken over is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from forgetting_runs import SITE, hospitals, never_had, patients_of, states, trained

from confrere.federation.sampling import sample
from confrere.forgetting.forget import forget
from confrere.forgetting.who import Whom
from confrere.progress import progress
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.seeds import numpy_generator
from confrere.verify import verify

SITES = ("ashford", "brindley", "corvale")
LAST = "server/00003.safetensors"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def late_seed(rounds: int) -> int:
    """Return a seed with which Poisson sampling draws the site in the last of ``rounds`` rounds only, others before."""
    return next(
        seed
        for seed in range(1000)
        if [SITE in sample(SITES, 0.7, seed, r, "poisson") for r in range(1, rounds + 1)]
        == [False] * (rounds - 1) + [True]
    )


def test_a_site_is_forgotten_to_the_byte(tmp_path: Path, run: Path, data: Path) -> None:
    before = states(run)
    with progress(quiet=False) as notify:  # what a terminal shows must not get in the way
        found = forget(run, Whom(site=SITE), tmp_path / "new", notify=notify)
    gold = states(never_had(run, data, tmp_path / "gold", site=SITE))
    assert states(tmp_path / "new") == gold
    assert gold[LAST] != before[LAST]
    assert states(run) == before
    assert (found["cost"]["reused"], found["cost"]["rounds"], found["cost"]["steps"]) == (0, 3, 12)
    for place in (run, tmp_path / "new"):
        assert verify(place)[0].recomputed == 3
    cost = found["cost"]
    print(f"G36: {len(gold)} files of states and adapters equal those of a run that never had the site; ", end="")
    print(f"{cost['rounds']} rounds replayed, {cost['reused']} taken over, {cost['steps']} steps")


def test_patients_are_forgotten_to_the_byte(tmp_path: Path, run: Path, data: Path) -> None:
    names = patients_of(data, SITE, run)[:2]
    forget(run, Whom(patients=frozenset(names)), tmp_path / "new")
    gold = states(never_had(run, data, tmp_path / "gold", patients=tuple(names)))
    assert states(tmp_path / "new") == gold
    assert gold[LAST] != states(run)[LAST]


def test_rounds_before_a_sites_first_part_are_taken_over(tmp_path: Path, data: Path) -> None:
    choices: dict[str, Any] = {"seed": late_seed(3), "federation": {"sampling": "poisson", "fraction": 0.7}}
    run = trained(data, tmp_path / "run", **choices)
    found = forget(run, Whom(site=SITE), tmp_path / "new")
    gold = states(never_had(run, data, tmp_path / "gold", site=SITE))
    assert states(tmp_path / "new") == gold
    assert gold["server/00002.safetensors"] == states(run)["server/00002.safetensors"]
    assert found["cost"]["reused"] == 2
    asked = sample([s for s in SITES if s != SITE], 0.7, choices["seed"], 3, "poisson")
    assert found["cost"]["steps"] == 2 * len(asked)


def test_patients_who_were_only_tested_cost_no_step(tmp_path: Path, run: Path, data: Path) -> None:
    name = patients_of(data, SITE, run, "test")[0]
    found = forget(run, Whom(patients=frozenset([name])), tmp_path / "new")
    assert (found["cost"]["reused"], found["cost"]["steps"]) == (3, 0)
    gold = states(never_had(run, data, tmp_path / "gold", patients=(name,)))
    assert states(tmp_path / "new") == gold
    assert gold[LAST] == states(run)[LAST]


@pytest.mark.slow
def test_where_nobody_learns_from_others_only_one_site_trains_again(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", method="local")
    name = patients_of(data, SITE, run)[0]
    found = forget(run, Whom(patients=frozenset([name])), tmp_path / "new")
    assert found["cost"]["steps"] == 3 * 2
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", patients=(name,)))


@pytest.mark.slow
def test_a_state_that_is_not_the_journals_is_not_taken_over(tmp_path: Path, run: Path, data: Path) -> None:
    name = patients_of(data, SITE, run, "test")[0]
    store = Run(run).store("ashford")
    shutil.copyfile(store.file(1), store.file(2))
    found = forget(run, Whom(patients=frozenset([name])), tmp_path / "new")
    assert found["cost"]["reused"] == 1
    assert states(tmp_path / "new")[LAST] == states(run)[LAST]


@pytest.mark.slow
def test_a_rebuild_that_was_stopped_goes_on(tmp_path: Path, run: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget(run, Whom(site=SITE), tmp_path / "new", notify=stop)
    forget(run, Whom(site=SITE), tmp_path / "new")
    forget(run, Whom(site=SITE), tmp_path / "whole")
    assert states(tmp_path / "new") == states(tmp_path / "whole")


@pytest.mark.slow
def test_a_site_whose_data_are_gone_already_is_forgotten(tmp_path: Path, data: Path) -> None:
    place = Path(shutil.copytree(data, tmp_path / "data"))
    run = trained(place, tmp_path / "run")
    forget(run, Whom(site=SITE), tmp_path / "before")
    shutil.rmtree(place / SITE)
    forget(run, Whom(site=SITE), tmp_path / "after")
    assert states(tmp_path / "after") == states(tmp_path / "before")


@pytest.mark.slow
def test_a_class_that_only_the_site_had_stays_in_the_head(tmp_path: Path, data: Path) -> None:
    place = Path(shutil.copytree(data, tmp_path / "data"))
    (place / SITE / "zoster").mkdir()
    for number, picture in enumerate(sorted((place / SITE).rglob("*.png"))[:6]):
        content = bytearray(picture.read_bytes()) + b"zoster"
        (place / SITE / "zoster" / f"z{number}__1.png").write_bytes(content)
    run = trained(place, tmp_path / "run")
    assert "zoster" in read_json(run / "federation.json")["classes"]
    forget(run, Whom(site=SITE), tmp_path / "new")
    assert "zoster" in read_json(tmp_path / "new" / "federation.json")["classes"]
    assert "classes" in read_json(tmp_path / "new" / "certificate.json")["notes"][0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedopal", "fedper", "scaffold", "ifca", "fedex-lora"])
@pytest.mark.parametrize("whom", ["site", "patients"])
def test_every_kind_of_method_is_rebuilt_to_the_byte(tmp_path: Path, data: Path, method: str, whom: str) -> None:
    run = trained(data, tmp_path / "run", method=method, controls=["local"])
    names = patients_of(data, SITE, run)
    chosen = numpy_generator(0, "forget", method).permutation(len(names))[:3]
    patients = tuple(names[i] for i in chosen) if whom == "patients" else ()
    site = SITE if whom == "site" else ""
    forget(run, Whom(site=site, patients=frozenset(patients)), tmp_path / "new")
    assert states(tmp_path / "new") == states(never_had(run, data, tmp_path / "gold", site=site, patients=patients))
    for place in (run, tmp_path / "new"):
        assert verify(place)[0].recomputed == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"hold_out": "corvale"},
        {"secure": {"aggregation": True}, "gate": {"norm": 0.0, "factor": 0.0}},
        {"record": {"keep": 1}},
        {"adapter": {"blocks": 2, "rank": 4, "ranks": {SITE: 8}}, "method": "flexlora"},
        {"federation": {"weights": "equal", "rule": "median", "byzantine": 0}},
    ],
)
def test_every_kind_of_experiment_is_rebuilt_to_the_byte(tmp_path: Path, choices: dict[str, Any]) -> None:
    data = hospitals(tmp_path, sites=5)
    run = trained(data, tmp_path / "run", **choices)
    forget(run, Whom(site=SITE), tmp_path / "new")
    adapter = {"blocks": 2, "rank": 4}
    gold = states(never_had(run, data, tmp_path / "gold", site=SITE, adapter=adapter))
    assert states(tmp_path / "new").keys() == gold.keys()
    differing = {n for n, content in states(tmp_path / "new").items() if content != gold[n]}
    assert not {name for name in differing if name.startswith(("server", "adapters"))}
