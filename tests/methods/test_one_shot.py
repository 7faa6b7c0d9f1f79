"""Methods that need one exchange: ridge against scikit-learn, data vectors against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from tiny_federation import SITES, backbone_of, initial_params, tiny_data, tiny_run, tiny_sites

from confrere.adapters import lora
from confrere.adapters.algebra import named, norm, pairs, product
from confrere.adapters.vectors import fuse, members, shares, stack, times
from confrere.backbones import Backbone, load
from confrere.config import validate
from confrere.errors import ConfigError
from confrere.initial import initial_params as draw
from confrere.learner import Learner, TrainSettings, predict
from confrere.method import Method, Reply, Request, make
from confrere.methods.data_vectors import GRID
from confrere.methods.ridge import SHARPNESS, solve
from confrere.record.run import Run
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors, digest, weighted_mean
from confrere.tokenset import TokenSet

SIZES = {"a": 24, "b": 48, "c": 16}


def learners(method: Method, balance: str = "none") -> dict[str, Learner]:
    """Return sites of unequal size, in round 1 of 1."""
    backbone = backbone_of(method)
    settings = TrainSettings(steps=3, batch_size=6, balance=balance)
    return {
        name: Learner(
            backbone=backbone,
            data=tiny_data(backbone, name, size),
            settings=settings,
            seed=0,
            site=name,
            round=1,
            rounds=1,
        )
        for name, size in SIZES.items()
    }


def ridge_of(found: dict[str, Learner], lam: float) -> tuple[State, list[Reply]]:
    method = make("ridge", {"lam": lam})
    start = initial_params(backbone_of(method), method, "")
    server = method.init_server(start)
    replies = []
    for name, learner in found.items():
        sent, _ = method.update(learner, method.broadcast(server, name), method.init_site(start))
        weight = float(len(learner.data.rows("train")))
        replies.append(Reply(site=name, round=1, state=sent, weight=weight))
    return method.aggregate(server, replies), replies


def pooled_features(found: dict[str, Learner]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, labels and balanced weights (each site counting by its images) of all training images."""
    method = make("ridge")
    params = initial_params(backbone_of(method), method, "")
    features, labels, weights = [], [], []
    for learner in found.values():
        rows = learner.data.rows("train")
        with torch.no_grad():
            features.append(learner.backbone.features(params, learner.data.batch(rows).tokens).double().numpy())
        mine = learner.data.labels[rows]
        labels.append(mine)
        weights.append(len(rows) / (len(np.unique(mine)) * np.bincount(mine)[mine]))
    return np.concatenate(features), np.concatenate(labels), np.concatenate(weights)


@pytest.mark.parametrize("balance", ["none", "sampling", "weights"])
@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
def test_ridge_is_scikit_learns_on_pooled_features(balance: str, lam: float) -> None:
    """scikit-learn minimises ``sum_n w_n (y - Vf - v)^2 + alpha ||V||^2``: alpha = rho * sum of weights."""
    method = make("ridge")
    found = learners(method, balance)
    server, _ = ridge_of(found, lam)
    x, y, w = pooled_features(found)
    w = w if balance != "none" else np.ones(len(x))
    mean = np.average(x, axis=0, weights=w)
    variance = np.average((x - mean) ** 2, axis=0, weights=w).mean()
    theirs = Ridge(alpha=lam * variance * w.sum()).fit(x, np.eye(3)[y], sample_weight=w)
    ours = {n: t.double().numpy() / SHARPNESS for n, t in server["shared"].items()}
    assert set(ours) == {"head.weight", "head.bias"}
    np.testing.assert_allclose(ours["head.weight"], theirs.coef_, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours["head.bias"], theirs.intercept_, atol=1e-5, rtol=1e-5)


def dealt(found: dict[str, Learner], parts: dict[str, np.ndarray], balance: str) -> dict[str, Learner]:
    """Return sites that hold the given of all training images, numbered through."""
    rows = {name: learner.data.rows("train") for name, learner in found.items()}
    tokens = np.concatenate([found[n].data.batch(r).tokens.numpy() for n, r in rows.items()])
    labels = np.concatenate([found[n].data.labels[r] for n, r in rows.items()])
    some = next(iter(found.values()))
    return {
        name: replace(
            some,
            site=name,
            settings=replace(some.settings, balance=balance),
            data=TokenSet(
                tokens=tokens[part],
                labels=labels[part],
                groups=np.arange(len(part)),
                split=np.zeros(len(part), dtype=np.int8),
                classes=some.data.classes,
            ),
        )
        for name, part in parts.items()
    }


