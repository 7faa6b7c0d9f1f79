"""Runs that hide who took part: cohorts, debits, budgets, the gate, what verify says, what is refused beforehand."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting")

from method_variants import PRIVATE, VARIANTS
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_sites
from typer.testing import CliRunner

from confrere.choices import FederationChoice, PrivacyChoice
from confrere.cli import app
from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, MissingExtraError, RunError
from confrere.federation.budget import NOT_COVERED, Budget, budget_of, debits_of
from confrere.federation.gate import Gate
from confrere.federation.loop import federate
from confrere.federation.sampling import sample
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.simulated import equip
from confrere.federation.selection import best_round
from confrere.federation.transport import Failure, InProcess
from confrere.job import run_experiment
from confrere.method import Method, Reply, Request, make
from confrere.methods.dpfed import DPFed
from confrere.privacy import epsilon
from confrere.privacy.accounting import _epsilon
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.report.progress import sections
from confrere.tensors import State, digest
from confrere.track import scalars
from confrere.verify import verify

SEEDED = make("dpfed", {"noise_seed": 1, "sigma": 0.01, "cohort": 2.0, "post": 0.0})
SYSTEM = make("dpfed", {"sigma": 0.01, "cohort": 2.0, "post": 0.0})
NONE = 1e-9  # a fraction that draws nobody


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def go(method: Method, folder: Path, *, disk: bool = False, **changes: Any) -> tuple[State, Run]:
    run = Run(folder)
    stores: dict[str, Any] = {name: run.store(name) for name in SITES} if disk else {}
    sites = tiny_sites(method, stores=stores, steps=1)
    plan = tiny_plan(method, **{"every": 9, "rounds": 2, **changes})
    return federate(method, start(method), InProcess(sites), plan, run), run


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def test_poisson_draws_every_site_by_itself_with_its_chance() -> None:
    """600 rounds of six sites at 0.3: rates within four standard deviations, pairs independent, some rounds empty."""
    sites, rounds = [f"s{number}" for number in range(6)], 600
    drawn = [sample(sites, 0.3, 5, r, "poisson") for r in range(rounds)]
    for site in sites:
        assert abs(sum(site in d for d in drawn) / rounds - 0.3) < 4 * math.sqrt(0.3 * 0.7 / rounds)
    both = sum("s0" in d and "s1" in d for d in drawn) / rounds
    assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / rounds)
    assert abs(sum(not d for d in drawn) / rounds - 0.7**6) < 4 * math.sqrt(0.7**6 / rounds)
    assert drawn == [sample(sites, 0.3, 5, r, "poisson") for r in range(rounds)]
    assert drawn != [sample(sites, 0.3, 6, r, "poisson") for r in range(rounds)]
    assert sample(sites, 1.0, 0, 1, "poisson") == sites
    # Who else can be asked changes nothing for a site.
    assert [[s for s in d if s != "s0"] for d in drawn] == [
        sample(sites[1:], 0.3, 5, r, "poisson") for r in range(rounds)
    ]


def test_a_round_without_sites_releases_noise_and_is_in_the_journal(tmp_path: Path) -> None:
    final, run = go(SEEDED, tmp_path, sampling="poisson", fraction=NONE, min_replies=3)
    assert [(e["round"], e["sites"], e["averaged"]) for e in of(run, "round")] == [(1, {}, True), (2, {}, True)]
    assert len(debits_of(run)) == 2
    assert int(final["releases"]["count"]) == 2
    assert digest({"": final["shared"]}) != digest({"": start(SEEDED)["shared"]})
    assert not of(run, "failure")


@pytest.mark.parametrize("name", ["fedit", "ifca", "fedacs", "fedadam"])
def test_a_round_without_sites_changes_nothing_where_nothing_is_hidden(name: str, tmp_path: Path) -> None:
    method = VARIANTS[name]
    final, run = go(method, tmp_path, sampling="poisson", fraction=NONE)
    assert digest(final) == digest(start(method))
    assert [e["sites"] for e in of(run, "round")] == [{}, {}]
    assert not debits_of(run)


def test_too_few_replies_suppress_no_release(tmp_path: Path) -> None:
    """Else whether there was one would tell how many sites took part."""
    _, run = go(SEEDED, tmp_path / "private", sampling="poisson", fraction=0.5, min_replies=3, rounds=4)
    assert all(event["averaged"] for event in of(run, "round"))
    assert {len(event["sites"]) for event in of(run, "round")} & {1, 2}
    _, run = go(VARIANTS["fedit"], tmp_path / "plain", sampling="poisson", fraction=0.5, min_replies=3, rounds=4)
    assert not all(event["averaged"] for event in of(run, "round"))


def test_when_all_sites_fail_a_run_ends_without_a_debit(tmp_path: Path) -> None:
    class Dead(InProcess):
        def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
            return [Failure(name, "no answer") for name in requests]

    run = Run(tmp_path)
    with pytest.raises(RunError, match="0 of 3"):
        federate(SEEDED, start(SEEDED), Dead(tiny_sites(SEEDED)), tiny_plan(SEEDED, sampling="poisson"), run)
    assert not debits_of(run)


@dataclass(frozen=True, kw_only=True)
class Killed(DPFed):
    """Ends its process, so to say, when it is about to release."""

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        if int(server["releases"]["count"]) == 1:
            raise KeyboardInterrupt
        return super().aggregate(server, replies)


def killed(method: DPFed) -> DPFed:
    return Killed(**{field.name: getattr(method, field.name) for field in fields(method)})


@pytest.mark.parametrize("method", [SEEDED, SYSTEM], ids=["seeded", "system"])
def test_a_kill_between_debit_and_release_costs_a_second_debit(method: DPFed, tmp_path: Path) -> None:
    whole, _ = go(method, tmp_path / "whole", disk=True)
    with pytest.raises(KeyboardInterrupt):
        go(killed(method), tmp_path / "cut", disk=True)
    run = Run(tmp_path / "cut")
    assert [event["round"] for event in debits_of(run)] == [1, 2]  # on disk before anything was released
    assert run.last_round() == 1
    final, run = go(method, tmp_path / "cut", disk=True)
    assert [event["round"] for event in debits_of(run)] == [1, 2, 2]
    assert len(of(run, "debit")) == 2  # what stands does not count, what was released does
    assert (digest(final) == digest(whole)) == bool(method.noise_seed)
    book = Budget(delta=1e-3, limit=0.0, fraction=0.5, poisson=True, sites=3)
    said = book.record(method, run)
    assert said["debits"] == 3
    assert said["epsilon"] == pytest.approx(epsilon(0.01, rounds=3, delta=1e-3, sampling="all"))


def test_after_a_lost_state_sites_answer_to_the_new_noise(tmp_path: Path) -> None:
    """Their stored replies belong to noise that is gone: sent once more, the gate would refuse them all."""
    method = replace(SYSTEM, sigma=2.0, clip=0.01)
    go(method, tmp_path, disk=True, rounds=3)
    Run(tmp_path).server_file(2).write_bytes(b"lost")
    Run(tmp_path).server_file(3).write_bytes(b"lost")
    _, run = go(method, tmp_path, disk=True, rounds=3)
    assert [(e["round"], sorted(e["sites"])) for e in of(run, "round")] == [(r, list(SITES)) for r in (1, 2, 3)]
    assert [event["round"] for event in debits_of(run)] == [1, 2, 3, 2, 3]


def test_the_budget_ends_a_run_before_the_round_that_would_exceed_it(tmp_path: Path) -> None:
    method = replace(SEEDED, sigma=4.0)
    limit = epsilon(4.0, rounds=2, delta=1e-3, sampling="all") + 1e-3
    book = Budget(delta=1e-3, limit=limit, fraction=1.0, poisson=False, sites=3)
    _, run = go(method, tmp_path, rounds=5, budget=book)
    assert (run.last_round(), len(debits_of(run))) == (2, 2)
    (stop,) = of(run, "stop")
    assert stop["round"] == 2
    assert "2 releases have spent the budget" in stop["reason"]
    assert book.record(method, run)["epsilon"] <= limit
    _, run = go(method, tmp_path, rounds=5, budget=book)  # finished: it does not go on
    assert (run.last_round(), len(of(run, "stop"))) == (2, 1)


def test_a_budget_that_was_spent_before_any_round_was_committed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append({"event": "debit", "round": 1, **replace(SEEDED, sigma=4.0).release()})
    limit = epsilon(4.0, rounds=1, delta=1e-3, sampling="all") + 1e-3
    book = Budget(delta=1e-3, limit=limit, fraction=1.0, poisson=False, sites=3)
    with pytest.raises(RunError) as raised:
        go(replace(SEEDED, sigma=4.0), tmp_path, budget=book)
    assert raised.value.code == "privacy"
    assert len(debits_of(run)) == 1


def test_numbers_of_updates_without_the_noise_are_shown_nowhere(tmp_path: Path) -> None:
    """Cosines of two hospitals' updates, or what their mean was before the noise, are covered by no epsilon."""
    for name, method in (("hidden", SEEDED), ("plain", make("fedit"))):
        _, run = go(method, tmp_path / name, rounds=2)
        events = run.events()
        shown = [e["diagnostics"][key] for e in of(run, "round") for key in ("similarity", "aggregation_error")]
        assert len(shown) == 4
        summary, tags = sections(events, {}), {tag for e in events if e["event"] == "round" for tag, _ in scalars(e)}
        found = bool(summary["similarity"]), bool(summary["aggregation_error"]), "aggregation_error" in tags
        assert found == (name == "plain",) * 3
        assert any(value is not None for value in shown) == (name == "plain")
    assert any("run directory" in part and "digests" in part for part in NOT_COVERED)


