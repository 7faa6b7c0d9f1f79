"""G4, A8: whoever is absent, the aggregate is that of those present, bit for bit; below the quorum nothing changes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import backbone_of, initial_params, tiny_data, tiny_plan

from confrere.errors import RunError
from confrere.federation.loop import federate
from confrere.federation.site import Site
from confrere.federation.transport import Failure
from confrere.learner import TrainSettings
from confrere.method import Method, Reply, Request, make
from confrere.record.run import Run
from confrere.record.store import MemoryStore
from confrere.tensors import State, digest

NAMES = ("f", "a", "e", "b", "d", "c")  # asked and answering in no order
QUORUM = 3


class Some:
    """A transport to sites of which only some answer, in an order of its own."""

    def __init__(self, answers: Mapping[str, Reply], present: Sequence[str]) -> None:
        self.answers, self.present = answers, present

    def sites(self) -> tuple[str, ...]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        return [self.answers[s] if s in self.present else Failure(s, "no answer") for s in NAMES if s in requests]


def six_sites(method: Method) -> dict[str, Site]:
    backbone = backbone_of(method)
    return {
        name: Site(
            name=name,
            method=method,
            backbone=backbone,
            data=tiny_data(backbone, name, 24),
            initial=functools.partial(initial_params, backbone, method, name),
            store=MemoryStore(),
            settings=TrainSettings(steps=2, batch_size=6, lr=5e-3),
            seed=0,
            rounds=2,
            weight=3.0 + 7.0 * number,
        )
        for number, name in enumerate(sorted(NAMES))
    }


def begin(method: Method) -> tuple[State, dict[str, Reply]]:
    """Return the server's first state and what every site answers to it."""
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    requests = {n: Request(kind="train", round=1, state=method.broadcast(server, n)) for n in NAMES}
    return server, {name: site.handle(requests[name]) for name, site in six_sites(method).items()}


def go(method: Method, server: State, transport: Some, folder: Path, quorum: int) -> State:
    plan = tiny_plan(method, rounds=1, train=NAMES, judge=(), min_replies=quorum)
    return federate(method, server, transport, plan, Run(folder))


def reference(replies: Sequence[Reply]) -> dict[str, np.ndarray]:
    """Return the weighted mean by NumPy, added up one after another in float64, in the order of the names."""
    ordered = sorted(replies, key=lambda reply: reply.site)
    total = sum(reply.weight for reply in ordered)
    mean = {}
    for name in ordered[0].state["shared"]:
        found = np.zeros(ordered[0].state["shared"][name].shape)
        for reply in ordered:
            found = found + reply.state["shared"][name].numpy().astype(np.float64) * (reply.weight / total)
        mean[name] = found.astype(np.float32)
    return mean


def patterns() -> list[tuple[str, ...]]:
    return [p for count in range(len(NAMES) + 1) for p in itertools.combinations(sorted(NAMES), count)]


@pytest.mark.parametrize("name", ["fedit", "fedopal"])
def test_all_64_patterns_give_the_mean_of_those_present(tmp_path: Path, name: str) -> None:
    method = make(name)
    server, answers = begin(method)
    exact = untouched = 0
    for number, present in enumerate(patterns()):
        here = [answers[s] for s in present]
        if not here:
            with pytest.raises(RunError, match="0 of 6 sites answered"):
                go(method, server, Some(answers, present), tmp_path / "none", 1)
            untouched += digest(Run(tmp_path / "none").server(0)) == digest(server)
            continue
        final = go(method, server, Some(answers, present), tmp_path / str(number), 1)
        expected = reference(here)
        assert final["shared"].keys() == expected.keys()
        exact += all(np.array_equal(final["shared"][n].numpy(), expected[n]) for n in expected)
    print(f"\nG4: {exact + untouched} of 64 ({name}: {exact} means to 0 ulp, {untouched} with nobody untouched)")
    assert (exact, untouched) == (63, 1)


@pytest.mark.parametrize(("name", "options"), [("fedopal", {"aggregation": "svd"}), ("flexlora", {})])
def test_all_64_patterns_for_methods_that_need_each_reply(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    """There is no mean to compare with: the reference is the method's own server, given those present in order."""
    method = make(name, options)
    assert method.needs == "each"
    server, answers = begin(method)
    same = 0
    for number, present in enumerate(patterns()):
        if not present:
            with pytest.raises(RunError):
                go(method, server, Some(answers, present), tmp_path / "none", 1)
            same += digest(Run(tmp_path / "none").server(0)) == digest(server)
            continue
        final = go(method, server, Some(answers, present), tmp_path / str(number), 1)
        same += digest(final) == digest(method.aggregate(server, [answers[s] for s in present]))
    print(f"\nG4: {same} of 64 ({name} {options})")
    assert same == 64


@pytest.mark.parametrize("name", ["fedit", "fedopal", "flexlora"])
def test_below_the_quorum_the_model_is_untouched(tmp_path: Path, name: str) -> None:
    method = make(name)
    server, answers = begin(method)
    kept = moved = 0
    for number, present in enumerate(patterns()):
        if not present:
            continue
        final = go(method, server, Some(answers, present), tmp_path / str(number), QUORUM)
        if len(present) < QUORUM:
            kept += digest(final) == digest(server) == digest(Run(tmp_path / str(number)).server(1))
        else:
            moved += digest(final) != digest(server)
    assert (kept, moved) == (21, 42)


def test_the_reference_can_tell_one_ulp(tmp_path: Path) -> None:
    method = make("fedit")
    server, answers = begin(method)
    final = go(method, server, Some(answers, NAMES), tmp_path, 1)
    name = next(n for n, t in final["shared"].items() if t.any())
    expected = reference(list(answers.values()))[name]
    assert not np.array_equal(np.nextafter(expected, np.float32(1)), final["shared"][name].numpy())
    swapped = [replace(answers["a"], weight=answers["b"].weight), *(answers[s] for s in "bcdef")]
    assert not np.array_equal(reference(swapped)[name], expected)


def test_a_late_update_is_refused_by_its_round(tmp_path: Path) -> None:
    """A8: what a straggler sends for round 1 when round 2 is on does not count in round 2."""
    method = make("fedit")
    server, answers = begin(method)
    late = {**answers, "a": replace(answers["a"], round=2)}
    run = Run(tmp_path)
    final = federate(method, server, Some(late, NAMES), tiny_plan(method, rounds=1, train=NAMES, judge=()), run)
    assert [(e["site"], e["round"]) for e in run.events() if e["event"] == "failure"] == [("a", 1)]
    expected = method.aggregate(server, [answers[s] for s in sorted(NAMES) if s != "a"])
    assert digest(final) == digest(expected)
    assert all(torch.isfinite(t).all() for t in final["shared"].values())
