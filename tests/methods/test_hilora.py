"""HiLoRA: tiers trained in turn, means of products, groups of sites by what their root adapters write to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import SITES, backbone_of, initial_params, tiny_learner, tiny_run, tiny_sites

from confrere.adapters.algebra import column_overlap, pairs, product
from confrere.adapters.clusters import spectral_groups, subspace_similarity, update_basis
from confrere.adapters.names import slot_of
from confrere.errors import ConfigError
from confrere.method import Reply, Request, make
from confrere.tensors import flatten


def test_subspace_similarity_by_hand() -> None:
    """Bases e1 e2, e1 e3 and e3 e4: overlaps of 1/2, 0 and 1/2 whatever the length of the columns."""
    eye = torch.eye(4)
    bases = [{"l": eye[:, [0, 1]] * 3}, {"l": eye[:, [0, 2]]}, {"l": eye[:, [2, 3]] * 0.1}]
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(subspace_similarity(bases), expected)
    assert subspace_similarity([{"l": torch.zeros(4, 2)}] * 2).tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("clusters", [0, 3])
def test_spectral_groups_find_blocks_in_any_order(clusters: int) -> None:
    truth = np.array([2, 0, 1, 0, 2, 2, 1])
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 0.05, (7, 7))
    similar = torch.tensor(np.where(truth[:, None] == truth, 0.9, 0.05) + noise + noise.T)
    similar.fill_diagonal_(1.0)
    assert spectral_groups(similar, clusters) == [0, 1, 2, 1, 0, 0, 2]


def test_spectral_groups_of_apart_or_few_points() -> None:
    assert spectral_groups(torch.eye(3), 3) == [0, 1, 2]
    assert spectral_groups(torch.ones(1, 1), 2) == [0]
    assert len(set(spectral_groups(torch.eye(2), 5))) == 2
    assert spectral_groups(torch.ones(4, 4), 0) == [0, 0, 0, 0]


def test_whole_adapters_saturate_where_updates_tell_sites_apart() -> None:
    """B_0 + small e1 and B_0 + small e2: the adapters' columns nearly agree, those of the updates are orthogonal."""
    a, b = torch.ones(1, 3), torch.tensor([[0.0], [0.0], [5.0]])
    eye = torch.eye(3)
    new = [{"l": (a, b + 0.1 * eye[:, [k]])} for k in (0, 1)]
    whole = [update_basis(n, {}) for n in new]
    moved = [update_basis(n, {"l": (a, b)}) for n in new]
    assert float(subspace_similarity(whole)[0, 1]) > 0.99
    assert float(subspace_similarity(moved)[0, 1]) < 1e-6


def hilora_reply(site: str, slot: str, b: list[list[float]], weight: float = 1.0) -> Reply:
    tensors = {
        f"x.lora_A.{slot}.weight": torch.tensor([[1.0, 0.0]]),
        f"x.lora_B.{slot}.weight": torch.tensor(b),
        "head.bias": torch.tensor([weight]),
    }
    return Reply(site=site, round=1, state={"tier": tensors}, weight=weight)


def test_hilora_averages_products_and_clusters_by_what_the_root_wrote() -> None:
    """a and b write to the first output, c to the second; the cluster tier is then averaged among a and b alone.

    With A common, mean products are mean B: root (1 + 1, 2 * 1) / 4 = (.5, .5); cluster of a, b: (2 + 4) / 2 = 3 in
    the first entry, of c: 8 in the second; all: (6, 16) / 4. Heads: 1 in the first group, 2 in the second.
    """
    method = make("hilora", {"clusters": 2})
    zero = {f"x.lora_B.{s}.weight": torch.zeros(2, 1) for s in ("root", "cluster")}
    one_ = {f"x.lora_A.{s}.weight": torch.tensor([[1.0, 0.0]]) for s in ("root", "cluster")}
    server = method.init_server({**zero, **one_, "head.bias": torch.zeros(1)})
    roots = [("a", [[1.0], [0.0]], 1.0), ("b", [[1.0], [0.0]], 1.0), ("c", [[0.0], [1.0]], 2.0)]
    server = method.aggregate(server, [hilora_reply(s, "root", b, w) for s, b, w in roots])
    torch.testing.assert_close(product(pairs(server["shared"], "root")["x"]), torch.tensor([[0.5, 0], [0.5, 0]]))
    tier = [("a", [[2.0], [0.0]], 1.0), ("b", [[4.0], [0.0]], 1.0), ("c", [[0.0], [8.0]], 2.0)]
    server = method.aggregate(server, [hilora_reply(s, "cluster", b, w) for s, b, w in tier])
    assert {s: float(n) for s, n in server["members"].items()} == {"a": 0, "b": 0, "c": 1}
    assert not any(g.startswith("basis.") for g in server)
    found = {s: method.broadcast(server, s).get("group") for s in ("a", "b", "c", "newcomer")}
    torch.testing.assert_close(product(pairs(found["a"], "cluster")["x"]), torch.tensor([[3.0, 0], [0, 0]]))
    torch.testing.assert_close(product(pairs(found["c"], "cluster")["x"]), torch.tensor([[0.0, 0], [8, 0]]))
    assert [float(found[s]["head.bias"]) for s in "abc"] == [1.0, 1.0, 2.0]
    assert found["newcomer"] is None
    torch.testing.assert_close(product(pairs(server["shared"], "cluster")["x"]), torch.tensor([[1.5, 0], [4, 0]]))
    torch.testing.assert_close(product(pairs(server["shared"], "root")["x"]), torch.tensor([[0.5, 0], [0.5, 0]]))