def test_the_gate_refuses_a_change_that_was_not_clipped() -> None:
    """By itself, whatever others send; what rounding adds to a clipped change is let in."""
    site = tiny_sites(SEEDED)["a"]
    request = Request(kind="train", round=1, state=SEEDED.broadcast(start(SEEDED), "a"))
    honest = site.handle(request)
    gate = Gate(method=SEEDED, norm=0.0, factor=0.0)
    for factor, fine in ((1.0, True), (1.0005, True), (1.01, False), (-1.0, True), (1e3, False)):
        x = request.state["shared"]
        length = math.sqrt(
            sum(float((t.double() - x[n].double()).square().sum()) for n, t in honest.state["shared"].items())
        )
        times = factor * SEEDED.clip / length
        sent = {
            n: (x[n].double() + times * (t.double() - x[n].double())).to(t.dtype)
            for n, t in honest.state["shared"].items()
        }
        replies, failures = gate.admit({"a": request}, [replace(honest, state={"shared": sent})])
        assert bool(replies) == fine, factor
        assert [failed.code for failed in failures] == ([] if fine else ["update-size"])


def test_secure_aggregation_gives_what_is_given_in_the_clear(tmp_path: Path) -> None:
    plain, _ = go(SEEDED, tmp_path / "plain")
    sites = tiny_sites(SEEDED, steps=1)
    secure = Secure(roster=equip(sites, None, threshold=0, clip=0.0), threshold=0)
    run, gate = Run(tmp_path / "masked"), Gate(method=SEEDED, norm=0.0, factor=0.0)
    plan = tiny_plan(SEEDED, rounds=2, every=9)
    masked = federate(SEEDED, start(SEEDED), InProcess(sites), plan, run, gate=gate, defence=secure)
    for name, value in plain["shared"].items():
        assert float((value - masked["shared"][name]).abs().max()) < 1e-4
    assert len(debits_of(run)) == 2
    assert all(event["averaged"] for event in of(run, "round"))