@pytest.mark.parametrize(("balance", "same"), [("none", True), ("sampling", False), ("weights", False)])
def test_ridge_does_not_care_who_holds_which_image_unless_each_site_balances_its_own(balance: str, same: bool) -> None:
    """The same images dealt two ways: evenly to three sites, and sorted by class to two of unequal size."""
    found = learners(make("ridge"))
    labels = np.concatenate([learner.data.labels[learner.data.rows("train")] for learner in found.values()])
    order = np.argsort(labels, kind="stable")
    evenly = {name: np.arange(len(labels))[k::3] for k, name in enumerate("abc")}
    by_class = {"a": order[: len(order) // 4], "b": order[len(order) // 4 :]}
    one, two = (ridge_of(dealt(found, parts, balance), 0.1)[0]["shared"] for parts in (evenly, by_class))
    apart = max(float((one[n] - two[n]).abs().max()) for n in one)
    assert apart < 1e-4 if same else apart > 1e-2


def test_the_mean_of_the_sites_solutions_would_be_another_answer() -> None:
    found = learners(make("ridge"))
    server, replies = ridge_of(found, 0.1)
    joined = weighted_mean([(r.weight, r.state["statistics"]) for r in replies])
    torch.testing.assert_close(solve(joined, 0.1), server["shared"])
    alone = weighted_mean([(r.weight, solve(r.state["statistics"], 0.1)) for r in replies])
    assert not torch.allclose(alone["head.weight"], server["shared"]["head.weight"], atol=1e-2)


def test_ridge_sends_moments_once_and_leaves_adapters_at_zero(tmp_path: Path) -> None:
    method = make("ridge")
    one, sites = tiny_run(method, tmp_path / "1", rounds=1)
    two, _ = tiny_run(method, tmp_path / "2", rounds=2)
    assert digest(one) == digest(two)  # the second round repeats the first
    reply = sites["a"].store.reply(1)
    assert reply is not None
    width = backbone_of(method).feature_dim + 1
    assert {n: tuple(t.shape) for n, t in reply.state["statistics"].items()} == {
        "gram": (width, width),
        "moment": (width, 3),
    }
    private = sites["a"].store.before(2)["private"]
    assert all(not t.any() for n, t in private.items() if ".lora_B." in n)
    evaluated = sites["a"].handle(Request(kind="evaluate", round=1, state=method.broadcast(one, "a")))
    assert evaluated.metrics["score"] > 0.6
    with pytest.raises(ConfigError, match="lam > 0"):
        make("ridge", {"lam": 0.0})


def model(seed: int, rank: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return a trained site's adapter of one layer (5 to 4) and head, drawn."""
    g = torch.Generator().manual_seed(seed)
    return {
        "l.lora_A.general.weight": torch.randn(rank, 5, generator=g),
        "l.lora_B.general.weight": scale * torch.randn(4, rank, generator=g),
        "head.weight": scale * torch.randn(3, 4, generator=g),
        "head.bias": scale * torch.randn(3, generator=g),
    }


def after(method: Method, rounds: list[dict[str, tuple[float, Tensors]]]) -> State:
    """Return the server after rounds in which the given sites sent vectors, by images."""
    server: State = {"shared": model(0, 2, 0.0)}
    for number, came in enumerate(rounds, 1):
        # All sites weigh the same, as with federation.weights="equal"; they have w images.
        replies = [
            Reply(site=s, round=number, state={"shared": t}, metrics={"examples": int(w)})
            for s, (w, t) in sorted(came.items())
        ]
        server = method.aggregate(server, replies)
    return server


@pytest.mark.parametrize(("kind", "by_hand"), [("sum", (1, 1, 1)), ("mean", (1 / 3,) * 3), ("images", (0.1, 0.3, 0.6))])
def test_mixtures_by_hand(kind: str, by_hand: tuple[float, ...]) -> None:
    """``tau_j`` is the product B_j A_j and the head, for whatever rank; a mean of factors would be another model."""
    sent = {name: (weight, model(j, 1 + j)) for j, (name, weight) in enumerate({"a": 1.0, "b": 3.0, "c": 6.0}.items())}
    mixed = after(make("data-vectors", {"coefficients": kind}), [sent])["shared"]
    models = [m for _, m in sent.values()]
    products = [m["l.lora_B.general.weight"] @ m["l.lora_A.general.weight"] for m in models]
    torch.testing.assert_close(
        product(pairs(mixed, "general")["l"]), sum(c * p for c, p in zip(by_hand, products, strict=True))
    )
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(mixed[name], sum(c * m[name] for c, m in zip(by_hand, models, strict=True)))
    assert mixed["l.lora_A.general.weight"].shape == (1 + 2 + 3, 5)


def test_factors_averaged_one_by_one_would_be_another_model() -> None:
    models = [model(1, 2), model(2, 2)]
    factors = weighted_mean([(1.0, m) for m in models])
    exact = product(pairs(fuse(models, shares("mean", [1, 1])), "general")["l"])
    assert not torch.allclose(product(pairs(factors, "general")["l"]), exact, atol=0.1)


def test_a_vector_may_come_in_any_round_and_a_newer_one_replaces_it() -> None:
    method = make("data-vectors", {"coefficients": "images"})
    a, b, c, newer = (model(j, 2) for j in range(1, 5))
    together = after(method, [{"a": (1.0, newer), "b": (3.0, b), "c": (6.0, c)}])
    apart = after(method, [{"c": (6.0, c)}, {"a": (2.0, a)}, {}, {"a": (1.0, newer), "b": (3.0, b)}])
    assert digest({"": together["shared"]}) == digest({"": apart["shared"]})
    alone = after(method, [{"c": (6.0, c)}])["shared"]
    torch.testing.assert_close(product(pairs(alone, "general")["l"]), product(pairs(c, "general")["l"]))


def test_times_is_times_the_change() -> None:
    one = model(1, 2)
    twice = times(one, 2.0)
    torch.testing.assert_close(product(pairs(twice, "general")["l"]), 2 * product(pairs(one, "general")["l"]))
    torch.testing.assert_close(twice["head.bias"], 2 * one["head.bias"])


def test_no_sites_vector_can_be_cut_out_of_a_mixture() -> None:
    """Side by side, rows 2 to 4 of A and columns 2 to 4 of B were those of the second site."""
    models = [model(j, 2) for j in range(3)]
    ranks = range(0, 6, 2)
    mixed = pairs(fuse(models, shares("mean", [1, 1, 1])), "general")["l"]
    for one in models:
        a, b = pairs(one, "general")["l"]
        for first in ranks:
            part = mixed[0][first : first + 2], mixed[1][:, first : first + 2]
            assert not torch.allclose(part[0], a, atol=1e-3)
            assert not torch.allclose(product(part), product((a, b)) / 3, atol=1e-3)
    torch.testing.assert_close(product(mixed), sum(product(pairs(m, "general")["l"]) for m in models) / 3)


def test_rounds_count_only_once_the_mixture_is_there() -> None:
    """Evaluations before say nothing of it: such a round must neither stop a run nor be kept as its best."""

    def counted(**options: str) -> list[bool]:
        return [make("data-vectors", options).may_stop(r, 4) for r in (1, 2, 3, 4)]

    assert counted() == [False, False, False, True]
    assert counted(when="every") == [True, True, True, True]
    assert counted(coefficients="tuned") == [False, False, False, True]
    assert counted(coefficients="tuned", when="every") == [False, False, False, True]


def test_tuning_without_a_round_to_tune_in_is_refused() -> None:
    values = {"path": "x", "controls": (), "method": {"name": "data-vectors", "coefficients": "tuned"}}
    with pytest.raises(ConfigError, match="rounds=2"):
        validate({**values, "rounds": 1})
    validate({**values, "rounds": 2})
    validate({**values, "method": "data-vectors", "rounds": 1})


def test_a_stack_gives_its_members_back() -> None:
    models = [model(j, 1 + j) for j in range(3)]
    found = list(members(stack(models)))
    for got, want in zip(found, models, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) for n in want)


def test_an_ensemble_predicts_the_mean_of_the_sites_probabilities(tmp_path: Path) -> None:
    method = make("data-vectors", {"predicts": "ensemble"})
    final, sites = tiny_run(method, tmp_path, lr=2e-2)
    backbone, tokens = backbone_of(method), sites["a"].data.batch(np.arange(6)).tokens
    params = method.personal(method.broadcast(final, "a"), sites["a"].store.before(4))
    found = method.scores(backbone, params, tokens).softmax(1)
    own = [backbone.logits(sites[n].store.before(4)["shared"], tokens).softmax(1) for n in SITES]
    torch.testing.assert_close(found, sum(own) / 3)
    assert not method.additive()
    assert make("data-vectors").additive()


def test_nothing_travels_before_the_last_round_and_sites_go_on_from_their_own(tmp_path: Path) -> None:
    final, sites = tiny_run(make("data-vectors"), tmp_path)
    rounds = [e["sites"] for e in Run(tmp_path).events() if e["event"] == "round"]
    assert [sum(s["sent_bytes"] > 0 for s in r.values()) for r in rounds] == [0, 0, 3]
    assert all(s["received_bytes"] == 0 for r in rounds for s in r.values())
    # Round 2 starts from what the site itself had after round 1.
    learner = Learner(
        backbone=sites["a"].backbone,
        data=sites["a"].data,
        settings=sites["a"].settings,
        seed=0,
        site="a",
        round=2,
        rounds=3,
    )
    again = learner.fit(sites["a"].store.before(2)["private"])
    assert digest({"": again}) == digest({"": sites["a"].store.before(3)["private"]})
    vectors = [sites[n].store.before(4)["shared"] for n in SITES]
    torch.testing.assert_close(dict(final["shared"]), fuse(vectors, [1 / 3] * 3))


def test_a_site_that_has_sent_goes_on_from_its_own_and_not_from_the_mixture() -> None:
    method = make("data-vectors", {"when": "every"})
    learner = learners(method)["a"]
    start = initial_params(backbone_of(method), method, "a")
    own, mixture = ({n: t + shift for n, t in start.items()} for shift in (0.1, -0.1))
    payload, state = method.update(learner, {"shared": mixture}, {"shared": own})
    assert digest(payload) == digest({"shared": learner.fit(own)}) == digest(state)


def test_personal_prediction_is_the_own_model_and_a_newcomers_the_mixture(tmp_path: Path) -> None:
    method = make("data-vectors", {"predicts": "own"})
    final, sites = tiny_run(method, tmp_path)
    received, state = method.broadcast(final, "a"), sites["a"].store.before(4)
    assert method.personal(received, state) is state["shared"]
    assert method.personal(received, method.init_site(sites["a"].initial())) is received["shared"]


def test_tuning_takes_the_factor_of_least_mean_loss_and_sends_losses_only(tmp_path: Path) -> None:
    method = make("data-vectors", {"coefficients": "tuned"})
    final, sites = tiny_run(method, tmp_path, steps=8, lr=2e-2)
    vectors = [sites[n].store.before(4)["shared"] for n in SITES]
    losses = []
    for name in SITES:
        reply = sites[name].store.reply(3)
        assert reply is not None
        assert {g: set(t) for g, t in reply.state.items()} == {"scores": {"loss"}}
        assert digest(sites[name].store.before(4)) == digest(sites[name].store.before(3))  # nobody trained
        site, by_hand = sites[name], []
        for factor in GRID:
            mixed = fuse(vectors, [factor / 3] * 3)
            logits = predict(site.backbone, mixed, site.data, site.data.rows("val"))
            labels = torch.from_numpy(site.data.labels[site.data.rows("val")])
            by_hand.append(float(torch.nn.functional.cross_entropy(logits, labels)))
        torch.testing.assert_close(reply.state["scores"]["loss"], torch.tensor(by_hand).double(), rtol=1e-4, atol=1e-5)
        losses.append(by_hand)
    best = GRID[int(np.mean(losses, 0).argmin())]
    torch.testing.assert_close(dict(final["shared"]), fuse(vectors, [best / 3] * 3))
    assert best != 1.0  # six factors were tried, and another than the mean was found


def test_a_site_without_validation_images_sends_no_scores() -> None:
    method = make("data-vectors", {"coefficients": "tuned"})
    learner = learners(method)["a"]
    split = np.where(learner.data.split == 1, 0, learner.data.split)
    data = TokenSet(
        tokens=learner.data.tokens,
        labels=learner.data.labels,
        groups=learner.data.groups,
        split=split,
        classes=learner.data.classes,
    )
    lone = Learner(**{**vars(learner), "data": data, "round": 2, "rounds": 2})
    start = initial_params(backbone_of(method), method, "a")
    assert method.update(lone, {"shared": start}, {"shared": start})[0] == {}


def test_sites_of_unequal_ranks_take_part(tmp_path: Path) -> None:
    method = make("data-vectors", {"predicts": "ensemble"})
    sites = tiny_sites(method, rounds=1)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    replies = []
    for rank, name in enumerate(SITES, 1):
        sites[name].initial = lambda name=name, rank=rank: initial_params(backbone_of(method), method, name, rank=rank)
        replies.append(sites[name].handle(Request(kind="train", round=1, state={})))
    final = method.aggregate(server, replies)
    assert {a.shape[0] for a, _ in pairs(final["shared"], "general").values()} == {6}
    assert final["shared"]["members.ranks"].tolist() == [1, 2, 3]
    answer = sites["b"].handle(Request(kind="evaluate", round=1, state=method.broadcast(final, "b")))
    assert 0 <= answer.metrics["score"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "median"}, "sum, mean, images, tuned"),
        ({"predicts": "all"}, "fused, ensemble, own"),
        ({"when": "never"}, "last, every"),
        ({"predicts": "ensemble", "coefficients": "tuned"}, "no coefficients"),
    ],
)
def test_wrong_options_name_the_way_out(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("data-vectors", options)


class Digits:
    """Scikit-learn's digits at four sites of 40 images; the frozen backbone is the one for rows of numbers."""

    def __init__(self, seed: int) -> None:
        found = load_digits()
        self.x, self.y, self.seed = (found.data / 16).astype(np.float32)[:, None], found.target, seed
        spec = lora.LoraSpec(slots=("general",), blocks=3, targets="fc[12]", dropout=0.0)
        self.backbone: Backbone = load("mlp", lora=spec, image_size=(1, 64))
        self.order = numpy_generator(seed, "digits").permutation(len(self.y))
        self.start = draw(self.backbone, make("data-vectors"), "", classes=10, rank=16, seed=seed)
        self.test = self.data(self.order[400:1400])

    def data(self, rows: np.ndarray) -> TokenSet:
        return TokenSet(
            tokens=self.backbone.prefix(self.x[rows]).numpy(),
            labels=self.y[rows].astype(np.int64),
            groups=np.arange(len(rows)),
            split=np.zeros(len(rows), dtype=np.int8),
            classes=tuple("0123456789"),
        )

    def fit(self, rows: np.ndarray, steps: int) -> Tensors:
        settings = TrainSettings(lr=5e-3, steps=steps, balance="none")
        data = self.data(rows)
        learner = Learner(
            backbone=self.backbone,
            data=data,
            settings=settings,
            seed=self.seed,
            site=str(rows[0]),
            round=1,
            rounds=1,
        )
        return learner.fit(self.start)

    def accuracy(self, params: Tensors, method: Method) -> float:
        rows = np.arange(len(self.test.labels))
        logits = predict(self.backbone, params, self.test, rows, scores=method.scores)
        return float((logits.argmax(1).numpy() == self.test.labels).mean())


def random_like(vector: Tensors, generator: torch.Generator) -> Tensors:
    """Return a vector with random directions and the norm of every layer's product and of the head."""
    found = {}
    for layer, pair in pairs(vector, "general").items():
        a, b = (torch.randn(t.shape, generator=generator) for t in pair)
        found |= named({layer: (a, b * float(norm(pair) / norm((a, b))))}, "general")
    for name in ("head.weight", "head.bias"):
        value = torch.randn(vector[name].shape, generator=generator)
        found[name] = value * vector[name].norm() / value.norm()
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_random_is_far_below_single_below_fused_below_all_data(seed: int) -> None:
    """The ordering of the paper; and a plain sum overshoots where no statistics can be restored."""
    digits, method = Digits(seed), make("data-vectors")
    parts = [digits.order[40 * k : 40 * (k + 1)] for k in range(4)]
    vectors = [digits.fit(rows, 60) for rows in parts]
    generator = torch.Generator().manual_seed(seed)
    noise = [random_like(vector, generator) for vector in vectors]
    found = {
        "single": float(np.mean([digits.accuracy(vector, method) for vector in vectors])),
        "random": digits.accuracy(fuse(noise, [0.25] * 4), method),
        "mean": digits.accuracy(fuse(vectors, [0.25] * 4), method),
        "sum": digits.accuracy(fuse(vectors, [1.0] * 4), method),
        "ensemble": digits.accuracy(stack(vectors), method),
        "all": digits.accuracy(digits.fit(np.concatenate(parts), 240), method),
    }
    assert found["random"] < 0.25, found
    assert found["random"] + 0.3 < found["single"] < found["mean"] - 0.05, found
    assert found["sum"] < found["mean"] - 0.05, found
    assert found["mean"] < found["all"], found
    assert found["ensemble"] > found["mean"] - 0.02, found
