"""FedAMP, FedACS and IFCA: who learns from whom is decided by how alike the sites' models are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import backbone_of, initial_params, tiny_learner, tiny_run

from confrere.adapters.clusters import founders
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.methods.fedacs import cosine
from confrere.tensors import State, Tensors, weighted_mean

ADAPTER = "x.lora_A.general.weight"


def one(*values: float) -> Tensors:
    return {ADAPTER: torch.tensor(values)}


def server_of(method: Method, models: dict[str, Tensors], round_: int = 1) -> State:
    start = {n: torch.zeros_like(t) for n, t in next(iter(models.values())).items()}
    replies = [Reply(site=s, round=round_, state={"shared": m}) for s, m in sorted(models.items())]
    return method.aggregate(method.init_server(start), replies)


def message(method: Method, models: dict[str, Tensors], site: str, round_: int = 1) -> list[float]:
    found = method.broadcast(server_of(method, models, round_), site)["message"][ADAPTER]
    return [float(x) for x in found]


def test_fedamp_message_by_hand() -> None:
    """w = 0, 1, 2 and sigma = 2, alpha = 0.5: a_01 = .25 e^-.5, a_02 = .25 e^-2, u_0 = a_01 + 2 a_02."""
    method = make("fedamp", {"relative": False, "sigma": 2.0, "alpha": 0.5})
    models = {"a": one(0.0), "b": one(1.0), "c": one(2.0)}
    expected = 0.25 * math.exp(-0.5) + 2 * 0.25 * math.exp(-2)
    assert message(method, models, "a") == pytest.approx([expected], rel=1e-6)


def test_fedamp_relative_distances_ignore_the_unit() -> None:
    """Mean squared distance of 0, 1, 2 is (1 + 1 + 4) / 3 = 2, so sigma = 1 is what 2 was in absolute terms."""
    relative = make("fedamp", {"alpha": 0.25, "sigma": 1.0})
    models = {"a": one(0.0), "b": one(1.0), "c": one(2.0)}
    expected = 0.25 * math.exp(-0.5) + 2 * 0.25 * math.exp(-2)
    assert message(relative, models, "a") == pytest.approx([expected], rel=1e-6)
    large = {s: {n: t * 1e3 for n, t in m.items()} for s, m in models.items()}
    assert message(relative, large, "a") == pytest.approx([expected * 1e3], rel=1e-6)
    assert message(relative, dict.fromkeys("abc", one(3.0)), "a") == pytest.approx([3.0])  # all distances zero


def test_fedamp_stays_convex_and_ends_at_the_mean() -> None:
    """alpha / sigma = 100 would give a_ii = 1 - 200: the sum is scaled down to (K - 1) / K, the plain mean."""
    method = make("fedamp", {"relative": False, "sigma": 1e6, "alpha": 1e8})
    models = {"a": one(0.0), "b": one(3.0), "c": one(6.0)}
    assert all(message(method, models, s) == pytest.approx([3.0], rel=1e-5) for s in models)


@pytest.mark.parametrize(("name", "options"), [("fedamp", {"alpha": 0.5}), ("fedacs", {"step": 0.5})])
def test_the_coupling_has_a_gradient(name: str, options: dict[str, object]) -> None:
    """A public implementation detaches both sides of the term: there lam changes nothing. Here it pulls back.

    The first step starts at u itself, where the term is zero; so the bound is on where several steps lead.
    """
    gaps = []
    for lam in (0.0, 50.0):
        method = make(name, {**options, "lam": lam})
        g = torch.Generator().manual_seed(0)
        start = initial_params(backbone_of(method), method, "a")
        u = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in sorted(start.items())}
        learner = tiny_learner(method, "a")
        payload, _ = method.update(learner, {"shared": start, "message": u}, {})
        gaps.append(sum(float((payload["shared"][n] - u[n]).square().sum()) for n in u))
    assert gaps[1] < 0.9 * gaps[0]
    assert make(name, {**options, "lam": 0.3}).pull() == pytest.approx(0.6)


def test_fedacs_message_by_hand() -> None:
    """a = (1, 0), b = (1, 1), c = (-1, 1): s_ab = 1/sqrt 2, s_ac = -1/sqrt 2, row mean 0, so b alone passes.

    a_ab = s / (1 + s) with s = 1/sqrt 2, and u_a = a + a_ab (b - a) = (1, a_ab).
    """
    models = {"a": one(1.0, 0.0), "b": one(1.0, 1.0), "c": one(-1.0, 1.0)}
    s = 1 / math.sqrt(2)
    assert message(make("fedacs"), models, "a") == pytest.approx([1.0, s / (1 + s)], rel=1e-6)
    half = make("fedacs", {"step": 0.5})
    assert message(half, models, "a") == pytest.approx([1.0, 0.5 * s / (1 + s)], rel=1e-6)


def test_a_negative_similarity_attracts_nobody() -> None:
    models = {"a": one(1.0, 0.0), "b": one(-1.0, 0.0)}
    assert message(make("fedacs", {"threshold": "none"}), models, "a") == [1.0, 0.0]


def alike(groups: int = 2, per: int = 3) -> dict[str, Tensors]:
    """Return models that differ little from one common start: their raw cosines saturate."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=g)
    models = {}
    for k in range(groups):
        direction = 0.05 * torch.randn(200, generator=g)
        for i in range(per):
            models[f"{'ab'[k]}{i}"] = {ADAPTER: start + direction + 0.01 * torch.randn(200, generator=g)}
    return models