def test_the_last_round_is_kept_whatever_validation_images_say() -> None:
    scores = (0.9, 0.5, 0.1)
    events = [{"event": "evaluation", "round": r, "criterion": c} for r, c in enumerate(scores, 1)]
    events += [{"event": "round", "round": r} for r in (1, 2, 3)]
    assert best_round(events) == 1
    assert best_round([*events, {"event": "debit", "round": 1}]) == 3
    assert [SEEDED.may_stop(r, 3) for r in (1, 2, 3)] == [False, False, True]


def accounted(**changes: Any) -> Budget:
    return replace(Budget(delta=1e-3, limit=0.0, fraction=0.5, poisson=True, sites=10), **changes)


def debits(*rounds: int, sigma: float = 2.0) -> list[dict[str, Any]]:
    return [{"round": r, "sigma": sigma, "seeded": False} for r in rounds]


def test_the_printed_epsilon_is_without_amplification_and_the_other_is_beside_it() -> None:
    book, spent = accounted(), debits(*range(1, 51))
    assert book.spent(spent) == pytest.approx(16.46, abs=0.01)
    assert book.conditional(spent[:2]) == epsilon(2.0, rounds=2, delta=1e-3, rate=0.5)
    assert accounted(poisson=False).conditional(spent) is None
    assert accounted(fraction=1.0).conditional(spent) is None
    assert accounted(poisson=False).neighbours == "replace-one"
    assert accounted(poisson=False).spent(spent) == pytest.approx(46.02, abs=0.01)
    assert accounted(poisson=False, fraction=1.0).spent(spent) == pytest.approx(16.46, abs=0.01)
    assert (book.expected, accounted(poisson=False, fraction=0.33).expected) == (5.0, 3.0)
    # One round done twice draws the same sites twice: more than two rounds that each draw anew.
    again, anew = accounted().conditional(debits(1, 1)), accounted().conditional(debits(1, 2))
    assert again is not None
    assert anew is not None
    assert anew < again <= accounted().spent(debits(1, 1))
    assert book.spent([]) == 0.0
    assert math.isinf(book.spent(debits(1, sigma=0.0)))
    mixed = [*debits(1, sigma=2.0), *debits(2, sigma=1.0)]
    assert book.spent(debits(1, 2, sigma=2.0)) < book.spent(mixed) < book.spent(debits(1, 2, sigma=1.0))


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(folder / "cache"))
        make_microscopy(folder / "data", seed=3, sites=3, images=(16, 18, 20), size=32)
        yield folder / "data"


