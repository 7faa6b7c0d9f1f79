"""The coordinator's run over workers, without a network: the bytes of the run in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from members import (
    SITES,
    Members,
    assert_same,
    experiment_for,
    in_one_process,
    make_images,
    make_members,
    run_members,
    says,
)

from confrere.config import override, validate
from confrere.consortium.lead import across
from confrere.errors import ConfigError, PolicyError, RunError
from confrere.verify import verify


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=fedopal",),
        ("method=scaffold",),
        ("method=flexlora", "adapter.ranks={north=2, south=4, west=6}"),
        ("method=ifca",),
        ("method=fedopal", "federation.fraction=0.7", "hold_out=west"),
    ],
    ids=lambda overrides: "-".join(o.split("=")[-1].strip("}") for o in overrides),
)
def test_same_bytes_as_in_one_process(
    overrides: tuple[str, ...], kits: Path, images: Path, members: Members, tmp_path: Path
) -> None:
    """G7, but for the network, which the slow tests have."""
    experiment = experiment_for(kits, *overrides)
    run_members(experiment, tmp_path / "out", members)
    in_one_process(experiment, images, tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "out", tmp_path / "state")


def test_masked_updates_leave_the_bytes_of_the_masked_run_in_one_process(
    kits: Path, images: Path, members: Members, tmp_path: Path
) -> None:
    experiment = experiment_for(kits, "secure.aggregation=true", "gate.norm=0", "gate.factor=0")
    run_members(experiment, tmp_path / "out", members)
    assert {kind for _, kind, _ in members.seen} >= {"keys", "shares", "masked", "unmask"}
    assert "train" not in {kind for _, kind, _ in members.seen}
    in_one_process(experiment, images, tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "out", tmp_path / "state")


def test_controls_verdicts_and_what_a_site_takes_home(
    kits: Path, members: Members, images: Path, tmp_path: Path
) -> None:
    experiment, said = across(
        validate(override(experiment_for(kits).model_dump(), ['controls=["local", "pooled"]'])), ()
    )
    assert experiment.controls == ("local",)
    assert "Pooled" in said[0]
    out, state = tmp_path / "out", tmp_path / "state"
    run_members(experiment, out, members)
    job = json.loads((out / "job.json").read_text())["job"]
    found = json.loads((out / "verdicts.json").read_text())
    assert set(found["sites"]) == set(SITES)
    assert json.loads((out / "federation.json").read_text())["name"] == "members"  # the roster's, not the folder's
    assert found["headline"].startswith("Against training alone")
    for site in SITES:
        home = state / site / job / "adapters" / site
        assert (home / "merged" / "adapter_model.safetensors").exists()
        assert not (out / "adapters" / site).exists()  # the coordinator gets no personal adapter
        assert not (out / "sites").exists()
    assert (out / "adapters" / "general" / "head.json").exists()
    parts = verify(out)
    assert [part.part for part in parts] == [".", "controls/local"]


def test_a_stopped_run_goes_on_to_the_same_bytes(kits: Path, images: Path, members: Members, tmp_path: Path) -> None:
    experiment = experiment_for(kits, "rounds=3")

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(site: str, kind: str, content: bytes) -> bytes:
        if (site, kind) == ("south", "train") and len(members.seen) > 8:
            raise Stopped
        return content

    members.touch = stop
    with pytest.raises(Stopped):
        run_members(experiment, tmp_path / "out", members)
    again = make_members(kits, images, tmp_path / "state")  # every process was killed
    run_members(experiment, tmp_path / "out", again)
    in_one_process(experiment, images, tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "out", tmp_path / "state")


def test_a_site_that_does_not_answer_is_left_out_of_its_round(kits: Path, members: Members, tmp_path: Path) -> None:
    members.touch = lambda site, kind, content: None if (site, kind) == ("south", "train") else content
    run_members(experiment_for(kits), tmp_path / "out", members)
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [e["site"] for e in events if e["event"] == "failure"] == ["south", "south"]
    assert {frozenset(e["sites"]) for e in events if e["event"] == "round"} == {frozenset({"north", "west"})}


def test_a_policy_refuses_before_round_one(kits: Path, images: Path, tmp_path: Path) -> None:
    members = make_members(kits, images, tmp_path / "state", methods=("fedit",))
    with pytest.raises(PolicyError, match="does not allow the method fedopal") as caught:
        run_members(experiment_for(kits), tmp_path / "out", members)
    assert caught.value.code == "policy-method"
    assert not (tmp_path / "out" / "events.jsonl").exists()
    assert not (tmp_path / "state" / "north").joinpath("sites").exists()


def test_an_experiment_may_be_mended_until_the_run_has_begun(kits: Path, images: Path, tmp_path: Path) -> None:
    out, members = tmp_path / "out", make_members(kits, images, tmp_path / "state", most_rounds=2)
    with pytest.raises(PolicyError):
        run_members(experiment_for(kits, "rounds=3"), out, members)
    run_members(experiment_for(kits, "rounds=2"), out, members)  # into the same directory
    assert (out / "results.json").exists()


def test_a_missing_site_is_named(kits: Path, members: Members, tmp_path: Path) -> None:
    del members.workers["west"]
    with pytest.raises(RunError, match="west did not come online") as caught:
        run_members(experiment_for(kits), tmp_path / "out", members)
    assert caught.value.code == "sites-missing"


def test_another_version_is_refused(
    kits: Path, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(members.workers["south"], monkeypatch, "versions", {"confrere": "0.0.9"})
    with pytest.raises(RunError, match=r"confrere 0\.0\.9.*site south") as caught:
        run_members(experiment_for(kits), tmp_path / "out", members)
    assert caught.value.code == "version"


def test_other_weights_under_the_same_name_are_refused(
    kits: Path, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(members.workers["north"], monkeypatch, "backbone", {"digest": "0" * 64})
    with pytest.raises(RunError, match="000000000000") as caught:
        run_members(experiment_for(kits), tmp_path / "out", members)
    assert caught.value.code == "site-differs"


def test_no_answer_to_the_last_questions_can_be_made_up_for(kits: Path, members: Members, tmp_path: Path) -> None:
    members.touch = lambda site, kind, content: None if (site, kind) == ("west", "export") else content
    with pytest.raises(RunError, match="could not export") as caught:
        run_members(experiment_for(kits), tmp_path / "out", members)
    assert caught.value.code == "export"
    members.touch = lambda site, kind, content: content
    run_members(experiment_for(kits), tmp_path / "out", members)
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"method": "pooled"}, "method.name"),
        ({"attack": {"sites": ["north"]}}, "attack.sites"),
        ({"data": {"shift": [{"kind": "stain", "strength": 0.5}]}}, "data.shift"),
        ({"data": {"partition": {"by": "dirichlet"}}}, "data.partition"),
    ],
)
def test_what_cannot_be_across_hospitals(values: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        across(validate({"path": "x", "controls": [], **values}), ("a", "b"))
    assert (caught.value.code, caught.value.where) == ("across-hospitals", where)


def test_classes_must_be_agreed() -> None:
    with pytest.raises(ConfigError) as caught:
        across(validate({"path": "x"}), ())
    assert caught.value.where == "data.classes"


@pytest.mark.slow
def test_a_run_whose_hospitals_hide_images_ends_with_test_metrics_and_nothing_else(
    kits: Path, members: Members, tmp_path: Path
) -> None:
    pytest.importorskip("dp_accounting")
    noisy = ("privacy.unit=record", "privacy.sigma=1", "privacy.delta=1e-3", "train.balance=none", "method=fedit")
    experiment = experiment_for(kits, *noisy, 'controls=["local"]', "rounds=2", "train.batch_size=4", "train.steps=1")
    for _ in range(2):  # the second time the results are there
        run_members(experiment, tmp_path / "out", members)
    for part in (tmp_path / "out", tmp_path / "out" / "controls" / "local"):
        results = json.loads((part / "results.json").read_text())
        assert set(results["sites"]) == set(SITES)
        assert all("balanced_accuracy" in json.dumps(entry) for entry in results["sites"].values())
        events = [json.loads(line) for line in (part / "events.jsonl").read_text().splitlines()]
        rounds = [entry for e in events if e["event"] == "round" for entry in e["sites"].values()]
        assert len(rounds) == 2 * len(SITES)
        assert {entry["loss"] for entry in rounds} == {None}
        assert {score for e in events if e["event"] == "evaluation" for score in e["sites"].values()} <= {None}