def test_raw_cosines_saturate_and_only_a_relative_threshold_tells_groups_apart() -> None:
    """The trap: 0.998 within a group and 0.99 across, so a fixed threshold selects all and the method is FedAvg."""
    models = alike()
    cosines = [cosine(models["a0"], models[s]) for s in models if s != "a0"]
    assert min(cosines) > 0.98
    mean = weighted_mean([(1.0, m) for m in models.values()])[ADAPTER]
    group = weighted_mean([(1.0, models[s]) for s in ("a0", "a1", "a2")])[ADAPTER]

    def sent(**options: object) -> torch.Tensor:
        return torch.tensor(message(make("fedacs", options), models, "a0"))

    for same in ({"threshold": "none"}, {"threshold": "fixed", "delta": 0.5}):
        torch.testing.assert_close(sent(**same), mean, atol=1e-3, rtol=0)
    for dynamic in ({}, {"threshold": "quantile", "quantile": 0.6}):
        torch.testing.assert_close(sent(**dynamic), group, atol=1e-3, rtol=0)


def test_similarity_of_updates_takes_the_common_start_away() -> None:
    """Starts at (10, 0); updates (0, 1), (0, 1) and (0, -1): raw cosines all near 1, those of updates 1 and -1."""
    method = make("fedacs", {"similarity": "updates", "threshold": "fixed", "delta": 0.5})
    models = {"a": one(10.0, 1.0), "b": one(10.0, 1.0), "c": one(10.0, -1.0)}
    replies = [Reply(site=s, round=1, state={"shared": m}) for s, m in models.items()]
    server = method.aggregate(method.init_server(one(10.0, 0.0)), replies)
    assert method.broadcast(server, "a")["message"][ADAPTER].tolist() == [10.0, 1.0]
    raw = make("fedacs", {"threshold": "fixed", "delta": 0.5})
    assert message(raw, models, "a")[1] == pytest.approx(1 / 3, abs=0.02)


def test_thresholds_by_hand() -> None:
    """Of 0.1, 0.2, 0.6: mean 0.3; median 0.2; rising to it from the least, half way at the half-life: quantile .25."""
    row = [0.1, 0.2, 0.6]
    assert make("fedacs").least(row, 1) == pytest.approx(0.3)
    assert make("fedacs", {"threshold": "quantile"}).least(row, 1) == pytest.approx(0.2)
    rising = make("fedacs", {"threshold": "rising", "halflife": 4})
    assert rising.least(row, 0) == pytest.approx(0.1)
    assert rising.least(row, 4) == pytest.approx(0.15)
    assert rising.least(row, 400) == pytest.approx(0.2)
    assert make("fedacs", {"threshold": "fixed", "delta": 0.7}).least(row, 1) == 0.7


def test_equal_similarities_pass_their_own_mean() -> None:
    """0.1 three times has a mean of 0.10000000000000002: rounding must not cast everybody out."""
    models = {s: {ADAPTER: torch.eye(4)[k] + 0.3} for k, s in enumerate("abcd")}
    server = server_of(make("fedacs"), models)
    weights = make("fedacs").attention(server, models, "a")
    assert len(set(map(round, (w * 1e6 for w in weights.values())))) == 1
    assert min(weights.values()) > 0


@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_the_head_enters_the_comparison_only_on_request(name: str) -> None:
    models = {
        "a": {ADAPTER: torch.tensor([1.0, 0.0]), "head.weight": torch.tensor([9.0, 0.0])},
        "b": {ADAPTER: torch.tensor([1.0, 0.1]), "head.weight": torch.tensor([-9.0, 0.0])},
        "c": {ADAPTER: torch.tensor([0.0, 1.0]), "head.weight": torch.tensor([9.0, 0.1])},
    }
    for what, friend, other in (("adapters", "b", "c"), ("all", "c", "b")):
        method = make(name, {"compared": what})
        weights = method.attention(server_of(method, models), models, "a")
        assert weights[friend] > weights[other]