def test_the_model_of_unseen_sites_is_the_mean_of_all_groups_and_not_of_the_last_cohort() -> None:
    """Groups: a and b (weights 1, 1), c (weight 2). All send, then a alone sends 6: groups (6, 0) and (0, 8).

    Mean by the weights of all members: (6 * 2, 8 * 2) / 4 = (3, 4); of the last cohort it would be (6, 0). The head
    follows: (9 * 2 + 2 * 2) / 4 = 5.5. Then a counts 3 instead of 1: (6 * 4, 8 * 2) / 6.
    """
    method = make("hilora", {"clusters": 2})
    zero = {f"x.lora_B.{s}.weight": torch.zeros(2, 1) for s in ("root", "cluster")}
    one_ = {f"x.lora_A.{s}.weight": torch.tensor([[1.0, 0.0]]) for s in ("root", "cluster")}
    server = method.init_server({**zero, **one_, "head.bias": torch.zeros(1)})
    roots = [("a", [[1.0], [0.0]], 1.0), ("b", [[1.0], [0.0]], 1.0), ("c", [[0.0], [1.0]], 2.0)]
    server = method.aggregate(server, [hilora_reply(s, "root", b, w) for s, b, w in roots])
    tier = [("a", [[2.0], [0.0]], 1.0), ("b", [[4.0], [0.0]], 1.0), ("c", [[0.0], [8.0]], 2.0)]
    server = method.aggregate(server, [hilora_reply(s, "cluster", b, w) for s, b, w in tier])
    alone = hilora_reply("a", "cluster", [[6.0], [0.0]], 1.0)
    alone.state["tier"]["head.bias"] = torch.tensor([9.0])
    for weight, expected, bias in ((1.0, [3.0, 4.0], 5.5), (3.0, [4.0, 16 / 6], (9 * 4 + 2 * 2) / 6)):
        server = method.aggregate(server, [replace(alone, weight=weight)])
        found = method.personal(method.broadcast(server, "newcomer"), {"private": {}})
        torch.testing.assert_close(product(pairs(found, "cluster")["x"])[:, 0], torch.tensor(expected))
        assert float(found["head.bias"]) == pytest.approx(bias)


def test_hilora_trains_one_tier_at_a_time_and_no_leaf_leaves() -> None:
    method = make("hilora")
    assert [method.tier(r, 10) for r in range(1, 11)] == ["root"] * 4 + ["cluster"] * 3 + ["leaf"] * 3
    assert [method.tier(r, 3) for r in (1, 2, 3)] == ["root", "cluster", "leaf"]
    assert not method.may_stop(7, 10)
    assert method.may_stop(8, 10)
    site = tiny_sites(method, rounds=3, steps=4)["a"]
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    previous = dict(method.personal(method.broadcast(server, "a"), method.init_site(site.initial())))
    for round_, tier in enumerate(("root", "cluster", "leaf"), 1):
        received = method.broadcast(server, "a")
        reply = site.handle(Request(kind="train", round=round_, state=received))
        assert {slot_of(n) for n in reply.state.get("tier", {})} == (set() if tier == "leaf" else {tier, None})
        now = method.personal({**received, **reply.state}, site.store.before(round_ + 1) or {})
        moved = {slot_of(n) for n in now if not torch.equal(now[n], previous[n])}
        assert moved == {tier, None}
        server = method.aggregate(server, [reply])
        previous = dict(method.personal(method.broadcast(server, "a"), site.store.before(round_ + 1) or {}))


