"""Attacks: each does what it says, to attackers only, the same every time; and it bites an undefended mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_federation import SITES, backbone_of, initial_params, tiny_data, tiny_plan, tiny_run, tiny_sites

from confrere.adapters.algebra import pairs, product
from confrere.errors import ConfigError
from confrere.federation import attacks as a
from confrere.federation.defence import Defence
from confrere.federation.loop import federate
from confrere.federation.robust import robust, update
from confrere.federation.transport import Failure, InProcess
from confrere.method import Reply, Request, make
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tensors import State, digest

NAMES = tuple(f"s{k}" for k in range(10))
BAD = NAMES[:2]
RECEIVED: State = {"shared": {"w": torch.full((4, 3), 5.0), "v": torch.zeros(2)}}


class Fixed:
    """A transport on which site k answers with the same update every time."""

    def sites(self) -> tuple[str, ...]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        answers: list[Reply | Failure] = []
        for name, request in requests.items():
            if name == "s9":
                answers.append(Failure(name, "did not answer"))
                continue
            g = torch_generator(3, name)
            sent = {k: v + 1 + 0.1 * torch.randn(v.shape, generator=g) for k, v in RECEIVED["shared"].items()}
            state = {"shared": sent}
            answers.append(Reply(site=name, round=request.round, state=state, weight=2.0, metrics={"examples": 3}))
        return answers


def asked(kind: str = "train", round_: int = 1) -> dict[str, Request]:
    return {name: Request(kind=kind, round=round_, state=RECEIVED) for name in NAMES}  # type: ignore[arg-type]


def exchanged(attack: str, strength: float, seed: int = 0, **how: object) -> dict[str, Reply]:
    came = a.Attacked(Fixed(), attack, BAD, strength, seed).exchange(asked(**how))  # type: ignore[arg-type]
    assert len(came) == len(NAMES)
    return {answer.site: answer for answer in came if isinstance(answer, Reply)}


def updates(replies: Mapping[str, Reply]) -> dict[str, torch.Tensor]:
    return {name: update(reply.state, RECEIVED) for name, reply in replies.items()}


HONEST = updates({x.site: x for x in Fixed().exchange(asked()) if isinstance(x, Reply)})
OTHERS = torch.stack([u for name, u in HONEST.items() if name not in BAD])


@pytest.mark.parametrize(
    ("attack", "strength", "expected"),
    [
        ("sign-flip", 3.0, lambda own: -3 * own),
        ("scaling", 10.0, lambda own: 10 * own),
        ("alie", 1.5, lambda own: OTHERS.mean(0) - 1.5 * OTHERS.std(0, correction=0)),
        ("inner-product", 2.0, lambda own: -2 * OTHERS.mean(0)),
    ],
)
def test_what_is_sent(attack: str, strength: float, expected: object) -> None:
    sent = updates(exchanged(attack, strength))
    for name in BAD:
        torch.testing.assert_close(sent[name], expected(HONEST[name]), rtol=1e-5, atol=1e-5)  # type: ignore[operator]


def test_noise_is_as_long_as_it_says() -> None:
    sent = updates(exchanged("noise", 7.0))
    for name in BAD:
        added = sent[name] - HONEST[name]
        torch.testing.assert_close(added.norm(), 7 * HONEST[name].norm(), rtol=1e-5, atol=1e-5)


def test_one_value_is_nan() -> None:
    sent = updates(exchanged("not-finite", 0.0))
    assert [int(torch.isnan(sent[name]).sum()) for name in BAD] == [1, 1]


@pytest.mark.parametrize("attack", a.ATTACKS)
def test_others_judgement_and_stamps_are_untouched(attack: str) -> None:
    honest = {x.site: x for x in Fixed().exchange(asked()) if isinstance(x, Reply)}
    for name, reply in exchanged(attack, 1.0).items():
        assert replace(reply, state={}) == replace(honest[name], state={})
        if name not in BAD:
            assert digest(reply.state) == digest(honest[name].state)
    judged = exchanged(attack, 1.0, kind="evaluate")
    assert all(digest(reply.state) == digest(honest[name].state) for name, reply in judged.items())


@pytest.mark.parametrize("attack", ["noise", "not-finite"])
def test_draws_have_an_address(attack: str) -> None:
    def sent(seed: int = 0, round_: int = 1) -> list[str]:
        return [digest(exchanged(attack, 1.0, seed, round_=round_)[name].state) for name in BAD]

    assert sent() == sent()
    if attack == "noise":  # a NaN may fall on the same place twice
        assert len({*sent(), *sent(seed=1), *sent(round_=2)}) == 6


def test_an_attack_without_honest_sites_still_answers() -> None:
    requests = {name: request for name, request in asked().items() if name in BAD}
    came = a.Attacked(Fixed(), "alie", BAD, 1.0, 0).exchange(requests)
    assert all(isinstance(answer, Reply) for answer in came)


def test_another_gauge_is_the_same_adapter() -> None:
    method = make("fedit")
    own = initial_params(backbone_of(method), method, "a")
    own = {name: value + 0.1 for name, value in own.items()}
    sent = a.regauged(own, 10.0)
    before, after = pairs(own, "general"), pairs(sent, "general")
    assert before
    for layer in before:
        torch.testing.assert_close(product(after[layer]), product(before[layer]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[layer][0], 10 * before[layer][0])
    assert torch.equal(sent["head.weight"], own["head.weight"])


def test_labels_flip_in_training_only() -> None:
    data = tiny_data(backbone_of(make("fedit")), "a")
    flipped = a.flip_labels(data, 1.0, 0, "a")
    train = data.rows("train")
    assert (flipped.labels[train] == 2 - data.labels[train]).all()
    for split in ("val", "test"):
        rows = data.rows(split)
        assert (flipped.labels[rows] == data.labels[rows]).all()
    some, more = (a.flip_labels(data, share, 0, "a").labels != data.labels for share in (0.3, 0.8))
    assert 0 < some.sum() < more.sum()
    assert (more | ~some).all(), "a larger share flips the same labels and more"
    assert (a.flip_labels(data, 0.0, 0, "a").labels == data.labels).all()


@pytest.mark.parametrize(
    ("name", "sites", "strength", "where"),
    [
        ("sign-flop", ["a"], 1.0, "attack.name"),
        ("sign-flip", ["z"], 1.0, "attack.sites"),
        ("sign-flip", ["a", "b", "c"], 1.0, "attack.sites"),
        ("gauge", ["a"], 0.0, "attack.strength"),
        ("label-flip", ["a"], 2.0, "attack.strength"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(name: str, sites: list[str], strength: float, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        a.check_attack(name, sites, strength, SITES)
    assert caught.value.where == where
    assert caught.value.fix
    a.check_attack(name, [], strength, SITES)


@pytest.mark.parametrize(("attack", "strength"), [("sign-flip", 20.0), ("scaling", 100.0), ("noise", 100.0)])
def test_an_attack_bites_the_mean_and_not_the_median(attack: str, strength: float) -> None:
    """Real updates of a real method: how far from the honest median the aggregate lands, in its own lengths."""
    method = make("fedit")

    sites = {name: tiny_sites(method, seed=k)[site] for k in range(2) for site in SITES for name in [f"{site}{k}"]}
    for name, one in sites.items():
        one.name = name
    server = method.init_server(next(iter(sites.values())).initial())
    requests = {s: Request(kind="train", round=1, state=method.broadcast(server, s)) for s in sites}
    received = {s: request.state for s, request in requests.items()}
    clean = InProcess(sites).exchange(requests)
    attacked = a.Attacked(InProcess(sites), attack, ["a0"], strength, 0).exchange(requests)

    def after(rule: str, came: list[Reply | Failure]) -> torch.Tensor:
        left = robust(rule, 0 if rule == "mean" else 1, received, [x for x in came if isinstance(x, Reply)])
        return update(method.aggregate(server, left), server)

    moved = {rule: after(rule, attacked) - after(rule, clean) for rule in ("mean", "median")}
    size = after("median", clean).norm()
    assert float(moved["mean"].norm() / size) > 2
    assert float(moved["median"].norm() / size) < 1


def test_a_run_goes_on_without_the_attacker_and_names_it(tmp_path: Path) -> None:
    method = make("fedit")
    transport = a.Attacked(InProcess(tiny_sites(method)), "not-finite", ["a"], 1.0, 0)
    server, _ = tiny_run(method, tmp_path, transport=transport)
    events = Run(tmp_path).events()
    refused = [(e["round"], e["site"]) for e in events if e["event"] == "failure"]
    assert refused == [(1, "a"), (2, "a"), (3, "a")]
    assert all(set(e["sites"]) == {"b", "c"} for e in events if e["event"] == "round")
    assert all(torch.isfinite(value).all() for value in server["shared"].values())


def test_a_defended_run_is_repeatable_and_differs_from_an_undefended_one(tmp_path: Path) -> None:
    method = make("fedit")

    def run(name: str, **defence: object) -> str:
        sites = tiny_sites(method)
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        transport = a.Attacked(InProcess(sites), "sign-flip", ["b"], 5.0, 0)
        guard = Defence(**defence)  # type: ignore[arg-type]
        return digest(federate(method, server, transport, tiny_plan(method), Run(tmp_path / name), defence=guard))

    one, two = (run(name, rule="median", byzantine=1, canonical=True) for name in "xy")
    assert one == two != run("z")
