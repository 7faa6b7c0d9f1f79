"""FedProx, FedOpt, FFA-LoRA and RoLoRA against numbers derived by hand, and the traps of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from method_variants import VARIANTS
from tiny_federation import SITES, backbone_of, initial_params, tiny_run, tiny_sites

from confrere.adapters.algebra import pairs, product
from confrere.adapters.names import side_of
from confrere.errors import ConfigError
from confrere.method import METHODS, Method, Reply, Request, make
from confrere.record.run import Run
from confrere.tensors import State, Tensors, digest, n_bytes, sq_dist


@dataclass
class Watch:
    """Takes the place of a learner: trains nothing and remembers what it was asked for."""

    seen: dict[str, Any] = field(default_factory=dict)
    backbone: Any = field(default_factory=lambda: type("Device", (), {"device": torch.device("cpu")}))

    def fit(self, params: Tensors, **options: Any) -> dict[str, torch.Tensor]:
        self.seen = options
        return dict(params)


def one(value: float) -> dict[str, torch.Tensor]:
    return {"head.w": torch.tensor([value], dtype=torch.float64)}


def first_replies(method: Method, steps: int = 3) -> tuple[State, list[Reply]]:
    sites = tiny_sites(method, steps=steps)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    asked = {n: Request(kind="train", round=1, state=method.broadcast(server, n)) for n in SITES}
    return server, [sites[n].handle(asked[n]) for n in SITES]


# FedProx


def test_the_proximal_term_is_half_mu_times_the_squared_distance_of_shared_tensors_only() -> None:
    """w = (2, 4) against (1, 2): 0.5 * 0.1 * (1 + 4) = 0.25, gradient 0.1 * (1, 2); v stays at the site: no pull."""
    learner = Watch()
    received = {"shared": {"w": torch.tensor([1.0, 2.0])}}
    method = make("fedprox", {"mu": 0.1})
    method.update(learner, received, {"private": {"v": torch.tensor([5.0])}})  # type: ignore[arg-type]
    params = {"w": torch.tensor([2.0, 4.0], requires_grad=True), "v": torch.tensor([9.0], requires_grad=True)}
    term = learner.seen["penalty"](params, None)
    assert float(term.detach()) == pytest.approx(0.25)
    w, v = torch.autograd.grad(term, list(params.values()), allow_unused=True)
    assert w is not None
    assert w.tolist() == pytest.approx([0.1, 0.2])
    assert v is None


def test_without_mu_fedprox_is_fedit_and_with_much_of_it_sites_stay_near() -> None:
    moved = {}
    for mu in (0.0, 0.1, 10.0):
        server, replies = first_replies(make("fedprox", {"mu": mu}), steps=6)
        moved[mu] = float(sum(sq_dist(r.state["shared"], server["shared"]) for r in replies))
        if not mu:
            plain = first_replies(make("fedit"), steps=6)[1]
            assert [digest(r.state) for r in replies] == [digest(r.state) for r in plain]
    assert moved[10.0] < 0.8 * moved[0.0]
    assert moved[10.0] < moved[0.1] < moved[0.0]


# FedOpt


def steps_of(name: str, options: dict[str, float], deltas: tuple[float, ...]) -> list[State]:
    """The server's states when the weighted mean of two sites differs from it by each of ``deltas``."""
    method = make(name, options)
    server = method.init_server(one(0.0))
    states = []
    for delta in deltas:
        x = float(server["shared"]["head.w"])
        replies = [
            Reply(site="a", round=1, weight=3.0, state={"shared": one(x + delta + 1.0)}),
            Reply(site="b", round=1, weight=1.0, state={"shared": one(x + delta - 3.0)}),
        ]
        server = method.aggregate(server, replies)
        states.append(server)
    return states


