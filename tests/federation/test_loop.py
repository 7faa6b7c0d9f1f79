"""The round loop under failure: sites that diverge, too few answers, early ends, resumption; its diagnostics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_run, tiny_sites

from confrere.adapters.algebra import pairs, product
from confrere.errors import RunError
from confrere.federation.diagnostics import aggregation_error, site_similarity
from confrere.federation.gate import Gate
from confrere.federation.loop import Plan, federate
from confrere.federation.sampling import sample
from confrere.federation.selection import best_round, stopped
from confrere.federation.selection import should_stop as stop_after
from confrere.federation.site import Site
from confrere.federation.transport import Failure, InProcess
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.record.run import Run
from confrere.tensors import State, digest, weighted_mean


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def go(method: Method, run: Run, sites: dict[str, Site] | None = None, gate: Gate | None = None, **plan: Any) -> State:
    transport = InProcess(sites or tiny_sites(method))
    return federate(method, start(method), transport, tiny_plan(method, **plan), run, gate=gate)


def should_stop(method: Method, events: list[dict[str, Any]], plan: Plan, round_: int) -> str:
    return stop_after(method, events, round_, rounds=plan.rounds, patience=plan.patience)


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for e in run.events() if e["event"] == kind]


def with_learning_rate_at_b(method: Method, lr: float, steps: int) -> dict[str, Site]:
    sites = tiny_sites(method)
    sites["b"].settings = replace(sites["b"].settings, lr=lr, steps=steps)
    return sites


@pytest.mark.parametrize("name", ["fedit", "fedopal", "local"])
@pytest.mark.parametrize("lr", [1e6, 1e18, 1e30])
def test_a_diverging_site_is_a_failure_and_the_round_goes_on(tmp_path: Path, name: str, lr: float) -> None:
    method = make(name)
    run = Run(tmp_path)
    final = go(method, run, with_learning_rate_at_b(method, lr, 10), rounds=2)
    assert [(e["round"], e["site"]) for e in of(run, "failure")] == [(1, "b"), (2, "b")]
    assert all("lower train.lr" in e["reason"] for e in of(run, "failure"))
    assert [set(e["sites"]) for e in of(run, "round")] == [{"a", "c"}] * 2
    assert [set(e["sites"]) for e in of(run, "evaluation")] == [set(SITES)] * 2  # it still judges, untrained
    assert all(float(t.abs().max()) < 1 for t in final["shared"].values())


def test_huge_but_finite_weights_of_the_largest_rate_allowed_do_no_harm(tmp_path: Path) -> None:
    method = make("fedopal")  # an experiment allows train.lr up to 1
    run = Run(tmp_path)
    go(method, run, with_learning_rate_at_b(method, 1.0, 30), Gate(method=method, norm=0, factor=0), rounds=2)
    assert run.last_round() == 2
    assert not of(run, "failure")


@pytest.mark.parametrize("name", ["fedit", "fedopal"])
def test_a_site_whose_weights_explode_unnoticed_does_not_break_the_others(tmp_path: Path, name: str) -> None:
    method, run = make(name), Run(tmp_path)
    go(method, run, with_learning_rate_at_b(method, 1e6, 3), rounds=2)
    assert [(e["round"], sorted(e["sites"])) for e in of(run, "round")] == [(1, ["a", "c"]), (2, ["a", "c"])]
    assert {(e["round"], e["site"]) for e in of(run, "failure")} == {(1, "b"), (2, "b")}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_site_without_memory_is_left_out(tmp_path: Path, error: Exception) -> None:
    class Full(Site):
        def handle(self, request: Request) -> Reply:
            if request.kind == "train":
                raise error
            return super().handle(request)

    method, run = make("fedit"), Run(tmp_path)
    sites = tiny_sites(method)
    sites["b"].__class__ = Full
    go(method, run, sites, rounds=1)
    assert [(e["site"], e["code"]) for e in of(run, "failure")] == [("b", "out-of-memory")]
    assert "batch_size" in of(run, "failure")[0]["reason"]


def test_a_site_that_explodes_in_its_last_step_is_no_traceback(tmp_path: Path) -> None:
    """The loss was still finite; the weights are too, what they predict is not a number."""
    method = make("fedopal")
    with contextlib.suppress(RunError):
        go(method, Run(tmp_path), with_learning_rate_at_b(method, 1e30, 1), rounds=2)


def test_a_site_that_cannot_judge_is_in_the_journal(tmp_path: Path) -> None:
    class Blind(InProcess):
        def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
            return [
                Failure(n, "no answer") if r.kind == "evaluate" and n == "b" else self._ask(n, r)
                for n, r in requests.items()
            ]

    method, run = make("fedit"), Run(tmp_path)
    federate(method, start(method), Blind(tiny_sites(method)), tiny_plan(method, rounds=1), run)
    assert [(e["site"], e["reason"]) for e in of(run, "failure")] == [("b", "no answer")]
    assert set(of(run, "evaluation")[0]["sites"]) == {"a", "c"}


def test_a_loss_that_is_no_number_at_one_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Learner], Any] = Learner._objective

    def broken(self: Learner) -> Any:
        return real(self) if self.site != "c" or self.round == 1 else lambda x, y: x.sum() * float("nan")

    monkeypatch.setattr(Learner, "_objective", broken)
    method = make("fedit")
    run = Run(tmp_path)
    go(method, run, rounds=3)
    assert [(e["round"], e["site"]) for e in of(run, "failure")] == [(2, "c"), (3, "c")]
    assert "site c, round 2, step 1" in of(run, "failure")[0]["reason"]
    assert [set(e["sites"]) for e in of(run, "round")] == [{"a", "b", "c"}, {"a", "b"}, {"a", "b"}]
    # Its state stands at round 1, and it still judges with it.
    assert [set(e["sites"]) for e in of(run, "evaluation")] == [set(SITES)] * 3


def test_all_failing_names_round_and_sites_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make("fedit")
    run, whole = Run(tmp_path / "cut"), Run(tmp_path / "whole")
    final = go(method, whole)
    real: Callable[[Learner], Any] = Learner._objective
    with monkeypatch.context() as patch:
        patch.setattr(
            Learner, "_objective", lambda self: real(self) if self.round < 3 else lambda x, y: x.sum() * float("nan")
        )
        with pytest.raises(RunError, match=r"0 of 3 sites answered: a: [\s\S]*b: [\s\S]*c: ") as error:
            go(method, run)
    assert error.value.where == "round 3"
    assert run.last_round() == 2
    assert digest(run.server(2)) == digest(whole.server(2))
    transport = InProcess(tiny_sites(method, stores={n: run.store(n) for n in SITES}))
    resumed = federate(method, start(method), transport, tiny_plan(method), run)
    assert digest(resumed) == digest(final)


class Absent(InProcess):
    """Sites that do not answer in some rounds."""

    def __init__(self, sites: Mapping[str, Site], gone: Mapping[int, tuple[str, ...]]) -> None:
        super().__init__(sites)
        self.gone = gone

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        return [
            Failure(n, "no answer") if r.kind == "train" and n in self.gone.get(r.round, ()) else self._ask(n, r)
            for n, r in requests.items()
        ]


@pytest.mark.parametrize("gone", [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")])
def test_the_aggregate_is_the_mean_of_those_present(tmp_path: Path, gone: tuple[str, ...]) -> None:
    method = make("fedit")
    server = start(method)
    transport = Absent(tiny_sites(method), {1: gone})
    final = federate(method, server, transport, tiny_plan(method, rounds=1), Run(tmp_path))
    twins = tiny_sites(method)
    replies = [
        twins[n].handle(Request(kind="train", round=1, state=method.broadcast(server, n)))
        for n in SITES
        if n not in gone
    ]
    expected = weighted_mean([(r.weight, r.state["shared"]) for r in replies])
    assert digest({"shared": final["shared"]}) == digest({"shared": expected})


@pytest.mark.parametrize("name", ["fedit", "fedopal"])
def test_a_round_below_the_quorum_leaves_the_server_and_the_next_goes_on(tmp_path: Path, name: str) -> None:
    method = make(name)
    run = Run(tmp_path)
    transport = Absent(tiny_sites(method), {2: ("a",), 3: ("a", "b")})
    federate(method, start(method), transport, tiny_plan(method, rounds=4, min_replies=3), run)
    states = [digest(run.server(r)) for r in range(5)]
    assert states[1] == states[2] == states[3]
    assert len({states[0], states[1], states[4]}) == 3
    said = {e["round"]: e["reason"] for e in of(run, "failure") if e["site"] is None}
    assert {r: text[:6] for r, text in said.items()} == {2: "2 of 3", 3: "1 of 3"}
    assert len(of(run, "round")) == 4


def test_exactly_the_quorum_is_enough(tmp_path: Path) -> None:
    method = make("fedit")
    run = Run(tmp_path)
    federate(
        method,
        start(method),
        Absent(tiny_sites(method), {1: ("a",)}),
        tiny_plan(method, rounds=1, min_replies=2),
        run,
    )
    assert digest(run.server(0)) != digest(run.server(1))


@given(
    count=st.integers(1, 12), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 2**31 - 1), round_=st.integers(1, 99)
)
def test_a_cohort_is_sorted_distinct_deterministic_and_of_its_size(
    count: int, fraction: float, seed: int, round_: int
) -> None:
    names = [f"site{k}" for k in range(count)]
    chosen = sample(names, fraction, seed, round_)
    assert chosen == sample(names, fraction, seed, round_)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(names)
    assert len(chosen) == max(1, round(fraction * count))


def test_over_many_rounds_every_site_takes_its_share() -> None:
    names = [f"s{k}" for k in range(5)]
    counts = {n: sum(n in sample(names, 0.4, 3, r) for r in range(400)) for n in names}
    assert all(120 <= c <= 200 for c in counts.values())  # 160 expected, sd 10


def test_only_the_cohort_trains_and_only_the_judges_judge(tmp_path: Path) -> None:
    method = make("fedit")
    run = Run(tmp_path)
    go(method, run, rounds=3, fraction=0.34, train=("a", "b"), judge=("c",), every=2)
    assert all(len(e["sites"]) == 1 and set(e["sites"]) <= {"a", "b"} for e in of(run, "round"))
    assert [(e["round"], set(e["sites"])) for e in of(run, "evaluation")] == [(2, {"c"}), (3, {"c"})]


def test_the_same_events_apart_from_time(tmp_path: Path) -> None:
    method = make("fedopal")

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    runs = [Run(tmp_path / name) for name in "xy"]
    for run in runs:
        go(method, run, rounds=2)
    assert timeless(runs[0].events()) == timeless(runs[1].events())


def test_listeners_hear_what_the_journal_holds_once_it_is_there(tmp_path: Path) -> None:
    method = make("fedit")
    run = Run(tmp_path)
    heard: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        heard.append(event)
        assert event in run.events()

    federate(method, start(method), InProcess(tiny_sites(method)), tiny_plan(method, rounds=2), run, listen)
    assert heard == [e for e in run.events() if e["event"] != "begin"]  # written ahead, of no interest to a listener


def judged(criteria: list[float | None], means: list[float | None] | None = None) -> list[dict[str, Any]]:
    means = means or [0.5] * len(criteria)
    return [
        {"event": "evaluation", "round": r, "mean": m, "criterion": c}
        for r, (c, m) in enumerate(zip(criteria, means, strict=True), 1)
    ]


levels = st.sampled_from([None, 0.0, 0.25, 0.5, 0.5000001, 1.0])


@given(criteria=st.lists(levels, min_size=1, max_size=8), means=st.data())
def test_the_best_round_is_the_earliest_of_the_best_criterion(
    criteria: list[float | None], means: st.DataObject
) -> None:
    scores = [means.draw(st.floats(0, 1)) for _ in criteria]
    events = [{"event": "round", "round": r} for r in range(1, len(criteria) + 1)] + judged(criteria, list(scores))
    known = [c for c in criteria if c is not None]
    expected = criteria.index(max(known)) + 1 if known else len(criteria)
    assert best_round(events) == expected
    assert best_round(list(reversed(events))) == expected


def test_without_any_round_there_is_none_to_choose() -> None:
    assert best_round([]) == 0


@given(criteria=st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=8), patience=st.integers(1, 4))
def test_patience_counts_judgements_since_the_best(criteria: list[float], patience: int) -> None:
    method, plan = make("fedit"), tiny_plan(make("fedit"), rounds=99, patience=patience)
    ends = next((r for r in range(1, len(criteria) + 1) if should_stop(method, judged([*criteria[:r]]), plan, r)), None)
    best, since, expected = -1.0, 0, None
    for r, c in enumerate(criteria, 1):
        best, since = (c, 0) if c > best else (best, since + 1)
        if since >= patience and expected is None:
            expected = r
    assert ends == expected


def test_no_patience_and_the_last_round_never_stop() -> None:
    events = judged([0.9, 0.1, 0.1, 0.1])
    assert not should_stop(make("fedit"), events, tiny_plan(make("fedit"), rounds=9, patience=0), 4)
    assert not should_stop(make("fedit"), events, tiny_plan(make("fedit"), rounds=4, patience=1), 4)
    assert should_stop(make("fedit"), events, tiny_plan(make("fedit"), rounds=5, patience=1), 4)


@pytest.mark.parametrize("rounds", [2, 3, 7, 10, 30])
@pytest.mark.parametrize("finetune", [0.01, 0.3, 0.99])
def test_fine_tuning_is_never_stopped_before_it_began(rounds: int, finetune: float) -> None:
    method = make("fedit-ft", {"finetune": finetune})
    plan = tiny_plan(method, rounds=rounds, patience=1)
    shared = method.shared_rounds(rounds)  # type: ignore[attr-defined]
    assert 1 <= shared < rounds
    for round_ in range(1, rounds + 1):
        said = should_stop(method, judged([0.9] + [0.1] * (round_ - 1)), plan, round_)
        assert not (said and round_ <= shared)


def test_judgements_of_the_shared_rounds_do_not_end_fine_tuning() -> None:
    method = make("fedit-ft")  # 10 rounds: 7 shared
    plan = tiny_plan(method, rounds=10, patience=1)
    events = [{**e, "counts": method.may_stop(e["round"], 10)} for e in judged([0.9] * 7 + [0.2, 0.1])]
    assert not should_stop(method, events[:8], plan, 8)
    assert should_stop(method, events, plan, 9)
    assert best_round(events) == 8  # the better rounds before are those of another model
    assert best_round(events[:5]) == 1  # stopped by hand before fine-tuning: the best there is


def test_a_run_that_cannot_improve_still_fine_tunes_and_resuming_adds_nothing(tmp_path: Path) -> None:
    method = make("fedit-ft")  # 10 rounds: 7 shared, 3 of fine-tuning
    run = Run(tmp_path)
    go(method, run, tiny_sites(method, rounds=10, lr=0.0, steps=1), rounds=10, patience=1)
    assert run.last_round() == 9
    assert stopped(run.events())
    bytes_before = run.events_file.read_bytes()
    sites = tiny_sites(method, rounds=10, lr=0.0, steps=1)
    final = go(method, run, sites, rounds=10, patience=1)
    assert run.events_file.read_bytes() == bytes_before
    assert digest(final) == digest(run.server(9))
    assert all(s.store.before(99) is None for s in sites.values())  # nobody was asked


def test_a_finished_run_asks_nobody(tmp_path: Path) -> None:
    method = make("fedit")
    run = Run(tmp_path)
    final = go(method, run, rounds=2)
    sites = tiny_sites(method)
    assert digest(go(method, run, sites, rounds=2)) == digest(final)
    assert all(s.store.before(99) is None for s in sites.values())


def replies_of(method: Method, seeds: tuple[int, ...], weights: tuple[float, ...]) -> tuple[State, list[Reply]]:
    server = start(method)
    replies = []
    for k, (seed, weight) in enumerate(zip(seeds, weights, strict=True)):
        g = torch.Generator().manual_seed(seed)
        sent = {n: t + torch.randn(t.shape, generator=g) for n, t in server["shared"].items()}
        replies.append(Reply(site=f"s{k}", round=1, state={"shared": sent}, weight=weight))
    return server, replies


@pytest.mark.parametrize("aggregation", ["factor", "svd"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 1.0, 2.0), (1e-3, 1e3)])
def test_the_error_of_averaging_is_that_of_full_matrices(aggregation: str, weights: tuple[float, ...]) -> None:
    method = make("fedopal", {"aggregation": aggregation})
    server, replies = replies_of(method, tuple(range(len(weights))), weights)
    merged = method.aggregate(server, replies)["shared"]
    error = size = 0.0
    for layer, (a, b) in pairs(merged, "general").items():
        mean = sum(
            r.weight / sum(weights) * product(tuple(t.double() for t in pairs(r.state["shared"], "general")[layer]))
            for r in replies
        )
        error += float((mean - product((a.double(), b.double()))).square().sum())
        size += float(torch.as_tensor(mean).square().sum())
    assert aggregation_error(merged, replies) == pytest.approx((error / size) ** 0.5, rel=1e-3, abs=1e-4)


def test_without_updates_there_is_no_error_and_no_similarity() -> None:
    method = make("fedit")
    server = start(method)
    silent = [Reply(site=s, round=1) for s in SITES]
    still = [Reply(site=s, round=1, state={"shared": server["shared"]}) for s in SITES]
    assert aggregation_error(server["shared"], silent) is None
    assert site_similarity(server["shared"], silent) is None
    assert aggregation_error(server["shared"], still) is None  # B is zero everywhere
    assert site_similarity(server["shared"], still) is None
    assert site_similarity(server["shared"], replies_of(method, (1,), (1.0,))[1]) is None


def test_similarity_is_a_cosine_matrix() -> None:
    method = make("fedit")
    server, replies = replies_of(method, (1, 2, 1), (1.0, 7.0, 3.0))
    found = site_similarity(server["shared"], replies)
    assert found is not None
    matrix = torch.tensor(found["matrix"])
    assert found["sites"] == ["s0", "s1", "s2"]
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3), atol=1e-4, rtol=0)
    assert float(matrix[0, 2]) == pytest.approx(1.0, abs=1e-4)  # equal updates, whatever their weight
    flat = [torch.cat([(r.state["shared"][n] - t).flatten() for n, t in server["shared"].items()]) for r in replies]
    expected = torch.nn.functional.cosine_similarity(flat[0].double(), flat[1].double(), dim=0)
    assert float(matrix[0, 1]) == pytest.approx(float(expected), abs=1e-4)


def test_the_journal_is_strict_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    go(make("fedopal"), run, rounds=2)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in run.events_file.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_local_training_sends_nothing_and_needs_no_server(tmp_path: Path) -> None:
    tiny_run(make("local"), tmp_path)
    for event in Run(tmp_path).events():
        if event["event"] == "round":
            assert all(s["sent_bytes"] == s["received_bytes"] == 0 for s in event["sites"].values())


def test_a_round_whose_sampled_sites_are_all_silent_is_lost_not_the_run(tmp_path: Path) -> None:
    method, run = make("fedit"), Run(tmp_path)
    sites = tiny_sites(method)
    plan = tiny_plan(method, rounds=6, fraction=0.34)
    asked = [sample(SITES, 0.34, plan.seed, r) for r in range(1, 7)]
    assert ["b"] in asked
    assert asked != [["b"]] * 6
    federate(method, start(method), Absent(sites, {r: ("b",) for r in range(1, 7)}), plan, run)
    assert [sorted(e["sites"]) for e in of(run, "round")] == [[] if who == ["b"] else who for who in asked]
    for r, who in enumerate(asked, 1):
        assert (digest(run.server(r)) == digest(run.server(r - 1))) == (who == ["b"])
    lost = [e["round"] for e in of(run, "failure") if e["site"] is None]
    assert lost == [r for r, who in enumerate(asked, 1) if who == ["b"]]


def test_validation_messages_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    go(make("fedit"), run, rounds=2, every=2)
    (judged,) = of(run, "evaluation")
    trained = of(run, "round")[-1]["sites"]
    assert judged["received_bytes"] == {name: trained[name]["received_bytes"] for name in SITES}