@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_a_site_predicts_with_what_it_trained_and_an_unseen_one_with_the_mean(name: str, tmp_path: Path) -> None:
    method = make(name)
    final, sites = tiny_run(method, tmp_path, rounds=2)
    received = method.broadcast(final, "a")
    own = sites["a"].params(Request(kind="evaluate", round=2, state=received))
    general = sites["a"].params(Request(kind="evaluate", round=2, state=received, model="general"))
    assert all(torch.equal(t, final["site.a"][n]) for n, t in own.items())
    assert all(torch.equal(t, final["shared"][n]) for n, t in general.items())
    assert set(method.broadcast(final, "newcomer")) == {"shared"}
    assert not torch.equal(received["message"]["head.weight"], method.broadcast(final, "b")["message"]["head.weight"])


def test_clusters_are_founded_far_apart() -> None:
    """0, 1, 10 with mean 11/3: 10 is farthest from the mean, 0 farthest from 10, 1 is what is left."""
    models = [one(0.0), one(1.0), one(10.0)]
    chosen = founders(models, one(11 / 3), 3)
    assert [float(m[ADAPTER]) for m in chosen] == [10.0, 0.0, 1.0]
    assert len(founders(models[:1], models[0], 2)) == 2


def test_ifca_averages_each_cluster_alone_and_leaves_the_unchosen() -> None:
    """Cluster 0: (1 * 2 + 3 * 6) / 4 = 5; cluster 1: 8; cluster 2: nobody; mean of all (2 + 18 + 2 * 8) / 6 = 6."""
    method = make("ifca", {"clusters": 3})
    server = {"shared": one(0.0), **{f"cluster.{j}": one(float(-j)) for j in range(3)}}
    replies = [
        Reply(site=s, round=2, weight=w, state={"shared": one(x), "choice": {"cluster": torch.tensor([float(j)])}})
        for s, w, x, j in (("a", 1.0, 2.0, 0), ("b", 3.0, 6.0, 0), ("c", 2.0, 8.0, 1))
    ]
    merged = method.aggregate(server, replies)
    assert {g: float(t[ADAPTER]) for g, t in method.broadcast(merged, "a").items()} == pytest.approx(
        {"shared": 6.0, "cluster.0": 5.0, "cluster.1": 8.0, "cluster.2": -2.0}
    )


def test_the_mean_of_ifca_counts_every_site_by_its_last_choice() -> None:
    """Then c alone answers, with 12 and weight 4: clusters 5 and 12, weights 1 + 3 and 4, so 8.5 (c's model is 12).

    b moves to cluster 1 with 0: clusters 5 (a) and 0 (b and c), weights 1 and 3 + 4, so 5/8. Of the last cohort: 0.
    """
    method = make("ifca", {"clusters": 2})
    server = {"shared": one(0.0), **{f"cluster.{j}": one(float(-j)) for j in range(2)}}
    means = []
    for came in (
        (("a", 1.0, 2.0, 0), ("b", 3.0, 6.0, 0), ("c", 2.0, 8.0, 1)),
        (("c", 4.0, 12.0, 1),),
        (("b", 3.0, 0.0, 1),),
    ):
        replies = [
            Reply(site=s, round=2, weight=w, state={"shared": one(x), "choice": {"cluster": torch.tensor([float(j)])}})
            for s, w, x, j in came
        ]
        server = method.aggregate(server, replies)
        means.append(float(method.broadcast(server, "new")["shared"][ADAPTER]))
    assert means == pytest.approx([6.0, 8.5, 5 / 8])


@pytest.mark.parametrize("name", ["fedamp", "fedacs"])
def test_the_general_model_is_the_mean_of_all_sites_and_not_of_the_last_cohort(name: str) -> None:
    """a, b, c send 1, 2, 6 with weights 1, 2, 3: 23/6. Then b alone sends 8 with weight 4: (1 + 32 + 18) / 8."""
    method = make(name)
    server = method.init_server(one(0.0))
    first = [("a", 1.0, 1.0), ("b", 2.0, 2.0), ("c", 6.0, 3.0)]
    for came, mean in ((first, 23 / 6), ([("b", 8.0, 4.0)], 51 / 8)):
        replies = [Reply(site=s, round=1, state={"shared": one(x)}, weight=w) for s, x, w in came]
        server = method.aggregate(server, replies)
        assert float(method.broadcast(server, "new")["shared"][ADAPTER]) == pytest.approx(mean)


def test_ifca_takes_the_model_of_least_training_loss() -> None:
    """A head that favours the right class for every image against one that favours a wrong one."""
    method = make("ifca")
    learner = tiny_learner(method, "a")
    start = initial_params(backbone_of(method), method, "a")
    good = learner.fit(start, steps=20)
    bad = {**good, "head.weight": -good["head.weight"]}
    for models, expected in (((bad, good), 1), ((good, bad), 0)):
        received = {"shared": start, **{f"cluster.{j}": m for j, m in enumerate(models)}}
        payload, state = method.update(learner, received, {})
        assert float(payload["choice"]["cluster"]) == expected
        assert method.personal(received, state) is models[expected]
        assert method.personal(received, {}) is start


