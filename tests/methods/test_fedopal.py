"""FedOPAL's own behaviour: geometry, traps of the specification, aggregation, personal state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import (
    SITES,
    initial_params,
    tiny_backbone,
    tiny_data,
    tiny_learner,
    tiny_plan,
    tiny_run,
    tiny_sites,
)

from confrere.adapters.algebra import pairs, product
from confrere.adapters.orthogonality import penalty
from confrere.errors import ConfigError
from confrere.federation.diagnostics import adapter_overlap
from confrere.federation.loop import federate, sample
from confrere.federation.transport import InProcess
from confrere.method import Reply, Request, make
from confrere.record.run import Run
from confrere.tensors import State, digest

DUAL = ("general", "personal")


def train_once(method_name: str, initial_twist: bool, **options: object) -> dict[str, torch.Tensor]:
    method = make(method_name, options)
    sites = tiny_sites(method, steps=6)
    site = sites["a"]
    if initial_twist:  # the trap: both adapters start from one draw
        first = site.initial()
        same = {n: first[n.replace(".personal.", ".general.")] if ".personal." in n else t for n, t in first.items()}
        site.initial = lambda: same
    server = method.init_server(site.initial())
    reply = site.handle(Request(kind="train", round=1, state=method.broadcast(server, "a")))
    return dict(method.personal(reply.state, site.store.before(2) or {}))


def test_identical_initialisation_degenerates_and_ours_does_not() -> None:
    """Trap 1: equal draws receive equal gradients for ever; different draws do not."""
    twins = train_once("dual", initial_twist=True)
    ours = train_once("dual", initial_twist=False)

    # Dropout draws a mask for each adapter, so it would break the tie by noise alone: look at the mean direction.
    def gap(params: dict[str, torch.Tensor]) -> float:
        general, personal = pairs(params, "general"), pairs(params, "personal")
        left = torch.cat([b.flatten() for _, b in general.values()])
        right = torch.cat([b.flatten() for _, b in personal.values()])
        return float((left - right).norm() / left.norm())

    assert gap(ours) > 2 * gap(twins)


@pytest.mark.parametrize(("routing", "moved"), [("personal_only", "personal"), ("general_only", "general")])
def test_r_cos_reaches_one_side_only_through_the_backbone(routing: str, moved: str) -> None:
    """Inputs of later layers depend on both adapters: they are constants of the penalty."""
    backbone, method = tiny_backbone(DUAL), make("fedopal")
    generator = torch.Generator().manual_seed(0)
    params = {
        n: (t + 0.1 * torch.randn(t.shape, generator=generator)).requires_grad_()
        for n, t in initial_params(backbone, method, "a").items()
    }
    inputs: dict[str, torch.Tensor] = {}
    backbone.logits(params, tiny_data(backbone, "a").batch(np.arange(4)).tokens, capture=inputs)
    term = penalty("R-cos", params, routing=routing, inputs=inputs)
    gradients = torch.autograd.grad(term, list(params.values()), allow_unused=True)
    reached = {n.split(".")[-2] for n, g in zip(params, gradients, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == {moved}


def test_r_feat_sees_no_dropout_and_takes_none_of_its_randomness() -> None:
    """Trap 9: the penalty is of the adapters as they are; other methods' batches keep their masks."""
    backbone, method = tiny_backbone(DUAL), make("fedopal")
    learner = tiny_learner(method, "a")
    batch = next(iter(learner.batches(1, "fit")))
    params = {n: t + 0.1 for n, t in initial_params(backbone, method, "a").items()}
    clean = learner.features(params, batch)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with backbone.dropout(generator):
        inside = learner.features(params, batch)
    assert torch.equal(clean, inside)
    assert torch.equal(before, generator.get_state())


def test_products_of_zero_leave_the_factors_alive() -> None:
    """One step moves no B while the head is zero: factoring that product would set A to zero for ever."""
    method = make("fedopal", {"aggregation": "svd"})
    sites = tiny_sites(method, steps=1)
    server = method.init_server(sites["a"].initial())
    for round_ in (1, 2, 3):
        asked = {n: Request(kind="train", round=round_, state=method.broadcast(server, n)) for n in SITES}
        server = method.aggregate(server, [sites[n].handle(asked[n]) for n in SITES])
    assert all(a.abs().max() > 0 and b.abs().max() > 0 for a, b in pairs(server["shared"], "general").values())


def test_initial_draws_of_general_and_personal_differ_and_personal_by_site() -> None:
    method, backbone = make("fedopal"), tiny_backbone(DUAL)
    a, b = (initial_params(backbone, method, site) for site in ("a", "b"))
    for layer, (general, _) in pairs(a, "general").items():
        assert torch.equal(general, pairs(b, "general")[layer][0])
        assert not torch.equal(general, pairs(a, "personal")[layer][0])
        assert not torch.equal(pairs(a, "personal")[layer][0], pairs(b, "personal")[layer][0])


