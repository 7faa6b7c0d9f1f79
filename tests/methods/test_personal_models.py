"""Ditto, APFL and FLOP: a model (or a head) of each site's own beside the one that is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import backbone_of, initial_params, tiny_learner, tiny_plan, tiny_run, tiny_sites

from confrere.errors import ConfigError
from confrere.federation.loop import federate
from confrere.federation.transport import Failure, InProcess
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.methods.apfl import mixture
from confrere.methods.two_models import divide
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, dot, sq_dist, sub


def moved(method: Method, seed: int) -> Tensors:
    """Return initial tensors that are none of them zero, so that every gradient is there."""
    g = torch.Generator().manual_seed(seed)
    start = initial_params(backbone_of(method), method, "a")
    return {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in sorted(start.items())}


def learner_of(method: Method, **settings: object) -> Learner:
    learner = tiny_learner(method, "a")
    learner.settings = replace(learner.settings, **settings)  # type: ignore[arg-type]
    return learner


@pytest.mark.parametrize(
    ("steps", "share", "expected"), [(10, 0.5, (5, 5)), (3, 0.5, (1, 2)), (2, 0.9, (1, 1)), (10, 0.3, (7, 3))]
)
def test_a_round_is_divided_between_two_models(steps: int, share: float, expected: tuple[int, int]) -> None:
    assert divide(steps, share) == expected


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_both_models_together_take_the_steps_of_a_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    batches = Learner.batches

    def counted(self: Learner, steps: int, tag: str):  # type: ignore[no-untyped-def]
        taken.append(steps)
        return batches(self, steps, tag)

    monkeypatch.setattr(Learner, "batches", counted)
    method = make(name)
    method.update(learner_of(method, steps=7), {"shared": moved(method, 0)}, {})
    assert len(taken) == 2
    assert sum(taken) == 7


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_one_step_a_round_is_refused_with_the_way_out(name: str) -> None:
    method = make(name)
    with pytest.raises(ConfigError, match=r"train\.steps=2"):
        method.update(learner_of(method, steps=1), {"shared": moved(method, 0)}, {})


def test_ditto_step_by_hand() -> None:
    """One personal step of Algorithm 1: v' = AdamW(v, grad F(v) + lam (v - w)); AdamW's first step is -lr sign(g).

    With v - w = 10 everywhere and lam = 1 the pull of 10 outweighs any gradient of the task, so after clipping (which
    keeps signs) each entry moves by -lr. Without the pull they move either way. w itself must not feel it.
    """
    for lam, alike in ((1.0, True), (0.0, False)):
        method = make("ditto", {"lam": lam})
        w = moved(method, 0)
        v = {n: t + 10 for n, t in w.items()}
        learner = learner_of(method, steps=2, lr=1e-3, weight_decay=0.0)
        payload, state = method.update(learner, {"shared": w}, {"private": v})
        steps = torch.cat([t.flatten() for t in sub(state["private"], v).values()])
        down = (steps - -1e-3).abs() < 1e-5
        assert bool(down.float().mean() > 0.99) == alike
        assert float(sq_dist(payload["shared"], w)) > 0
        plain = learner_of(method, steps=2, lr=1e-3, weight_decay=0.0).fit(w, steps=1)
        assert all(torch.equal(payload["shared"][n], plain[n]) for n in plain)


def test_a_stronger_pull_keeps_ditto_nearer() -> None:
    gaps = []
    for lam in (0.0, 10.0):
        method = make("ditto", {"lam": lam})
        w, state = moved(method, 0), {}
        for round_ in range(1, 5):
            learner = learner_of(method, steps=10, lr=1e-2)
            learner.round = round_
            _, state = method.update(learner, {"shared": w}, state)
        gaps.append(float(sq_dist(state["private"], w)))
    assert gaps[1] < 0.5 * gaps[0]


def test_apfl_mixes_by_hand() -> None:
    """0.25 * 8 + 0.75 * 4 = 5; the global side is the one that is received, not the one that was trained."""
    method = make("apfl", {"alpha": 0.25})
    state = {"private": {"x": torch.tensor([8.0])}, "mixture": {"alpha": torch.tensor(0.25)}}
    assert method.personal({"shared": {"x": torch.tensor([4.0])}}, state)["x"].tolist() == [5.0]
    assert method.personal({"shared": {"x": torch.tensor([4.0])}}, {})["x"].tolist() == [4.0]


def test_apfl_moves_alpha_by_the_gradient_of_the_mixture() -> None:
    """d F(alpha v + (1 - alpha) w') / d alpha = <v - w', grad F(m)>, here by hand on the batch of the single step."""
    method = make("apfl", {"alpha": 0.5, "alpha_lr": 0.01})
    w, v = moved(method, 0), moved(method, 1)
    learner = learner_of(method, steps=2, lr=1e-3)
    payload, state = method.update(learner, {"shared": w}, {"private": v})
    trained = payload["shared"]
    mixed = {n: t.requires_grad_() for n, t in mixture(torch.tensor(0.5), v, trained).items()}
    batch = next(iter(learner.batches(1, "personal")))
    with learner.backbone.dropout(torch_generator(0, "dropout", "personal", 1, "a")):
        gradient = torch.autograd.grad(learner.loss(mixed, batch), list(mixed.values()))
    slope = float(dot(sub(v, trained), dict(zip(mixed, gradient, strict=True))))
    assert slope != 0
    assert float(state["mixture"]["alpha"]) == pytest.approx(0.5 - 0.01 * slope, abs=1e-6)


@pytest.mark.parametrize(("alpha", "trains"), [(0.0, False), (0.5, True)])
def test_apfl_trains_v_only_as_far_as_it_counts(alpha: float, trains: bool) -> None:
    """grad_v = alpha grad F(m): with alpha = 0 the personal model stays, and alpha = 0 can still be left."""
    method = make("apfl", {"alpha": alpha})
    w, v = moved(method, 0), moved(method, 1)
    _, state = method.update(learner_of(method, steps=4, weight_decay=0.0), {"shared": w}, {"private": v})
    assert (float(sq_dist(state["private"], v)) > 0) == trains
    fixed = make("apfl", {"alpha": alpha, "adaptive": False})
    _, other = fixed.update(learner_of(fixed, steps=4), {"shared": w}, {"private": v})
    assert float(other["mixture"]["alpha"]) == alpha


def test_apfl_keeps_alpha_in_range_and_at_the_site() -> None:
    method = make("apfl", {"alpha_lr": 1e6})
    payload, state = method.update(learner_of(method), {"shared": moved(method, 0)}, {"private": moved(method, 1)})
    assert 0.0 <= float(state["mixture"]["alpha"]) <= 1.0
    assert set(payload) == {"shared"}
    assert not any("alpha" in name for name in payload["shared"])


def replies(*values: tuple[float, float]) -> list[Reply]:
    return [
        Reply(site=f"s{k}", round=1, state={"shared": {"x": torch.tensor([value])}}, weight=weight)
        for k, (weight, value) in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "mean"), [("flop", 4.0), ("flop-released", 4.0), ("fedit", 2.4)])
def test_flop_counts_sites_equally(name: str, mean: float) -> None:
    """(2 + 6) / 2 = 4, where the weighted mean is (9 * 2 + 1 * 6) / 10 = 2.4."""
    server = make(name).aggregate({"shared": {"x": torch.zeros(1)}}, replies((9.0, 2.0), (1.0, 6.0)))
    assert server["shared"]["x"].tolist() == pytest.approx([mean])


def test_flop_never_sends_a_head_and_its_code_does() -> None:
    """What the paper states, and fault 2 of the release: the averaged tensors hold the "private" head."""
    for name, sends in (("flop", False), ("flop-released", True)):
        method = make(name)
        site = tiny_sites(method)["a"]
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        reply = site.handle(Request(kind="train", round=1, state=method.broadcast(server, "a")))
        assert ("head.weight" in reply.state["shared"]) == sends
        assert ("head.weight" in server["shared"]) == sends
        assert method.has_general() == sends


def trained_from(method: Method, own: Tensors, received: State) -> Tensors:
    """Return what a site of another head than the received one would start from."""
    seen: list[Tensors] = []

    class Watching(Learner):
        def fit(self, params: Tensors, **_: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            seen.append(params)
            return dict(params)

    watching = Watching(**{k: v for k, v in vars(tiny_learner(method, "a")).items() if k != "metrics"})
    group = "private" if method.name == "flop" else "shared"
    method.update(watching, received, {group: own})
    return seen[0]


def test_only_the_stated_method_trains_from_its_own_head() -> None:
    """Fault 1 of the release: the own head is never loaded back, so training starts from the averaged one."""
    own = {"head.weight": torch.ones(1), "head.bias": torch.ones(1)}
    averaged = {"x": torch.zeros(1), "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    stated, released = make("flop"), make("flop-released")
    assert trained_from(stated, own, {"shared": {"x": torch.zeros(1)}})["head.weight"] == 1
    assert trained_from(released, own, {"shared": averaged})["head.weight"] == 0
    # Fault 3: evaluation alone takes the own head; an unseen site has the averaged one.
    assert released.personal({"shared": averaged}, {"shared": own})["head.weight"] == 1
    assert released.personal({"shared": averaged}, {})["head.weight"] == 0


class WithoutA(InProcess):
    """Site ``a`` does not train in round 3."""

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        here = {n: r for n, r in requests.items() if (n, r.kind, r.round) != ("a", "train", 3)}
        return [*super().exchange(here), *(Failure(n, "no answer") for n in requests.keys() - here.keys())]


def test_flop_heads_survive_a_round_without_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 3 runs without a; in round 4 it trains from the head of its round 2, in the adapter of round 3."""
    began: dict[tuple[int, str], Tensors] = {}
    ended: dict[tuple[int, str], Tensors] = {}
    fit = Learner.fit

    def watched(self: Learner, params: Tensors, **options: Any) -> dict[str, torch.Tensor]:
        began[self.round, self.site] = {n: t.clone() for n, t in params.items()}
        ended[self.round, self.site] = fit(self, params, **options)
        return dict(ended[self.round, self.site])

    monkeypatch.setattr(Learner, "fit", watched)
    method, run = make("flop"), Run(tmp_path)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    federate(method, server, WithoutA(tiny_sites(method, rounds=4)), tiny_plan(method, rounds=4), run)
    assert [k for k in sorted(began) if k[1] == "a"] == [(1, "a"), (2, "a"), (4, "a")]
    for part in ("head.weight", "head.bias"):
        assert torch.equal(began[4, "a"][part], ended[2, "a"][part])
        assert torch.equal(began[4, "b"][part], ended[3, "b"][part])
        others = [began[1, "a"], ended[1, "a"], ended[2, "b"], ended[3, "b"], ended[3, "c"]]
        assert not any(torch.equal(began[4, "a"][part], other[part]) for other in others)
    received = run.server(3)["shared"]
    assert all(torch.equal(began[4, "a"][name], value) for name, value in received.items())


@pytest.mark.parametrize("name", ["ditto", "apfl", "flop-released"])
def test_an_unseen_site_has_the_mean_model(name: str, tmp_path: Path) -> None:
    method = make(name)
    final, sites = tiny_run(method, tmp_path, rounds=2)
    asked = Request(kind="evaluate", round=2, state=method.broadcast(final, "a"), model="general")
    general = sites["a"].params(asked)
    assert all(torch.equal(general[n], t) for n, t in final["shared"].items())
    own = sites["a"].params(replace(asked, model="personalised"))
    assert not torch.equal(own["head.weight"], general["head.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ditto", {"lam": -1.0}, "lam >= 0"),
        ("ditto", {"share": 1.0}, "share"),
        ("apfl", {"alpha": 1.5}, "alpha <= 1"),
        ("apfl", {"alpha_lr": -0.1}, "alpha_lr"),
        ("apfl", {"share": 0.0}, "share"),
    ],
)
def test_wrong_options_name_the_way_out(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)
