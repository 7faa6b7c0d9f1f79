"""The round loop and the site: refusals, failures, quorum, sampling, choice of the round, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_federation import SITES, initial_params, tiny_backbone, tiny_plan, tiny_run, tiny_sites

from confrere.adapters.algebra import pairs, product
from confrere.errors import RunError, UpdateRefusedError
from confrere.federation.diagnostics import aggregation_error, site_similarity
from confrere.federation.loop import best_round, federate, sample, should_stop
from confrere.federation.site import check_payload
from confrere.federation.transport import Failure, InProcess
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.methods.fedit import FedIT
from confrere.record.run import Run
from confrere.tensors import State, digest, weighted_mean


@dataclass(frozen=True, kw_only=True)
class Leaky(FedIT):
    """Sends what it must not."""

    group: str = "private"

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        return {self.group: dict(received["shared"])}, {"private": {}}


@pytest.mark.parametrize("group", ["private", "other"])
def test_a_group_that_was_not_declared_stays(group: str) -> None:
    method = Leaky(group=group)
    site = tiny_sites(method)["a"]
    server = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    with pytest.raises(UpdateRefusedError, match=f"site a, round 1, group {group}"):
        site.handle(Request(kind="train", round=1, state=method.broadcast(server, "a")))
    assert site.store.before(9) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays(value: float) -> None:
    with pytest.raises(UpdateRefusedError, match=r"not finite[\s\S]*w"):
        check_payload(make("fedit"), "a", 3, {"shared": {"w": torch.tensor([0.0, value])}})


def test_a_site_that_diverges_is_left_out_of_the_round(tmp_path: Path) -> None:
    method = make("fedit")
    sites = tiny_sites(method)
    sites["b"].settings = replace(sites["b"].settings, lr=1e30)
    server = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    final = federate(method, server, InProcess(sites), tiny_plan(method), Run(tmp_path))
    events = Run(tmp_path).events()
    failed = [e for e in events if e["event"] == "failure"]
    assert {e["site"] for e in failed} == {"b"}
    assert "not finite" in failed[0]["reason"]
    assert all(torch.isfinite(t).all() for t in final["shared"].values())
    rounds = [e for e in events if e["event"] == "round"]
    assert all(set(e["sites"]) <= {"a", "b", "c"} for e in rounds)
    assert set(rounds[-1]["sites"]) == {"a", "c"}


class Absent(InProcess):
    """Some sites never answer."""

    gone: tuple[str, ...] = ()

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        return [Failure(n, "no answer") if n in self.gone else self._ask(n, r) for n, r in requests.items()]


@pytest.mark.parametrize("gone", [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")])
def test_the_aggregate_is_the_mean_of_those_present(tmp_path: Path, gone: tuple[str, ...]) -> None:
    method = make("fedit")
    start = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    transport = Absent(tiny_sites(method))
    transport.gone = gone
    final = federate(method, start, transport, tiny_plan(method, rounds=1), Run(tmp_path))
    twins = tiny_sites(method)
    replies = [
        twins[n].handle(Request(kind="train", round=1, state=method.broadcast(start, n)))
        for n in SITES
        if n not in gone
    ]
    expected = weighted_mean([(r.weight, r.state["shared"]) for r in replies])
    assert digest({"shared": final["shared"]}) == digest({"shared": expected})


def test_too_few_answers_leave_the_server_as_it_was(tmp_path: Path) -> None:
    method = make("fedit")
    start = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    transport = Absent(tiny_sites(method))
    transport.gone = ("a", "b")
    final = federate(method, start, transport, tiny_plan(method, rounds=2, min_replies=2), Run(tmp_path))
    assert digest(final) == digest(start)
    assert any("1 of 2 needed" in e["reason"] for e in Run(tmp_path).events() if e["event"] == "failure")


def test_no_answer_at_all_stops_the_run(tmp_path: Path) -> None:
    method = make("fedit")
    transport = Absent(tiny_sites(method))
    transport.gone = SITES
    start = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    with pytest.raises(RunError, match=r"0 of 3 sites answered.*a: no answer.*round 1"):
        federate(method, start, transport, tiny_plan(method), Run(tmp_path))
    assert Run(tmp_path).last_round() == 0


def test_sampling_has_an_address() -> None:
    names = [f"s{k}" for k in range(10)]
    assert sample(names, 0.3, 0, 1) == sample(names, 0.3, 0, 1)
    assert len({tuple(sample(names, 0.3, 0, r)) for r in range(20)}) > 5
    assert sample(names, 1.0, 0, 1) == sorted(names)
    assert len(sample(names, 0.01, 0, 1)) == 1


def judged(*criteria: float | None) -> list[dict[str, object]]:
    return [{"event": "evaluation", "round": r, "mean": 0.5, "criterion": c} for r, c in enumerate(criteria, 1)]


def test_the_best_round_is_the_earliest_best_on_validation_data() -> None:
    assert best_round(judged(0.2, 0.6, 0.6, 0.1)) == 2
    assert best_round([*judged(None, None), {"event": "round", "round": 2}]) == 2


def test_patience_ends_a_run_for_good_and_fine_tuning_waits(tmp_path: Path) -> None:
    plan = tiny_plan(make("fedit"), rounds=10, patience=2)
    assert should_stop(make("fedit"), judged(0.5, 0.4, 0.3), plan, 3)
    assert not should_stop(make("fedit"), judged(0.5, 0.4, 0.6), plan, 3)
    assert not should_stop(make("fedit-ft"), judged(0.5, 0.4, 0.3), plan, 3)
    method = make("local")
    start = method.init_server({})
    run = Run(tmp_path)
    plan = tiny_plan(method, rounds=30, patience=1)
    federate(method, start, InProcess(tiny_sites(method, lr=0.0)), plan, run)
    ended = run.last_round()
    assert ended == 2
    federate(method, start, InProcess(tiny_sites(method, lr=0.0)), plan, run)
    assert run.last_round() == ended


def random_replies(method: Method, seeds: tuple[int, ...]) -> tuple[State, list[Reply]]:
    server = method.init_server(initial_params(tiny_backbone(method.slots), method, ""))
    replies = []
    for k, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        sent = {n: t + torch.randn(t.shape, generator=g) for n, t in server["shared"].items()}
        replies.append(Reply(site=f"s{k}", round=1, state={"shared": sent}, weight=k + 1.0))
    return server, replies


def test_the_error_of_averaging_equals_full_matrices() -> None:
    method = make("fedit")
    server, replies = random_replies(method, (1, 2, 3))
    merged = method.aggregate(server, replies)["shared"]
    error = size = 0.0
    for layer, pair in pairs(merged, "general").items():
        mean = sum(r.weight / 6 * product(pairs(r.state["shared"], "general")[layer]).double() for r in replies)
        error += float((mean - product(pair).double()).square().sum())
        size += float(torch.as_tensor(mean).square().sum())
    assert aggregation_error(merged, replies) == pytest.approx((error / size) ** 0.5, rel=1e-4)
    assert aggregation_error(method.aggregate(server, replies[:1])["shared"], replies[:1]) == pytest.approx(0, abs=1e-3)


def test_equal_updates_are_alike_and_opposite_ones_opposed() -> None:
    method = make("fedit")
    server, (one, *_) = random_replies(method, (1,))
    mirrored = {n: 2 * server["shared"][n] - t for n, t in one.state["shared"].items()}
    found = site_similarity(
        server["shared"], [one, replace(one, site="t"), replace(one, site="u", state={"shared": mirrored})]
    )
    assert found is not None
    assert found["matrix"][0] == pytest.approx([1.0, 1.0, -1.0], abs=1e-3)  # type: ignore[index]


def test_local_training_sends_nothing_and_needs_no_server(tmp_path: Path) -> None:
    tiny_run(make("local"), tmp_path)
    for event in Run(tmp_path).events():
        if event["event"] == "round":
            assert all(s["sent_bytes"] == s["received_bytes"] == 0 for s in event["sites"].values())
