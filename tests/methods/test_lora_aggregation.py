"""Ways to average adapters: parity with hand-derived numbers, known bugs of public code, exactness, unequal ranks.

The numbers of most parity tests come from two sites of rank 1 and one layer of 2 x 2, with weights 1 and 3:
A_1 = [1 0], B_1 = [1 0]^T, A_2 = [0 1], B_2 = [0 1]^T, so p = (1/4, 3/4) and mean(BA) = diag(1/4, 3/4), while
mean(A) = [1/4 3/4], mean(B) = [1/4 3/4]^T and mean(B) mean(A) = 1/16 [[1 3] [3 9]].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_federation import (
    SITES,
    backbone_of,
    initial_params,
    tiny_backbone,
    tiny_data,
    tiny_plan,
    tiny_run,
    tiny_sites,
)
from torch import Tensor

from confrere import initial
from confrere.adapters import residual
from confrere.adapters.algebra import Pair, concat, cut, named, pairs, product
from confrere.adapters.folder import import_
from confrere.adapters.names import slot_of, tensor_name
from confrere.adapters.ranks import rank_of
from confrere.errors import ConfigError
from confrere.export import export_adapters
from confrere.federation.diagnostics import aggregation_error, round_diagnostics
from confrere.federation.loop import federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.method import Method, Reply, Request, make
from confrere.methods.fedrot_lora import rotation
from confrere.methods.hetlora import tail
from confrere.record.run import Run
from confrere.tensors import State, Tensors, digest, n_bytes, pick

UNEQUAL = ("flexlora", "flora", "hetlora")
RANKS = {"a": 2, "b": 4, "c": 6}


def state(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    return {**named({"x": (torch.tensor(a), torch.tensor(b))}, "general"), "head.weight": torch.ones(1)}


def reply(name: str, weight: float, tensors: Tensors) -> Reply:
    return Reply(site=name, round=1, weight=weight, state={"shared": tensors})


def pair_of(server: State) -> Pair:
    return pairs(server["shared"], "general")["x"]


def close(found: Tensor, expected: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


TWO = [reply("a", 1.0, state([[1.0, 0.0]], [[1.0], [0.0]])), reply("b", 3.0, state([[0.0, 1.0]], [[0.0], [1.0]]))]
START = state([[0.6, 0.8]], [[0.0], [0.0]])
R = tensor_name("x", "B", "residual")


def after_two(name: str, **options: object) -> State:
    method = make(name, options)
    return method.aggregate(method.init_server(START), TWO)


def test_flora_by_hand() -> None:
    """R = 1/4 B_1 A_1 + 3/4 B_2 A_2; a p_k on both stacks gives its square, diag(1/16, 9/16)."""
    once = after_two("flora")
    close(once["shared"][R], [[0.25, 0.0], [0.0, 0.75]])
    twice = make("flora").aggregate(once, TWO)
    close(twice["shared"][R], [[0.5, 0.0], [0.0, 1.5]])
    stack = [pairs(r.state["shared"], "general")["x"] for r in TWO]
    both = product(concat([(a * p, b) for (a, b), p in zip(stack, (0.25, 0.75), strict=True)], [0.25, 0.75]))
    close(both, [[0.0625, 0.0], [0.0, 0.5625]])
    assert not torch.allclose(once["shared"][R], both)


def test_flexlora_by_hand() -> None:
    """The best rank 1 of diag(1/4, 3/4) is diag(0, 3/4): A = sqrt(3/4) [0 1], B its transpose."""
    a, b = pair_of(after_two("flexlora"))
    root = 0.75**0.5
    close(a, [[0.0, root]])
    close(b, [[0.0], [root]])


def test_fedex_by_hand() -> None:
    """R = diag(1/4, 3/4) - 1/16 [[1 3] [3 9]] = 3/16 [[1 -1] [-1 1]]."""
    server = after_two("fedex-lora")
    close(pair_of(server)[0], [[0.25, 0.75]])
    close(pair_of(server)[1], [[0.25], [0.75]])
    close(server["shared"][R], [[0.1875, -0.1875], [-0.1875, 0.1875]])


@pytest.mark.parametrize("lam", [0.0, 0.01, 1.0, 1e9])
def test_lora_fair_by_hand(lam: float) -> None:
    """A A^T = t = 5/8 and E A^T = 3/32 [-1 1]^T, so dB = 3/20 [-1 1]^T / (1 + lam); lam = 0 projects: B = [.1 .9]^T."""
    a, b = pair_of(after_two("lora-fair", lam=lam))
    close(a, [[0.25, 0.75]])
    close(b, [[0.25 - 0.15 / (1 + lam)], [0.75 + 0.15 / (1 + lam)]])


def test_lora_fair_without_ridge_is_least_squares_and_survives_a_singular_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    sent = []
    for k in range(3):
        a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3)))
        a[2] = a[1]  # two equal rows at every site: A A^T has no inverse
        sent.append(reply(f"s{k}", k + 1.0, named({"x": (a, b)}, "general")))
    method = make("lora-fair", {"lam": 0.0})
    a, b = pair_of(method.aggregate({"shared": {}}, sent))
    exact = residual.mean_products([(r.weight, r.state["shared"]) for r in sent])["x"]
    best = torch.linalg.lstsq(a.T, exact.T, driver="gelsd").solution.T @ a
    torch.testing.assert_close(b @ a, best)


def test_hetlora_by_hand() -> None:
    """||B_a A_a|| = 3 and ||B_b A_b|| = 1, so 3/4 and 1/4; the second row of A is 3/4 0 + 1/4 [0 1]."""
    sent = [reply("a", 1.0, state([[1.0, 0.0]], [[3.0], [0.0]]))]
    sent += [reply("b", 1.0, state([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]))]
    before: State = {"shared": state([[9.0, 9.0]] * 3, [[8.0, 8.0, 8.0]] * 2)}
    a, b = pair_of(make("hetlora").aggregate(before, sent))
    close(a, [[1.0, 0.0], [0.0, 0.25], [9.0, 9.0]])  # no reply reaches the third direction
    close(b, [[2.5, 0.0, 8.0], [0.0, 0.0, 8.0]])
    a, b = pair_of(make("hetlora", {"weighting": "images"}).aggregate(before, sent))
    close(a[:2], [[1.0, 0.0], [0.0, 0.5]])
    close(b[:, :2], [[2.0, 0.0], [0.0, 0.0]])


def quarter_turn() -> Tensor:
    return torch.tensor([[0.0, -1.0], [1.0, 0.0]])


@pytest.mark.parametrize("side", ["A", "B"])
def test_fedrot_by_hand(side: str) -> None:
    """A site whose factors are a quarter turn of the reference turns back; half of the way is an eighth turn."""
    target = (torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.5], [0.0, 2.0]]))
    turned = (quarter_turn() @ target[0], target[1] @ quarter_turn().T)
    q = rotation(turned, target, side).float()
    close(q, quarter_turn().T.tolist())
    half = 0.5**0.5
    close(rotation(turned, target, side, 0.5).float(), [[half, half], [-half, half]])
    close(rotation(turned, target, side, 0.0).float(), [[1.0, 0.0], [0.0, 1.0]])


def test_fedrot_is_never_lost_between_a_factor_and_its_mirror() -> None:
    """A reflection has no halfway point: soft turning takes the nearest rotation, and turns nothing towards zero."""
    target = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2))
    mirrored = (torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.ones(2, 2))
    close(rotation(mirrored, target, "A").float(), [[1.0, 0.0], [0.0, -1.0]])
    close(rotation(mirrored, target, "A", 0.5).float(), [[1.0, 0.0], [0.0, 1.0]])
    close(rotation(mirrored, target, "B").float(), [[1.0, 0.0], [0.0, 1.0]])


def test_averaging_turned_copies_is_exact_after_turning_and_not_before() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator))
    turn, sent = torch.eye(2), []
    for k in range(3):
        turn = quarter_turn() @ turn
        sent.append(reply(f"s{k}", 1.0, named({"x": (turn @ target[0], target[1] @ turn.T)}, "general")))
    method = make("fedrot-lora", {"soft": 1.0})
    reference = named({"x": target}, "general")
    for round_ in (2, 3):
        back = [
            reply(r.site, 1.0, method.turned(r.state["shared"], reference, round_))  # type: ignore[attr-defined]
            for r in sent
        ]
        assert aggregation_error(method.aggregate({"shared": {}}, back)["shared"], back) < 1e-5
    assert aggregation_error(method.aggregate({"shared": {}}, sent)["shared"], sent) > 0.5


def test_turning_by_b_can_undo_what_fedit_gets_right() -> None:
    """A_1 = A_2 = [1 0]: averaging is exact. B_2 = [-.6 .8] points away from B* = [1 0], so Q = -1 turns A_2 to [-1 0].

    Then mean(A) = 0 and everything is lost: relative error 1 in an odd round. Turned by A, nothing turns. A proper
    rotation (soft < 1) of rank 1 is the identity.
    """
    ones = [[1.0, 0.0]]
    sent = [reply("a", 1.0, state(ones, [[1.0], [0.0]])), reply("b", 1.0, state(ones, [[-0.6], [0.8]]))]
    reference = state(ones, [[1.0], [0.0]])

    def error(round_: int, soft: float) -> float | None:
        method = make("fedrot-lora", {"soft": soft})
        turned = [
            reply(r.site, 1.0, method.turned(r.state["shared"], reference, round_))  # type: ignore[attr-defined]
            for r in sent
        ]
        return aggregation_error(method.aggregate({"shared": {}}, turned)["shared"], turned)

    plain = make("fedit").aggregate({"shared": {}}, sent)["shared"]
    assert aggregation_error(plain, sent) == pytest.approx(0, abs=1e-6)
    assert error(3, 1.0) == pytest.approx(1)
    assert error(2, 1.0) == error(3, 0.5) == pytest.approx(0, abs=1e-6)
    assert make("fedrot-lora").soft == 1  # type: ignore[attr-defined]


def test_fedrot_sends_the_same_product_and_turns_the_side_of_the_round() -> None:
    method = make("fedrot-lora", {"soft": 1.0})
    sent, plain, reference = {}, {}, dict[int, Tensors]()
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    rotating, fedit = (tiny_sites(m, lr=0.05) for m in (method, make("fedit")))
    for round_ in (1, 2, 3):
        reference[round_] = server["shared"]
        request = Request(kind="train", round=round_, state={"shared": server["shared"]})
        replies = [rotating[s].handle(request) for s in SITES]
        sent[round_] = replies[0].state["shared"]
        plain[round_] = fedit["a"].handle(request).state["shared"]
        server = method.aggregate(server, replies)
    assert digest({"": sent[1]}) == digest({"": plain[1]})  # nothing to turn to yet
    for round_, index in ((2, 0), (3, 1)):
        ours, theirs = pairs(sent[round_], "general"), pairs(plain[round_], "general")
        goal = pairs(reference[round_], "general")
        for layer, pair in ours.items():
            torch.testing.assert_close(product(pair), product(theirs[layer]), rtol=1e-4, atol=1e-6)
            assert (pair[index] - goal[layer][index]).norm() < (theirs[layer][index] - goal[layer][index]).norm()


def random_replies(ranks: Sequence[int], i: int = 12, o: int = 10) -> list[Reply]:
    generator = torch.Generator().manual_seed(len(ranks))
    sent = []
    for k, rank in enumerate(ranks):
        factors = (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        sent.append(reply(f"s{k}", k + 1.0, {**named({"x": factors}, "general"), "head.weight": torch.ones(1)}))
    return sent


def zero_server(method: Method, rank: int, i: int = 12, o: int = 10) -> State:
    a = torch.randn(rank, i, generator=torch.Generator().manual_seed(9))
    return method.init_server({**named({"x": (a, torch.zeros(o, rank))}, "general"), "head.weight": torch.zeros(1)})


def test_flexlora_gives_each_rank_the_best_pair_and_the_public_bug_does_not() -> None:
    """Public code writes B = U sqrt(S), A = V^T: a root of every singular value is lost."""
    sent, method = random_replies((2, 4, 6)), make("flexlora")
    server = method.aggregate(zero_server(method, 6), sent)
    exact = residual.mean_products([(r.weight, r.state["shared"]) for r in sent])["x"].float()
    u, s, v_t = torch.linalg.svd(exact)
    for site, rank in (("s0", 2), ("s1", 4), ("s2", 6)):
        found = product(pair_of(method.broadcast(server, site)))
        best = u[:, :rank] * s[:rank] @ v_t[:rank]
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)
        buggy = u[:, :rank] * s[:rank].sqrt() @ v_t[:rank]
        assert (buggy - best).norm() / best.norm() > 0.5


@pytest.mark.parametrize("weighting", ["norm", "images"])
def test_svd_of_the_product_is_nearer_to_the_exact_mean_than_padded_factors(weighting: str) -> None:
    sent, flex, het = random_replies((2, 4, 6)), make("flexlora"), make("hetlora", {"weighting": weighting})
    error = {m.name: aggregation_error(m.aggregate(zero_server(m, 6), sent)["shared"], sent) for m in (flex, het)}
    assert error["flexlora"] < 0.9 * error["hetlora"]  # type: ignore[operator]


def test_a_direction_that_carries_nothing_is_not_dead() -> None:
    """Only the site of rank 2 answers: zeros in A and in B would stay zeros in the larger adapters for ever."""
    for name in ("flexlora", "hetlora"):
        method = make(name)
        start = zero_server(method, 6)
        sent = random_replies((2,))
        a, b = pair_of(method.aggregate(start, sent))
        torch.testing.assert_close(b @ a, product(pairs(sent[0].state["shared"], "general")["x"]), rtol=1e-4, atol=1e-5)
        assert torch.equal(a[2:], pair_of(start)[0][2:])
        assert not b[:, 2:].any()
        still = [reply("s", 1.0, dict(start["shared"]))]
        assert torch.equal(pair_of(method.aggregate(start, still))[0], pair_of(start)[0])


@pytest.mark.parametrize(
    ("name", "options", "second"),
    [
        ("flexlora", {}, 1.5),
        ("flexlora", {"rest": "keep"}, 2.0),
        ("hetlora", {"weighting": "images"}, 0.75),
        ("hetlora", {"weighting": "images", "rest": "keep"}, 2.0),
        ("sdflora", {}, 2.0),
    ],
)
def test_what_a_small_site_could_not_see_by_hand(name: str, options: dict[str, object], second: float) -> None:
    """W = diag(2, 1). A site of rank 1 returns diag(2, 0) as it got it, one of rank 2 returns diag(2, 3).

    Mean of products: (0 + 3) / 2. Mean of padded factors, A_22 = (0 + 1) / 2 and B_22 = (0 + 3) / 2: 3/4. The small
    site did not see the second direction; with the server's 1 for its 0 the mean is (1 + 3) / 2.
    """
    before: State = {"shared": state([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])}
    sent = [reply("a", 1.0, state([[2.0, 0.0]], [[1.0], [0.0]]))]
    sent += [reply("b", 1.0, state([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]))]
    close(product(pair_of(make(name, options).aggregate(before, sent))), [[2.0, 0.0], [0.0, second]])


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [
        ("flexlora", {}, 0.5, 0.9),  # the paper's: it forgets, as its page says
        ("flexlora", {"rest": "keep"}, 0, 1e-6),
        ("hetlora", {}, 0.5, 0.9),
        ("hetlora", {"rest": "keep"}, 0, 1e-6),
        ("sdflora", {}, 0, 1e-6),
    ],
)
def test_at_learning_rate_zero_unequal_ranks_change_nothing(
    name: str, options: dict[str, object], low: float, high: float
) -> None:
    """Sites of rank 2, 2 and 8 (in each adapter) that only send back what they got, three times."""
    method = make(name, options)
    backbone, sites, count = backbone_of(method), tiny_sites(method, lr=0.0, weight_decay=0.0), len(method.slots)
    for site, rank in (("a", 2), ("b", 2), ("c", 8)):
        draw = partial(initial.initial_params, backbone, method, site, classes=3, seed=0, full=8 * count)
        sites[site].initial = partial(draw, rank=rank * count)
    generator = torch.Generator().manual_seed(1)
    start = {
        n: torch.randn(t.shape, generator=generator) if ".lora_B." in n else t
        for n, t in sorted(sites["c"].initial().items())
    }
    server = method.init_server(start)
    for round_ in (1, 2, 3):
        server = method.aggregate(server, one_round(method, server, sites, round_))
    old, new = pairs(start, "general"), pairs(server["shared"], "general")
    lost = sum(float((product(new[n]) - product(old[n])).square().sum()) for n in old)
    assert low <= (lost / sum(float(product(pair).square().sum()) for pair in old.values())) ** 0.5 <= high


def one_round(method: Method, server: State, sites: dict[str, Site], round_: int) -> list[Reply]:
    return [sites[s].handle(Request(kind="train", round=round_, state=method.broadcast(server, s))) for s in SITES]


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_the_model_is_that_of_the_exact_mean_of_products(name: str) -> None:
    """Two rounds, so that something is merged already. Bug of public code: a residual in W0 without alpha / r."""
    method = make(name)
    backbone, sites = backbone_of(method), tiny_sites(method, lr=0.05, steps=6)
    before = method.init_server(initial_params(backbone, method, ""))
    before = method.aggregate(before, one_round(method, before, sites, 1))
    replies = one_round(method, before, sites, 2)
    server = method.aggregate(before, replies)
    total = sum(r.weight for r in replies)
    factors = [pairs(r.state["shared"], "general") for r in replies]
    stacks = {layer: concat([f[layer] for f in factors], [r.weight / total for r in replies]) for layer in factors[0]}
    head = pick(server["shared"], lambda n: slot_of(n) is None)
    exact = {**head, **named(stacks, "general"), **residual.complete(before["shared"])}
    found = dict(method.personal(method.broadcast(server, "a"), method.init_site(sites["a"].initial())))
    tokens = tiny_data(backbone, "a").batch(torch.arange(12).numpy()).tokens
    expected = backbone.logits(exact, tokens)
    torch.testing.assert_close(backbone.logits(found, tokens), expected, rtol=1e-4, atol=1e-5)
    merged = residual.complete(server["shared"])
    assert backbone.scale != 1
    buggy = {n: t / backbone.scale if ".lora_B." in n else t for n, t in merged.items()}
    assert (backbone.logits({**found, **buggy}, tokens) - expected).abs().max() > 1e-3


def test_flora_begins_anew_at_an_address_that_all_sites_know() -> None:
    method = make("flora")
    sites = tiny_sites(method, lr=0.0, weight_decay=0.0)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    rounds = []
    for round_ in (1, 2):
        replies = one_round(method, server, sites, round_)
        assert len({digest(r.state) for r in replies}) == 1
        assert not any(b.any() for _, b in pairs(replies[0].state["shared"], "general").values())
        rounds.append(pairs(replies[0].state["shared"], "general"))
        server = method.aggregate(server, replies)
    for layer, (a, _) in rounds[0].items():
        assert not torch.equal(a, rounds[1][layer][0])


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_the_merged_matrix_comes_down_and_never_goes_up(name: str) -> None:
    """4 bytes for each entry of R; the identity beside it is made at the site."""
    method = make(name)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    down = method.broadcast(server, "a")
    assert all(".lora_B." in n for n in down["residual"])
    shapes = [(b.shape[0], a.shape[1]) for a, b in pairs(tiny_sites(method)["a"].initial(), "general").values()]
    assert n_bytes({"": down["residual"]}) == sum(4 * o * i for o, i in shapes)
    for r in one_round(method, server, tiny_sites(method), 1):
        assert not any(residual.is_residual(n) for n in r.state["shared"])


@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_two_four_and_six_in_one_run(name: str, tmp_path: Path) -> None:
    method = make(name)
    backbone, sites = backbone_of(method), tiny_sites(method)
    for site_name, site in sites.items():
        site.initial = partial(initial_params, backbone, method, site_name, rank=RANKS[site_name])
    server = method.init_server(initial_params(backbone, method, "", rank=6))
    final = federate(method, server, InProcess(sites), tiny_plan(method), Run(tmp_path))
    for site_name in SITES:
        request = Request(kind="evaluate", round=3, state=method.broadcast(final, site_name))
        assert 0 <= sites[site_name].handle(request).metrics["score"] <= 1
        assert rank_of(sites[site_name].params(request)) == RANKS[site_name]
    assert all(torch.isfinite(t).all() for t in final["shared"].values())
    assert all(t.any() for n, t in final["shared"].items() if ".lora_B." in n)
    events = [e for e in Run(tmp_path).events() if e["event"] == "round"]
    for event in events:
        sent = [event["sites"][s]["sent_bytes"] for s in SITES]
        assert sent == sorted(set(sent))
    for index, differ in ((0, False), (2, name != "flora")):  # the server learns the ranks from the first replies
        received = {events[index]["sites"][s]["received_bytes"] for s in SITES}
        assert len(received) == (3 if differ else 1)
    assert all(e["diagnostics"]["similarity"] is None for e in events)
    errors = [e["diagnostics"]["aggregation_error"] for e in events]
    assert all(e < 1e-4 for e in errors) if name == "flora" else all(0 < e < 2 for e in errors)


@pytest.mark.parametrize("name", ["fedex-lora", "flora", "fedrot-lora", "lora-fair", "flexlora", "hetlora"])
def test_diagnostics_see_what_was_merged(name: str) -> None:
    method = make(name)
    sites = tiny_sites(method, lr=0.05, steps=6)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    for round_ in (1, 2):
        before, replies = server, one_round(method, server, sites, round_)
        server = method.aggregate(server, replies)
    found = round_diagnostics(before["shared"], server["shared"], replies, {}, {})
    exact = name in ("fedex-lora", "flora")
    assert (found["aggregation_error"] < 1e-4) == exact  # type: ignore[operator]
    assert (found["similarity"] is None) == (name == "flora")  # the server has no adapter to compare with
    fedit = aggregation_error(make("fedit").aggregate({"shared": {}}, replies)["shared"], replies)
    if name == "lora-fair":
        assert found["aggregation_error"] < fedit  # type: ignore[operator]


def test_a_site_prunes_for_good_once_its_tail_shrinks(tmp_path: Path) -> None:
    method = make("hetlora", {"gamma": 0.5, "lam": 10.0, "least": 2})
    backbone, sites = backbone_of(method), tiny_sites(method, lr=0.01)
    start = initial_params(backbone, method, "")
    generator = torch.Generator().manual_seed(1)
    server: State = {
        "shared": {
            n: torch.randn(t.shape, generator=generator) * 0.1 if ".lora_B." in n else t for n, t in start.items()
        }
    }
    ranks = []
    for round_ in (1, 2):
        replies = one_round(method, server, sites, round_)
        ranks.append([rank_of(r.state["shared"]) for r in replies])
        server = method.aggregate(server, replies)
        assert rank_of(server["shared"]) == 4
    assert ranks == [[2, 2, 2], [2, 2, 2]]  # from 4 to 2, and not below `least`
    assert rank_of(method.broadcast(server, "a")["shared"]) == 2
    kept = sites["a"].store.before(3)
    assert kept is not None
    assert int(kept["private"]["rank"]) == 2
    growing = tiny_sites(make("hetlora", {"gamma": 0.5, "lam": 0.0}))["a"]  # from B = 0 a tail can only grow
    sent = growing.handle(Request(kind="train", round=1, state={"shared": start})).state["shared"]
    assert rank_of(sent) == 4


def test_the_tail_by_hand() -> None:
    """||[3 4]|| ||[0 2]|| = 10; the first direction does not count."""
    tensors = state([[7.0, 7.0], [0.0, 2.0]], [[9.0, 3.0], [9.0, 4.0]])
    assert float(tail(tensors, 1)) == pytest.approx(10.0)
    assert float(tail(tensors, 2)) == 0


@pytest.mark.parametrize("name", ["fedex-lora", "flora", "flexlora"])
def test_what_is_taken_home_predicts_the_same_as_one_adapter(name: str, tmp_path: Path) -> None:
    method = make(name)
    final, sites = tiny_run(method, tmp_path, rounds=2, lr=0.05)
    backbone = backbone_of(method)
    results = {"sites": {"a": {"held_out": False, "temperature": 1.0}}, "classes": ["alpha", "beta", "gamma"]}
    export_adapters(tmp_path / "out", method, final, sites, results, 2)
    slots = (*method.slots, *method.fixed)
    assert sorted(p.name for p in (tmp_path / "out" / "a").iterdir() if p.is_dir()) == sorted([*slots, "merged"])
    params = sites["a"].params(Request(kind="evaluate", round=2, state=method.broadcast(final, "a")))
    head = pick(params, lambda n: slot_of(n) is None)
    tokens = tiny_data(backbone, "a").batch(torch.arange(12).numpy()).tokens
    expected = backbone.logits(params, tokens)
    merged = import_(tmp_path / "out" / "a" / "merged", slot="general", scale=backbone.scale)
    found = tiny_backbone(("general",)).logits({**head, **merged}, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    without = {**params, **{n: torch.zeros_like(t) for n, t in params.items() if ".lora_B." in n}}
    assert (backbone.logits(without, tokens) - expected).abs().max() > 1e-3  # the adapters matter


def test_a_newcomer_of_a_small_rank_gets_its_part() -> None:
    method = make("flexlora")
    server = method.aggregate(zero_server(method, 6), random_replies((2, 4, 6)))
    received = method.broadcast(server, "new")
    params = method.personal(received, {"private": {"rank": torch.tensor(3)}})
    assert rank_of(received["shared"]) == 6
    assert digest({"": params}) == digest({"": cut(server["shared"], 3)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flexlora", {"rest": "zero"}),
        ("hetlora", {"rest": "zero"}),
        ("hetlora", {"weighting": "loss"}),
        ("hetlora", {"gamma": 0.0}),
        ("hetlora", {"gamma": 1.5}),
        ("hetlora", {"lam": -1.0}),
        ("hetlora", {"least": 0}),
        ("lora-fair", {"lam": -0.1}),
        ("fedrot-lora", {"soft": 1.1}),
        ("fedrot-lora", {"soft": -0.1}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="method"):
        make(name, options)
