"""SCAFFOLD against numbers derived by hand: drift, few sites a round, drop-outs, discarded rounds, the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_run, tiny_sites

from confrere.federation.loop import federate, sample
from confrere.federation.transport import Failure, InProcess
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.methods.scaffold import FIRST
from confrere.record.run import Run
from confrere.tensors import State, Tensors, digest, weighted_mean


@dataclass
class Sgd:
    """Takes the place of a learner: ``steps`` gradient steps on ``a/2 (w - t)^2``, with the contract of ``fit``."""

    a: float = 1.0
    t: float = 0.0
    lr: float = 0.05
    steps: int = 10
    round: int = 1

    def fit(
        self,
        params: Tensors,
        *,
        correct: Tensors | None = None,
        mean_gradient: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        w = {name: value.clone() for name, value in params.items()}
        for _ in range(self.steps):
            for name in w:
                gradient = self.a * (w[name] - self.t)
                if mean_gradient is not None:
                    mean_gradient[name] = mean_gradient.get(name, torch.zeros_like(gradient)) + gradient / self.steps
                w[name] = w[name] - self.lr * (gradient + (correct or {}).get(name, 0.0))
        return w


def one(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value], dtype=torch.float64)}


@dataclass
class Quadratics:
    """Sites that minimise ``a_k/2 (w - t_k)^2``; remembers each c_k of a reply that counted."""

    method: Method
    sites: dict[str, tuple[float, Sgd]]
    server: State = field(init=False)
    kept: dict[str, State] = field(default_factory=dict)
    counted: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = self.method.init_server(one(0.7))

    def round(self, number: int, present: list[str], *, counts: bool = True) -> None:
        replies = []
        for name in present:
            weight, learner = self.sites[name]
            learner.round = number
            received = self.method.broadcast(self.server, name)
            payload, self.kept[name] = self.method.update(learner, received, self.kept.get(name, {}))  # type: ignore[arg-type]
            replies.append(Reply(site=name, round=number, state=payload, weight=weight))
        if counts:
            self.server = self.method.aggregate(self.server, replies)
            self.counted |= {n: float(self.kept[n]["control"]["w"]) for n in present if "control" in self.kept[n]}

    @property
    def x(self) -> float:
        return float(self.server["shared"]["w"])

    @property
    def c(self) -> float:
        return float(self.method.broadcast(self.server, "")["control"]["w"])

    def mean_of_counted(self) -> float:
        weights = {n: self.sites[n][0] for n in self.counted}
        return sum(w * self.counted[n] for n, w in weights.items()) / sum(weights.values())


def test_the_mean_gradient_is_option_two_for_sgd() -> None:
    """c_k+ = c_k - c + (x - y_k) / (K eta), from values of c and c_k that are not zero; its change is what is sent."""
    method, learner = make("scaffold"), Sgd(a=3.0, t=1.0, lr=0.02, steps=7, round=5)
    x, c, c_k = 2.0, 0.4, -0.3
    payload, kept = method.update(
        learner,  # type: ignore[arg-type]
        {"shared": one(x), "control": one(c), "heard": {"rounds": torch.tensor([0, 3])}},
        {"private": {}, "control": one(c_k), "asked": {"round": torch.tensor([3])}},
    )
    y = float(payload["shared"]["w"])
    expected = c_k - c + (x - y) / (7 * 0.02)
    assert float(kept["control"]["w"]) == pytest.approx(expected, rel=1e-12)
    assert float(payload["control"]["w"]) == pytest.approx(expected - c_k, rel=1e-12)
    assert float(payload["control"][FIRST]) == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0)])
def test_drift_biases_averaging_and_scaffold_takes_it_out(weights: tuple[float, float]) -> None:
    """Sites minimise (w-1)^2/2 and 9 w^2/2: the optimum of the weighted sum is p_a / (p_a + 9 p_b).

    Averaging after K steps stops where sum p_k (1 - q_k) (t_k - x) = 0 with q_k = (1 - eta a_k)^K, which is not there.
    Were c a uniform mean while x is a weighted one, SCAFFOLD would miss the second optimum, too.
    """
    found = {}
    for name in ("fedit", "scaffold"):
        run = Quadratics(make(name), {"a": (weights[0], Sgd(a=1.0, t=1.0)), "b": (weights[1], Sgd(a=9.0, t=0.0))})
        for number in range(1, 151):
            run.round(number, ["a", "b"])
        found[name] = run.x
    p_a, p_b = weights
    optimum = p_a / (p_a + 9 * p_b)
    pull_a, pull_b = p_a * (1 - 0.95**10), p_b * (1 - 0.55**10)
    assert found["fedit"] == pytest.approx(pull_a / (pull_a + pull_b), rel=1e-6)
    assert found["scaffold"] == pytest.approx(optimum, rel=1e-6)
    assert abs(pull_a / (pull_a + pull_b) - optimum) > 0.08


NAMES = ["a", "b", "c", "d"]
# What happens in which round: who is absent, or None where the round is discarded after the sites have trained.
CASES: dict[str, tuple[float, dict[int, set[str] | None]]] = {
    "all": (1.0, {}),
    "half": (0.5, {}),
    "one drop-out": (1.0, {5: {"d"}}),
    "a late start": (1.0, {1: {"d"}, 2: {"d"}}),
    "a first round discarded": (1.0, {1: None}),
    "a round discarded": (1.0, {6: None}),
    "half, a round discarded": (0.5, {6: None}),
    "half, all of it": (0.5, {1: None, 3: {"a", "d"}, 7: None, 8: None, 9: {"b"}, 30: None}),
}


@pytest.mark.parametrize("case", CASES)
def test_whoever_answers_c_is_the_mean_of_all_and_x_the_optimum(case: str) -> None:
    """Four sites of unequal weights: the optimum is sum W a t / sum W a = (1 + 0 - 12 + 24) / (1 + 18 + 12 + 12).

    Where changes are averaged over those present and scaled by their number, c drifts from the mean with the first
    round without a site, and x ends elsewhere. "half": a site often misses the round after one that was discarded,
    so it cannot tell from a count of rounds whether its own was among those that counted.
    """
    fraction, events = CASES[case]
    curves = {"a": (1.0, 1.0, 1.0), "b": (2.0, 9.0, 0.0), "c": (3.0, 4.0, -1.0), "d": (6.0, 2.0, 2.0)}
    run = Quadratics(make("scaffold"), {n: (w, Sgd(a=a, t=t, lr=0.02)) for n, (w, a, t) in curves.items()})
    for number in range(1, 251):
        absent = events.get(number, set())
        present = [n for n in sample(NAMES, fraction, 3, number) if n not in (absent or ())]
        run.round(number, present, counts=absent is not None)
        if run.counted:
            assert run.c == pytest.approx(run.mean_of_counted(), abs=1e-9), number
    assert set(run.counted) == set(NAMES)
    assert run.x == pytest.approx(13 / 43, abs=1e-6)
    assert run.c == pytest.approx(0.0, abs=1e-6)


def test_the_sums_by_hand() -> None:
    """a (weight 1, known: -0.2) and b (3, new: 0.6) move sums of 4 and 2: (4 - 0.2 + 1.8) / (2 + 3) = 1.12."""
    method = make("scaffold")
    server = {
        "shared": one(0.0),
        "total": one(4.0),
        "heard": {"weight": torch.tensor(2.0, dtype=torch.float64), "rounds": torch.tensor([0, 1])},
    }
    replies = [
        Reply(site=s, round=4, weight=w, state={"shared": one(1.0), "control": {**one(change), FIRST: first}})
        for s, w, change, first in (
            ("a", 1.0, -0.2, torch.tensor(0.0, dtype=torch.float64)),
            ("b", 3.0, 0.6, torch.tensor(1.0, dtype=torch.float64)),
        )
    ]
    received = method.broadcast(method.aggregate(server, replies), "a")
    assert float(received["control"]["w"]) == pytest.approx(1.12)
    assert received["heard"]["rounds"].tolist() == [0, 1, 4]
    assert method.aggregate(server, [Reply(site="a", round=1)]) is server


def test_a_new_site_is_not_corrected() -> None:
    """c is of other sites: added to a gradient of its own with c_k = 0, it would double the step."""
    method = make("scaffold")
    received = {"shared": one(1.0), "control": one(5.0), "heard": {"rounds": torch.tensor([0, 1])}}
    payload, _ = method.update(Sgd(round=2), received, {})  # type: ignore[arg-type]
    assert float(payload["shared"]["w"]) == pytest.approx(0.95**10)
    assert float(payload["control"][FIRST]) == 1


def test_the_first_round_is_fedits_and_c_is_the_mean_of_the_sites_own(tmp_path: Path) -> None:
    """Without variates there is no correction; with all sites present c is the mean of the c_k."""
    first = {}
    for name in ("fedit", "scaffold"):
        method, sites = make(name), tiny_sites(make(name))
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        asked = {n: Request(kind="train", round=1, state=method.broadcast(server, n)) for n in SITES}
        first[name] = [digest({"s": sites[n].handle(asked[n]).state["shared"]}) for n in SITES]
    assert first["fedit"] == first["scaffold"]
    final, sites = tiny_run(make("scaffold"), tmp_path)
    own = weighted_mean([(sites[n].weight, (sites[n].store.before(4) or {})["control"]) for n in SITES])
    c = make("scaffold").broadcast(final, "a")["control"]
    assert c.keys() == own.keys()
    for name, value in c.items():
        torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-6)
    assert any(float(value.abs().max()) > 0 for value in own.values())
    uncorrected, _ = tiny_run(make("fedit"), tmp_path / "plain")
    assert digest({"s": uncorrected["shared"]}) != digest({"s": final["shared"]})


class Lossy(InProcess):
    """Site ``a`` does not answer in round 2, and notes what the others send."""

    sent: list[tuple[int, str, float]]

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        here = {n: r for n, r in requests.items() if (n, r.kind, r.round) != ("a", "train", 2)}
        replies = super().exchange(here)
        for reply in replies:
            if isinstance(reply, Reply) and reply.state:
                self.sent.append((reply.round, reply.site, float(reply.state["control"][FIRST])))
        return [*replies, *(Failure(n, "no answer") for n in requests.keys() - here.keys())]


@pytest.mark.parametrize("disk", [False, True])
def test_a_round_below_the_quorum_is_made_up_for(tmp_path: Path, disk: bool) -> None:
    """Through the loop: b and c train in round 2 in vain; after round 3 c is again the mean of all c_k."""
    method, run = make("scaffold"), Run(tmp_path)
    sites = tiny_sites(method, stores={n: run.store(n) for n in SITES} if disk else {})
    for site, weight in zip(sites.values(), (1.0, 5.0, 2.0), strict=True):
        site.weight = weight
    transport = Lossy(sites)
    transport.sent = []
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    final = federate(method, server, transport, tiny_plan(method, min_replies=3), run)
    assert digest(run.server(1)) == digest(run.server(2))
    assert [(n, s) for n, s, first in transport.sent if first] == [(1, s) for s in SITES]
    assert final["heard"]["rounds"].tolist() == [0, 1, 3]
    assert float(final["heard"]["weight"]) == pytest.approx(8.0)
    own = weighted_mean([(sites[n].weight, (sites[n].store.before(4) or {})["control"]) for n in SITES])
    for name, value in method.broadcast(final, "a")["control"].items():
        torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-6)


def test_no_variate_of_the_head_is_sent_or_kept(tmp_path: Path) -> None:
    """The head starts at zero, so its bias' raw gradient is 1/K - share of each class: the site's class counts."""
    method = make("scaffold")
    backbone = backbone_of(method)
    start = initial_params(backbone, method, "")
    site = tiny_sites(method, steps=1, batch_size=16, balance="none")["a"]
    gradient: dict[str, torch.Tensor] = {}
    learner = Learner(backbone=backbone, data=site.data, settings=site.settings, seed=0, site="a", round=1, rounds=3)
    learner.fit(start, mean_gradient=gradient)
    batch = next(learner.batches(1, "fit"))
    shares = torch.bincount(batch.labels, minlength=3) / len(batch.labels)
    torch.testing.assert_close(gradient["head.bias"], 1 / 3 - shares, atol=1e-5, rtol=0)  # what must not leave
    final, sites = tiny_run(method, tmp_path)
    groups: list[tuple[str, Any]] = [("control", method.broadcast(final, "a")), ("total", final)]
    for name in SITES:
        for round_ in (1, 2, 3):
            reply = sites[name].store.reply(round_)
            assert reply is not None
            assert not any(n.startswith("head.") for n in reply.state["control"])
            assert any(n.startswith("head.") for n in reply.state["shared"])
        kept = sites[name].store.before(4) or {}
        groups += [("control", kept), ("settled", kept)]
    for group, state in groups:
        assert state[group], group
        assert not any(n.startswith("head.") for n in state[group])