def test_the_penalty_turns_a_tier_away_from_those_below() -> None:
    overlaps = []
    for gamma in (0.0, 20.0):
        method = make("hilora", {"gamma_leaf": gamma})
        learner = tiny_learner(method, "a")
        learner.round = learner.rounds
        g = torch.Generator().manual_seed(0)
        start = initial_params(backbone_of(method), method, "a")
        start = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in sorted(start.items())}
        learner.settings = type(learner.settings)(steps=20, batch_size=6, lr=1e-2)
        shared = {n: t for n, t in start.items() if method.shared(n)}
        leaf = {n: t for n, t in start.items() if not method.shared(n)}
        _, state = method.update(learner, {"shared": shared}, {"private": leaf})
        leaves, roots = pairs(state["private"], "leaf"), pairs(shared, "root")
        overlaps.append(sum(column_overlap(leaves[k][1], roots[k][1]) or 0.0 for k in leaves))
    assert overlaps[1] < 0.5 * overlaps[0]


def test_hilora_serves_an_unseen_site_without_a_leaf_or_group(tmp_path: Path) -> None:
    method = make("hilora")
    final, sites = tiny_run(method, tmp_path, rounds=3)
    received = method.broadcast(final, "a")
    general = sites["a"].params(Request(kind="evaluate", round=3, state=received, model="general"))
    own = sites["a"].params(Request(kind="evaluate", round=3, state=received))
    assert all(not b.any() for _, b in pairs(general, "leaf").values())
    assert any(b.any() for _, b in pairs(own, "leaf").values())
    assert torch.equal(general["head.weight"], final["shared"]["head.weight"])
    for layer, (a, _) in pairs(own, "cluster").items():
        assert torch.equal(a, pairs(received["group"], "cluster")[layer][0])
    assert set(final["members"]) == set(SITES)
    assert all(torch.isfinite(t).all() for t in flatten(final).values())


def test_a_group_none_of_whose_sites_answers_goes_on_from_what_was_shared() -> None:
    """a and b write to the first output, c to the second; then a and b alone send a cluster adapter, so c's group has
    none of its own yet. c must be served, with the cluster adapter and head from before, not those of the others."""
    method = make("hilora", {"clusters": 2})
    zero = {f"x.lora_B.{s}.weight": torch.zeros(2, 1) for s in ("root", "cluster")}
    one_ = {f"x.lora_A.{s}.weight": torch.tensor([[1.0, 0.0]]) for s in ("root", "cluster")}
    server = method.init_server({**zero, **one_, "head.bias": torch.zeros(1)})
    roots = [("a", [[1.0], [0.0]]), ("b", [[1.0], [0.0]]), ("c", [[0.0], [1.0]])]
    server = method.aggregate(server, [hilora_reply(s, "root", b, 3.0) for s, b in roots])
    for round_ in range(2):
        sent = [hilora_reply(s, "cluster", [[2.0], [0.0]], 5.0) for s in "ab"[round_:]]
        server = method.aggregate(server, sent)
        model = method.personal(method.broadcast(server, "c"), {"joined": {}, "private": {}})
        assert not model["x.lora_B.cluster.weight"].any()
        assert model["head.bias"].tolist() == [3.0]
        assert method.broadcast(server, "a")["group"]["head.bias"].tolist() == [5.0]
    server = method.aggregate(server, [hilora_reply("c", "cluster", [[0.0], [8.0]], 1.0)])
    found = pairs(method.broadcast(server, "c")["group"], "cluster")
    torch.testing.assert_close(product(found["x"]), torch.tensor([[0.0, 0], [8, 0]]))


@pytest.mark.parametrize("rounds", [3, 4, 5, 10])
@pytest.mark.parametrize("shares", [(0.4, 0.3), (0.6, 0.39), (0.01, 0.98), (0.98, 0.01), (0.01, 0.01)])
def test_each_tier_has_a_round_whatever_the_shares(rounds: int, shares: tuple[float, float]) -> None:
    method = make("hilora", {"root": shares[0], "cluster": shares[1]})
    tiers = [method.tier(r, rounds) for r in range(1, rounds + 1)]
    assert list(dict.fromkeys(tiers)) == ["root", "cluster", "leaf"]
    method.check(1, rounds)
    with pytest.raises(ConfigError, match="rounds=3"):
        method.check(1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": 0.8}, "no rounds"),
        ({"head": "mine"}, "shared, local"),
        ({"gamma_leaf": -1.0}, "negative"),
    ],
)
def test_wrong_options_name_the_way_out(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("hilora", options)