@pytest.mark.parametrize(
    ("name", "beta1", "moment", "variances"),
    [
        ("fedavgm", 0.9, (0.3, 0.9 * 0.3 + 0.05), None),
        ("fedadagrad", 0.0, (0.3, 0.05), (0.01 + 0.09, 0.1 + 0.0025)),
        ("fedadam", 0.9, (0.03, 0.9 * 0.03 + 0.005), (0.99 * 0.01 + 0.01 * 0.09, 0.99 * 0.0108 + 0.01 * 0.0025)),
        ("fedyogi", 0.9, (0.03, 0.9 * 0.03 + 0.005), (0.01 + 0.01 * 0.09, 0.0109 - 0.01 * 0.0025)),
    ],
)
def test_two_steps_by_hand(
    name: str, beta1: float, moment: tuple[float, ...], variances: tuple[float, ...] | None
) -> None:
    """Delta is 0.3, then 0.05; eta 0.1, tau 0.1 (so v starts at 0.01), beta2 0.99; no moment is corrected.

    Yogi: 0.01 < 0.09, so v rises by 0.01 * 0.09; then 0.0109 > 0.0025, so it falls by 0.01 * 0.0025.
    """
    options = {"server_lr": 0.1, "beta1": beta1} | ({"tau": 0.1} if variances else {})
    states, x = steps_of(name, options, (0.3, 0.05)), 0.0
    for k, state in enumerate(states):
        x += 0.1 * moment[k] / (variances[k] ** 0.5 + 0.1 if variances else 1.0)
        assert float(state["momentum"]["head.w"]) == pytest.approx(moment[k], rel=1e-9)
        assert float(state["shared"]["head.w"]) == pytest.approx(x, rel=1e-9)
        if variances:
            assert float(state["variance"]["head.w"]) == pytest.approx(variances[k], rel=1e-9)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_the_server_steps_towards_the_sites_and_not_without_them(name: str) -> None:
    """The pseudo-gradient's sign: a step goes where the mean went; a round without payloads leaves all as it was."""
    state = steps_of(name, {}, (-0.3,))[0]
    assert float(state["shared"]["head.w"]) < 0
    assert make(name).aggregate(state, [Reply(site="a", round=2)]) is state


def test_plain_server_momentum_is_fedit() -> None:
    server, replies = first_replies(make("fedit"))
    averaged = make("fedit").aggregate(server, replies)["shared"]
    method = VARIANTS["fedavgm-plain"]
    stepped = method.aggregate(method.init_server(server["shared"]), replies)["shared"]
    for name, value in averaged.items():
        torch.testing.assert_close(stepped[name], value)


# FFA-LoRA and RoLoRA


def exactness(server: State, merged: State, replies: list[Reply], frozen: State) -> float:
    """The largest distance between the aggregate's products and the mean of the sites' products."""
    total, worst = sum(r.weight for r in replies), 0.0
    sent = [pairs({**frozen["all"], **r.state["shared"]}, "general") for r in replies]
    for layer, pair in pairs({**frozen["all"], **merged["shared"]}, "general").items():
        mean = sum(r.weight / total * product(s[layer]).double() for r, s in zip(replies, sent, strict=True))
        worst = max(worst, float((product(pair).double() - mean).abs().max() / mean.abs().max()))
    return worst


def test_ffa_freezes_one_common_a_never_sends_it_and_averages_exactly(tmp_path: Path) -> None:
    method = make("ffa-lora")
    _, sites = tiny_run(method, tmp_path)
    start = initial_params(backbone_of(method), method, "")
    for name in SITES:
        kept = (sites[name].store.before(4) or {})["private"]
        assert kept
        for tensor, value in kept.items():
            assert side_of(tensor) == "A"
            assert torch.equal(value, start[tensor])
    server, replies = first_replies(method)
    assert all(side_of(n) != "A" for r in replies for n in (*r.state["shared"], *method.broadcast(server, r.site)))
    assert any(float(r.state["shared"][n].abs().max()) > 0 for r in replies for n in r.state["shared"])
    assert exactness(server, method.aggregate(server, replies), replies, {"all": start}) < 1e-5
    whole = first_replies(make("fedit"))  # the same measure finds the error of averaging both factors
    plain = exactness(whole[0], make("fedit").aggregate(*whole), whole[1], {"all": start})
    assert plain > 1e-3
    assert n_bytes(replies[0].state) < 0.7 * n_bytes(whole[1][0].state)


