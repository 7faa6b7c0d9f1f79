"""Hospitals that come after round 1 has begun: the bytes of a run in one process that did not ask them before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from absent import without_west
from members import (
    SITES,
    Members,
    assert_same,
    experiment_for,
    make_images,
    make_members,
    run_members,
    says,
)

from confrere.config import override, validate
from confrere.consortium.late import Membership, absent, check_late, late_of
from confrere.errors import ConfigError, RunError
from confrere.federation.selection import best_round
from confrere.method import METHODS
from confrere.verify import verify

ROUNDS = "rounds=3"


class Stopped(Exception):  # noqa: N818
    """Stands for a kill."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), patients=6)


@pytest.fixture(scope="module")
def expected(kits: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain experiment in one process."""
    return without_west(experiment_for(kits, ROUNDS), images, tmp_path_factory.mktemp("one") / "run")


def coming(members: Members, during: int = 1, stop: tuple[str, str, int] | None = None) -> Members:
    """Let west come online while north trains in round ``during``, and everything be killed at ``stop``."""
    west = members.workers.pop("west")

    def touch(site: str, kind: str, content: bytes) -> bytes:
        if members.seen[-1] == stop:
            raise Stopped
        if members.seen[-1] == ("north", "train", during):
            members.workers["west"] = west
        return content

    members.touch = touch
    return members


def events_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def status_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


@pytest.mark.parametrize("method", ["fedopal", pytest.param("scaffold", marks=pytest.mark.slow)])
def test_a_site_that_joins_in_round_2(method: str, kits: Path, images: Path, members: Members, tmp_path: Path) -> None:
    """A10, but for the network, which the slow tests have."""
    experiment = validate(
        override(experiment_for(kits, ROUNDS, f"method={method}").model_dump(), ['controls=["local"]'])
    )
    out, west = tmp_path / "out", members.workers["west"]
    describe = west._describe
    west._describe = lambda *given: {**describe(*given), "warnings": ["a remark"]}  # type: ignore[method-assign]
    run_members(experiment, out, coming(members), ["west"])
    assert_same(without_west(experiment, images, tmp_path / "one"), out, tmp_path / "state")
    told = events_of(out)
    begun = {event["round"]: sorted(event["requests"]) for event in told if event["event"] == "begin"}
    assert begun == {1: ["north", "south"], 2: [*SITES], 3: [*SITES]}
    assert [e["event"] for e in told].index("joined") < told.index(next(e for e in told if e.get("round") == 2))
    assert sorted(events_of(out / "controls" / "local")[1]["requests"]) == [*SITES]
    results, federation = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "federation"))
    assert (sorted(results["sites"]), sorted(federation["sheet"]["sites"])) == ([*SITES], [*SITES])
    assert federation["sheet"]["warnings"][-1] == "west: a remark"
    assert sorted(json.loads((out / "verdicts.json").read_text())["sites"]) == [*SITES]
    home = tmp_path / "state" / "west" / json.loads((out / "job.json").read_text())["job"]
    assert (home / "adapters" / "west" / "merged" / "adapter_model.safetensors").exists()
    assert absent(status_of(out)) == []
    assert verify(out)[0].rounds == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dpfed", "pooled"}))
def test_every_method_takes_a_late_site(
    method: str, kits: Path, images: Path, members: Members, tmp_path: Path
) -> None:
    more = ["method.shards=2"] if method == "shards" else []  # there are two steps a round
    experiment, out = experiment_for(kits, ROUNDS, f"method={method}", *more), tmp_path / "out"
    run_members(experiment, out, coming(members), ["west"])
    assert [event["since"] for event in events_of(out) if event["event"] == "joined"] == [2]
    assert_same(without_west(experiment, images, tmp_path / "one"), out, tmp_path / "state")


def test_a_site_that_never_comes(kits: Path, members: Members, tmp_path: Path) -> None:
    out = tmp_path / "out"
    del members.workers["west"]
    run_members(experiment_for(kits), out, members, ["west"])
    assert sorted(json.loads((out / "results.json").read_text())["sites"]) == ["north", "south"]
    assert status_of(out)["sites"]["west"]["expected"]
    assert absent(status_of(out)) == ["west was expected and never came: the results are without it."]
    assert late_of(out, ()) == ("west",)  # it need not be said again


def refusing(members: Members, kind: str, kits: Path, images: Path, tmp_path: Path) -> None:
    if kind == "policy-method":
        members.workers["west"] = make_members(kits, images, tmp_path / "state", methods=("fedit",)).workers["west"]
    patch = pytest.MonkeyPatch()
    changes: dict[str, tuple[str, Any]] = {
        "version": ("versions", {"confrere": "0.0.9"}),
        "site-differs": ("backbone", {"digest": "0" * 64}),
        "message-form": ("backbone", None),
    }
    if kind in changes:
        says(members.workers["west"], patch, *changes[kind])


@pytest.mark.parametrize(
    "code",
    ["policy-method", "version", *(pytest.param(c, marks=pytest.mark.slow) for c in ("site-differs", "message-form"))],
)
def test_a_site_that_does_not_fit_stays_out(
    code: str, kits: Path, images: Path, members: Members, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refusing(members, code, kits, images, tmp_path)
    run_members(experiment_for(kits), out, coming(members), ["west"])
    assert status_of(out)["sites"]["west"]["refused"] == code
    assert absent(status_of(out)) == [f"west was refused ({code}): the results are without it."]
    assert [kind for site, kind, _ in members.seen if site == "west"] == ["describe"]  # once
    assert sorted(json.loads((out / "results.json").read_text())["sites"]) == ["north", "south"]


def test_one_that_gave_no_answer_is_asked_before_the_next_round(kits: Path, members: Members, tmp_path: Path) -> None:
    lost = iter([None])
    members.touch = lambda site, kind, content: next(lost, content) if (site, kind) == ("west", "describe") else content
    run_members(experiment_for(kits), tmp_path / "out", members, ["west"])
    assert [e["since"] for e in events_of(tmp_path / "out") if e["event"] == "joined"] == [2]


@pytest.mark.parametrize(
    "killed",
    [
        "before it came",
        "when it joined",
        pytest.param("in its first round", marks=pytest.mark.slow),
        "and a state is lost",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    killed: str, expected: Path, kits: Path, images: Path, members: Members, tmp_path: Path
) -> None:
    out, experiment = tmp_path / "out", experiment_for(kits, ROUNDS)
    before = killed == "before it came"
    coming(members, stop=("south", "train", 1) if before else ("west", "train", 2))
    with pytest.MonkeyPatch.context() as patch:
        if killed == "when it joined":  # on disk, and nothing more
            patch.setattr(Membership, "keep_sheets", lambda self: stop() if self.joined else None)
        with pytest.raises(Stopped):
            run_members(experiment, out, members, ["west"])
    again = make_members(kits, images, tmp_path / "state")  # every process was killed
    if killed == "and a state is lost":
        (out / "server" / "00000.safetensors").unlink()
        (out / "server" / "00001.safetensors").unlink()
    run_members(experiment, out, coming(again) if before else again, ["west"] if before else ())
    assert_same(expected, out, tmp_path / "state")
    asked = {event["round"]: "west" in event["requests"] for event in events_of(out) if event["event"] == "begin"}
    assert asked == {1: False, 2: True, 3: True}
    assert "west" in json.loads((out / "federation.json").read_text())["sheet"]["sites"]


def stop() -> None:
    raise Stopped


def test_other_data_of_one_that_joined_are_noticed(kits: Path, images: Path, members: Members, tmp_path: Path) -> None:
    out, experiment = tmp_path / "out", experiment_for(kits, ROUNDS)
    with pytest.raises(Stopped):
        run_members(experiment, out, coming(members, stop=("west", "train", 2)), ["west"])
    again = make_members(kits, images, tmp_path / "state")
    describe = again.workers["west"]._describe
    again.workers["west"]._describe = lambda *given: {**describe(*given), "data": "0" * 64}  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"its data changed since it joined.*west") as caught:
        run_members(experiment, out, again)
    assert caught.value.code == "data-changed"
    del again.workers["west"]  # and it is as needed as all others
    with pytest.raises(RunError, match="west did not come online"):
        run_members(experiment, out, again)
    with pytest.raises(ConfigError) as fixed:
        late_of(out, ["south"])
    assert fixed.value.code == "not-empty"


@pytest.mark.parametrize(
    ("overrides", "late", "where", "code"),
    [
        ((), ["wset"], "--late", "unknown-site"),
        ((), [*SITES], "--late", "late"),
        (("federation.min_replies=3",), ["west"], "--late", "late"),
        (("hold_out=west",), ["west"], "hold_out", "late"),
        (("secure.aggregation=true", "gate.norm=0", "gate.factor=0"), ["west"], "secure.aggregation", "late"),
        (("federation.sampling=groups",), ["west"], "federation.sampling", "late"),
        (
            (
                "method.name=dpfed",
                "method.sigma=1.0",
                "method.noise_seed=1",
                "federation.weights=equal",
                "gate.norm=0",
                "gate.factor=0",
                "privacy.delta=1e-3",
            ),
            ["west"],
            "method.name",
            "late",
        ),
    ],
)
def test_who_cannot_be_late(overrides: tuple[str, ...], late: list[str], where: str, code: str, kits: Path) -> None:
    experiment = experiment_for(kits, *overrides)
    check_late(experiment, SITES, [])
    with pytest.raises(ConfigError) as caught:
        check_late(experiment, SITES, late)
    assert (caught.value.where, caught.value.code) == (where, code)


def test_the_command_refuses_before_anything_is_started(kits: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the extra flower is not installed")
    from confrere.consortium.kit import load
    from confrere.flower.lead import lead

    config = tmp_path / "experiment.toml"
    config.write_text('controls = []\n[method]\nname = "fedopal"\n')
    how: dict[str, Any] = {"host": "", "deadline": 1.0, "patience": 0.0, "watch": 0, "log": None}
    kit = load(kits / "coordinator", "coordinator")
    with pytest.raises(ConfigError, match=r"no site 'wset'.*\n.*'west'"):
        lead(kit, tmp_path / "out", config, [], notify=print, show=print, late=["wset"], **how)
    assert not (kits / "coordinator" / "superlink").exists()


def test_rounds_before_the_last_site_joined_are_not_chosen() -> None:
    """Their mean is over fewer sites."""
    judged = [{"event": "evaluation", "round": r, "criterion": 1.0 / r, "counts": True} for r in (1, 2, 3)]
    assert best_round(judged) == 1
    assert best_round([*judged, {"event": "joined", "site": "west", "since": 2}]) == 2
    assert best_round([*judged, {"event": "joined", "site": "west", "since": 4}]) == 1  # and none was judged since