@pytest.mark.parametrize(
    ("regulariser", "side"), [("W-A2", "A"), ("W-B", "B"), ("R-cos", "outputs"), ("W-D", "product")]
)
@pytest.mark.slow
def test_the_penalised_side_is_separated(regulariser: str, side: str, tmp_path: Path) -> None:
    """Reproduces the geometry of the specification: several times less overlap, on the side that is penalised."""
    found = {}
    for name, options in (("free", {"regulariser": "none"}), ("kept", {"regulariser": regulariser, "lam": 5.0})):
        tiny_run(make("fedopal", options), tmp_path / name, rounds=4, steps=8)
        rounds = [e for e in Run(tmp_path / name).events() if e["event"] == "round"]
        found[name] = [v[side] for v in rounds[-1]["diagnostics"]["overlap_before"].values()]
    assert sum(found["kept"]) < 0.5 * sum(found["free"]), found


def test_overlap_is_logged_after_aggregation_with_the_averaged_adapter(tmp_path: Path) -> None:
    """Trap 5: averaging breaks orthogonality, so the averaged general adapter is what is measured."""
    method = make("fedopal", {"lam": 5.0})
    final, sites = tiny_run(method, tmp_path, rounds=2)
    last = [e for e in Run(tmp_path).events() if e["event"] == "round"][-1]["diagnostics"]
    for name in SITES:
        params = method.personal(method.broadcast(final, name), sites[name].store.before(3) or {})
        rows = sites[name].validation_rows()[:32]
        inputs: dict[str, torch.Tensor] = {}
        tiny_backbone(DUAL).features(params, sites[name].data.batch(rows).tokens, capture=inputs)
        measured = adapter_overlap(params, inputs)
        assert last["overlap_after"][name] == pytest.approx(measured)
        assert last["overlap_after"][name]["B"] != pytest.approx(last["overlap_before"][name]["B"])


def test_personal_state_survives_rounds_without_the_site(tmp_path: Path) -> None:
    """Trap 6: a site that is not sampled keeps its personal adapter."""
    method = make("fedopal")
    sites = tiny_sites(method, rounds=8)
    server = method.init_server(initial_params(tiny_backbone(DUAL), method, ""))
    federate(method, server, InProcess(sites), tiny_plan(method, rounds=8, fraction=0.34), Run(tmp_path))
    cohorts = [sample(SITES, 0.34, 0, r) for r in range(1, 9)]
    for name in SITES:
        trained = [r for r, cohort in enumerate(cohorts, 1) if name in cohort]
        for r in range(1, 9):
            past = [t for t in trained if t <= r]
            newest = sites[name].store.before(r + 1)
            expected = sites[name].store.before(past[-1] + 1) if past else None
            assert (digest(newest) if newest else None) == (digest(expected) if expected else None)
    assert any(len(c) == 1 for c in cohorts)


def test_frozen_a_never_changes_and_makes_the_mean_exact(tmp_path: Path) -> None:
    method = make("fedopal", {"aggregation": "ffa"})
    final, _ = tiny_run(method, tmp_path)
    start = Run(tmp_path).server(0)
    for name, value in final["shared"].items():
        if ".lora_A." in name:
            assert torch.equal(value, start["shared"][name])
    errors = [e["diagnostics"]["aggregation_error"] for e in Run(tmp_path).events() if e["event"] == "round"]
    assert max(errors) < 1e-3


def replies_with(method_name: str, seeds: tuple[int, ...]) -> tuple[State, list[Reply]]:
    method, backbone = make(method_name), tiny_backbone(DUAL)
    server = method.init_server(initial_params(backbone, method, ""))
    replies = []
    for k, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        sent = {n: torch.randn(t.shape, generator=g) for n, t in server["shared"].items()}
        replies.append(Reply(site=f"s{k}", round=1, state={"shared": sent}, weight=float(k + 1)))
    return server, replies


def test_factor_averaging_is_the_weighted_mean_of_factors() -> None:
    server, replies = replies_with("fedopal", (1, 2))
    merged = make("fedopal").aggregate(server, replies)["shared"]
    for name, value in merged.items():
        expected = (1 * replies[0].state["shared"][name] + 2 * replies[1].state["shared"][name]) / 3
        torch.testing.assert_close(value, expected)


def test_svd_aggregation_is_the_best_rank_r_fit_of_the_mean_product() -> None:
    server, replies = replies_with("fedopal", (3, 4, 5))
    merged = make("fedopal", {"aggregation": "svd"}).aggregate(server, replies)["shared"]
    for layer, pair in pairs(merged, "general").items():
        mean = sum((r.weight / 6) * product(pairs(r.state["shared"], "general")[layer]).double() for r in replies)
        u, s, vt = torch.linalg.svd(torch.as_tensor(mean))
        rank = pair[0].shape[0]
        best = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
        torch.testing.assert_close(product(pair).double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regulariser": "W-C"}, "W-A1, W-A2"),
        ({"routing": "none"}, "personal_only"),
        ({"head": "mine"}, "shared, local"),
        ({"aggregation": "mean"}, "factor, ffa, svd"),
        ({"lam": -1.0}, "must not be negative"),
        ({"lam": "x"}, "float"),
        ({"lamda": 1.0}, "did you mean 'lam'"),
        ({"lam": float("nan")}, "no finite number"),
    ],
)
def test_wrong_options_name_the_key_and_the_way_out(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("fedopal", options)