def test_rolora_sends_one_factor_in_turns_and_each_average_is_exact() -> None:
    """B first (with B = 0, A has no gradient); the other factor moves by no bit, not even by decay."""
    method = make("rolora")
    sites = tiny_sites(method, weight_decay=0.5)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    for round_, turn in ((1, "B"), (2, "A"), (3, "B"), (4, "A")):
        asked = {n: Request(kind="train", round=round_, state=method.broadcast(server, n)) for n in SITES}
        replies = [sites[n].handle(asked[n]) for n in SITES]
        assert {side_of(name) for r in replies for name in r.state["shared"]} == {turn, None}
        merged = method.aggregate(server, replies)
        assert exactness(server, merged, replies, {"all": server["shared"]}) < 1e-5
        for name, value in merged["shared"].items():
            same = torch.equal(value, server["shared"][name])
            assert same == (side_of(name) not in (turn, None)), name
        server = merged
    assert all(not (sites[n].store.before(5) or {})["private"] for n in SITES)


def test_rolora_does_not_train_what_it_will_not_send() -> None:
    """B fitted beside an A that also moved would be averaged with the A that did not: exact, and of another model."""
    method, learner = make("rolora"), Watch()
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    for turn in ("B", "A"):
        method.update(learner, method.broadcast(server, "a"), {})  # type: ignore[arg-type]
        assert {side_of(n) for n in server["shared"] if learner.seen["train"](n)} == {turn, None}
        server = {**server, "turn": {"rounds": server["turn"]["rounds"] + 1}}


def test_a_round_without_answers_is_the_same_turn_again() -> None:
    """Were the turn the round's number, a failed round would skip a factor."""
    method = make("rolora")
    server, replies = first_replies(method)
    assert method.aggregate(server, [Reply(site="a", round=1)]) is server
    later = method.aggregate(server, replies)
    names = [{side_of(n) for n in method.broadcast(s, "a")["shared"]} for s in (server, server, later)]
    assert names == [{"B", None}, {"B", None}, {"A", None}]


def test_averaging_only_what_was_trained_leaves_no_error_in_the_record(tmp_path: Path) -> None:
    """FedIT's record shows the error of averaging factors; these two send half a pair, so there is none to show."""
    errors = {}
    for name in ("fedit", "ffa-lora", "rolora"):
        tiny_run(make(name), tmp_path / name)
        errors[name] = [
            e["diagnostics"]["aggregation_error"] for e in Run(tmp_path / name).events() if e["event"] == "round"
        ]
    assert max(errors["fedit"]) > 1e-3
    assert errors["ffa-lora"] == errors["rolora"] == [None] * 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedprox", {"mu": -0.1}, r"method\.mu"),
        ("scaffold", {"participation": 0.5}, "no option"),
        ("fedavgm", {"server_lr": 0.0}, "server_lr > 0"),
        ("fedavgm", {"beta1": 1.0}, "0 <= beta1 < 1"),
        ("fedadagrad", {"tau": 0.0}, "tau > 0"),
        ("fedadam", {"beta2": 1.0}, "0 <= beta2 < 1"),
        ("fedyogi", {"server_lr": float("inf")}, r"method\.server_lr"),
        ("fedadagrad", {"beta2": 0.9}, "no option"),
    ],
)
def test_wrong_options_name_the_key_and_the_way_out(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)


@pytest.mark.parametrize("name", ["fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_what_tuning_tries_is_allowed(name: str) -> None:
    for option, (kind, *values) in METHODS[name].search.items():
        assert kind == "log"
        for value in values:
            make(name, {option: value})