def chosen(path: object, method: dict[str, Any] | None = None, **changes: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {key: {**PRIVATE.get(key, {}), **changes.get(key, {})} for key in {*PRIVATE, *changes}}
    return {
        "path": str(path),
        "backbone": {"name": "test-vit"},
        "adapter": {"blocks": 2, "rank": 4},
        "rounds": 2,
        "threads": 1,
        "train": {"steps": 1, "batch_size": 4},
        "controls": [],
        "method": {"name": "dpfed", **(method or {})},
        **tables,
    }


def test_an_experiment_with_noise_of_the_system_from_data_to_verify(hospitals: Path, tmp_path: Path) -> None:
    federation = {"sampling": "poisson", "fraction": 0.5}
    run_experiment(validate(chosen(hospitals, federation=federation)), tmp_path / "run")
    said = read_json(tmp_path / "run" / "results.json")["privacy"]
    assert (said["unit"], said["neighbours"], said["debits"], said["delta"]) == ("hospital", "add-remove", 2, 1e-3)
    assert (said["sigma"], said["clip"], said["expected_sites"]) == (2.0, 0.3, 1.5)
    assert said["epsilon"] == pytest.approx(epsilon(2.0, rounds=2, delta=1e-3, sampling="all"))
    assert said["conditional_epsilon"] < said["epsilon"]
    assert "seed" in said["condition"]
    assert not said["simulation"]
    assert f"epsilon {said['epsilon']:.2f} at delta 0.001; unit: one whole hospital" in said["statement"]
    assert any("tuning" in part for part in said["not_covered"])
    assert float(Run(tmp_path / "run").server(2)["releases"]["cohort"]) == 1.5
    (part,) = verify(tmp_path / "run")
    assert (part.rounds, part.recomputed, part.unseen) == (2, 0, True)
    assert "not reproducible" in part.sentence()


def test_an_experiment_with_seeded_noise_is_a_simulation_and_computed_again(hospitals: Path, tmp_path: Path) -> None:
    run_experiment(validate(chosen(hospitals, {"noise_seed": 3})), tmp_path / "run")
    said = read_json(tmp_path / "run" / "results.json")["privacy"]
    assert said["simulation"]
    assert said["statement"].startswith("Simulation, no privacy")
    assert said["conditional_epsilon"] is None
    (part,) = verify(tmp_path / "run")
    assert (part.recomputed, part.unseen) == (2, False)
    state = Run(tmp_path / "run").server_file(2)
    state.write_bytes(Run(tmp_path / "run").server_file(1).read_bytes())
    with pytest.raises(RunError):
        verify(tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("federation.weights", {"federation": {"weights": "images"}}),
        ("federation.rule", {"federation": {"rule": "median"}}),
        ("federation.canonical", {"federation": {"canonical": True}}),
        ("gate.norm", {"gate": {"norm": 8.0}}),
        ("gate.factor", {"gate": {"factor": 8.0}}),
        ("selection.patience", {"selection": {"patience": 2}}),
        ("privacy.delta", {"privacy": {"delta": 0.0}}),
        ("secure.aggregation", {"secure": {"aggregation": True}, "federation": {"sampling": "poisson"}}),
    ],
)
def test_what_epsilon_would_not_cover_is_refused(where: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(chosen("x", **changes))
    assert (raised.value.code, raised.value.where) == ("privacy", where)
    validate(chosen("x"))
    validate(chosen("x", secure={"aggregation": True}))


def test_a_budget_where_nothing_is_hidden_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        validate({"path": "x", "method": "fedit", "privacy": {"epsilon": 3.0, "delta": 1e-3}})
    assert raised.value.code == "privacy"


def test_budgets_that_protect_nobody_or_cover_no_round_are_refused() -> None:
    federation = FederationChoice()
    assert budget_of(make("fedit"), federation, PrivacyChoice(), 3) is None
    for choice, where in (({"delta": 0.4}, "privacy.delta"), ({"delta": 1e-3, "epsilon": 0.5}, "privacy.epsilon")):
        with pytest.raises(ConfigError) as raised:
            budget_of(make("dpfed"), federation, PrivacyChoice(**choice), 3)  # type: ignore[arg-type]
        assert (raised.value.code, raised.value.where) == ("privacy", where)
    with pytest.raises(ConfigError) as raised:
        make("dpfed").aggregate(start(make("dpfed")), [])
    assert raised.value.code == "privacy"  # nobody said how many sites there are


def test_without_dp_accounting_a_run_does_not_begin(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    _epsilon.cache_clear()
    with pytest.raises(MissingExtraError, match=r"confrere\[dp\]"):
        run_experiment(validate(chosen(hospitals)), tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists()


ASKED = ["epsilon", "--sigma", "2", "--fraction", "0.5", "--rounds", "50", "--delta", "1e-3", "--sites", "10"]


def test_the_command_prints_both_epsilons_the_noise_and_a_verdict() -> None:
    done = CliRunner().invoke(app, [*ASKED, "--parameters", "73728"])
    assert done.exit_code == 0, done.output
    for part in ("epsilon 16.46", "epsilon 6.98", "seed", "109", "out of reach", "noise-drowns"):
        assert part in done.output
    done = CliRunner().invoke(app, [*ASKED, "--parameters", "2", "--json"])  # the same sum, kept
    found = json.loads(done.output)
    assert found["epsilon"] == pytest.approx(16.46, abs=0.01)
    assert found["conditional_epsilon"] == pytest.approx(6.98, abs=0.01)
    assert found["noise_to_clip"] == pytest.approx(2 * math.sqrt(2) / 5)
    assert (found["warning"], "can work" in found["verdict"]) == ("", True)


def test_the_command_refuses_a_delta_that_protects_nobody_and_finds_sigma() -> None:
    with pytest.raises(ConfigError) as raised:
        CliRunner().invoke(
            app, [*ASKED[:-4], "--delta", "0.2", *ASKED[-2:], "--parameters", "9"], catch_exceptions=False
        )
    assert raised.value.code == "privacy"
    few = ["epsilon", "--sigma", "2", "--rounds", "3", "--delta", "1e-3", "--sites", "10", "--parameters", "9"]
    found = json.loads(CliRunner().invoke(app, [*few, "--target", "2", "--json"]).output)
    sigma = found["sigma_for_target"]
    assert (
        epsilon(sigma, rounds=3, delta=1e-3, sampling="all")
        <= 2
        < epsilon(sigma - 0.02, rounds=3, delta=1e-3, sampling="all")
    )
    assert found["conditional_sigma_for_target"] == sigma  # everybody takes part
