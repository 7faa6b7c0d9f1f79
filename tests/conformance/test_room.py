"""The contract has room for what later methods need: groups, broadcasts by site, unequal ranks, personal state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tiny_federation import SITES, initial_params, tiny_backbone, tiny_plan, tiny_sites

from confrere.adapters.algebra import average_products, pairs
from confrere.adapters.lora import slot_of
from confrere.federation.loop import federate
from confrere.federation.transport import InProcess
from confrere.learner import Learner
from confrere.method import Method, Reply, Request
from confrere.record.run import Run
from confrere.tensors import State, Tensors, pick, weighted_mean

RANKS = {"a": 2, "b": 4, "c": 6}


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """Every site has its own rank; the head travels in a group of its own; each site gets its own message."""

    name: ClassVar[str] = "mixed"
    sends: ClassVar[tuple[str, ...]] = ("adapter", "head")

    @property
    def needs(self) -> Literal["sum", "each"]:
        return "each"

    def init_server(self, params: Tensors) -> State:
        return {"shared": {}, "adapter": {}, "head": pick(params, lambda n: slot_of(n) is None)}

    def broadcast(self, server: State, site: str) -> State:
        if not server["adapter"]:
            return {"head": server["head"]}
        fitted = average_products([(1.0, server["adapter"])], "general", RANKS[site])
        return {"adapter": fitted, "head": server["head"]}

    def init_site(self, params: Tensors) -> State:
        return {"private": pick(params, lambda n: slot_of(n) is not None)}

    def personal(self, received: State, state: State) -> Tensors:
        return {**state["private"], **received.get("adapter", {}), **received["head"]}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        fitted = learner.fit(self.personal(received, state))
        adapter = pick(fitted, lambda n: slot_of(n) is not None)
        return {"adapter": adapter, "head": pick(fitted, lambda n: slot_of(n) is None)}, {"private": adapter}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        return {
            **server,
            "adapter": average_products([(r.weight, r.state["adapter"]) for r in replies], "general"),
            "head": weighted_mean([(r.weight, r.state["head"]) for r in replies]),
        }


def test_three_ranks_two_groups_and_own_messages_in_one_run(tmp_path: Path) -> None:
    method, backbone = Mixed(), tiny_backbone(("general",))
    sites = tiny_sites(method)
    for name, site in sites.items():
        site.initial = partial(initial_params, backbone, method, name, rank=RANKS[name])
    server = method.init_server(initial_params(backbone, method, ""))
    final = federate(method, server, InProcess(sites), tiny_plan(method), Run(tmp_path))
    for name in SITES:
        sent = method.broadcast(final, name)
        assert {a.shape[0] for a, _ in pairs(sent["adapter"], "general").values()} == {RANKS[name]}
        reply = sites[name].handle(Request(kind="evaluate", round=3, state=sent))
        assert 0 <= reply.metrics["score"] <= 1
    assert {a.shape[0] for a, _ in pairs(final["adapter"], "general").values()} == {6}
    moved = [t for n, t in final["adapter"].items() if ".lora_B." in n]
    assert all(bool((t != 0).any()) for t in moved)
    events = [e for e in Run(tmp_path).events() if e["event"] == "round"]
    sizes = {name: events[-1]["sites"][name]["sent_bytes"] for name in SITES}
    assert sizes["a"] < sizes["b"] < sizes["c"]
    assert torch.isfinite(torch.stack([t.abs().max() for t in final["head"].values()])).all()