@pytest.mark.parametrize(("balance", "expected"), [("none", 0), ("sampling", 1), ("weights", 1)])
def test_ifca_chooses_by_the_loss_that_is_trained(balance: str, expected: int) -> None:
    """Of 12 training images 10 are alpha. One model says alpha to all, at 0.9; the other nothing, at 1/3.

    By images: 10/12 * 0.105 + 2/12 * 3.0 = 0.59 against 1.10: the first. By classes: (0.105 + 2 * 3.0) / 3 = 2.03
    against 1.10: the second, which is what balanced batches would improve on.
    """
    method = make("ifca")
    learner = tiny_learner(method, "a")
    rows = learner.data.rows("train")
    assert len(rows) == 12
    labels = np.zeros_like(learner.data.labels)
    labels[rows[:2]] = [1, 2]
    learner.data = replace(learner.data, labels=labels)
    learner.settings = replace(learner.settings, balance=balance)
    start = initial_params(backbone_of(method), method, "a")
    sure = {**start, "head.bias": torch.log(torch.tensor([0.9, 0.05, 0.05]))}
    received = {"shared": start, "cluster.0": sure, "cluster.1": start}
    by_image = (10 * -math.log(0.9) - 2 * math.log(0.05)) / 12
    by_class = (-math.log(0.9) - 2 * math.log(0.05)) / 3
    found = learner.mean_loss(sure, "train")
    assert found == pytest.approx(by_image if balance == "none" else by_class, rel=1e-4)
    assert learner.mean_loss(start, "train") == pytest.approx(math.log(3), rel=1e-4)
    assert float(method.update(learner, received, {})[0]["choice"]["cluster"]) == expected


def test_few_images_decide_drawn_anew_each_round_and_all_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method, learner = make("ifca", {"images": 4}), tiny_learner(make("ifca"), "a")
    start = initial_params(backbone_of(method), method, "a")
    received = {"shared": start, "cluster.0": start, "cluster.1": start}
    asked, mean_loss = [], type(learner).mean_loss

    def told(self: Learner, params: Tensors, split: str) -> float:
        asked.append(tuple(self.data.rows(split)))
        return mean_loss(self, params, split)

    monkeypatch.setattr(Learner, "mean_loss", told)
    for round_ in (1, 2):
        learner.round = round_
        for _ in range(2):
            method.update(learner, received, {})
    assert asked[0] == asked[1] == asked[2] == asked[3]  # both models, and the same round again
    assert asked[4] == asked[7] != asked[0]
    train = set(learner.data.rows("train"))
    assert all(len(rows) == 4 and set(rows) < train for rows in asked)
    for images in (0, 12, 500):
        del asked[:]
        make("ifca", {"images": images}).update(learner, received, {})
        assert set(asked[0]) == train


def test_clusters_start_apart_in_both_ways(tmp_path: Path) -> None:
    """Equal starts would be one cluster for ever: every site would pick the first."""
    final, _ = tiny_run(make("ifca"), tmp_path / "sites", rounds=1)
    assert not torch.equal(final["cluster.0"]["head.weight"], final["cluster.1"]["head.weight"])
    method = make("ifca", {"start": "draw"})
    params = initial_params(backbone_of(method), method, "")
    drawn = method.init_server(params)
    heads = [drawn[f"cluster.{j}"]["head.weight"] for j in range(2)]
    assert not torch.equal(heads[0], heads[1])
    assert float(heads[0].std()) == pytest.approx(heads[0].shape[1] ** -0.5, rel=0.2)
    assert torch.equal(method.init_server(params)["cluster.1"]["head.weight"], heads[1])
    other = method.init_server(initial_params(backbone_of(method), method, "", seed=1))
    assert not torch.equal(other["cluster.0"]["head.weight"], heads[0])
    tiny_run(method, tmp_path / "draw", rounds=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedamp", {"alpha": 0.0}, "alpha"),
        ("fedamp", {"sigma": -1.0}, "sigma"),
        ("fedamp", {"lam": -1.0}, "lam >= 0"),
        ("fedamp", {"compared": "head"}, "adapters, all"),
        ("fedacs", {"threshold": "median"}, "mean, fixed"),
        ("fedacs", {"similarity": "cosine"}, "weights, updates"),
        ("fedacs", {"step": 1.5}, "step"),
        ("fedacs", {"halflife": 0}, "halflife"),
        ("ifca", {"clusters": 1}, "clusters >= 2"),
        ("ifca", {"start": "same"}, "sites, draw"),
        ("ifca", {"images": -1}, "images >= 0"),
    ],
)
def test_wrong_options_name_the_way_out(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)
