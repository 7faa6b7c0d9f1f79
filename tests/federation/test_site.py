"""One site: what it answers, what it keeps, what it refuses to send."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_federation import CLASSES, SITES, backbone_of, initial_params, tiny_sites

from confrere.errors import TrainingError, UpdateRefusedError
from confrere.federation import site as site_module
from confrere.federation.site import Site, check_payload
from confrere.federation.transport import Failure, InProcess
from confrere.learner import Learner, predict
from confrere.method import Method, Request, make
from confrere.methods.fedit import FedIT
from confrere.record.store import DirectoryStore, MemoryStore
from confrere.tensors import State, Tensors, digest


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def ask(site: Site, round_: int = 1, **changes: Any) -> Request:
    fields = {"kind": "train", "round": round_, "state": site.method.broadcast(start(site.method), site.name)}
    return Request(**{**fields, **changes})


@dataclass(frozen=True, kw_only=True)
class Counting(FedIT):
    """Counts how often it trains."""

    calls: list[int] = field(default_factory=list)

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        self.calls.append(learner.round)
        return super().update(learner, received, state)


@pytest.mark.parametrize("disk", [False, True])
def test_a_request_that_comes_twice_is_answered_from_the_store(tmp_path: Path, disk: bool) -> None:
    method = Counting()
    site = tiny_sites(method)["a"]
    site.store = DirectoryStore(tmp_path, "a") if disk else MemoryStore()
    first, second = site.handle(ask(site)), site.handle(ask(site))
    assert method.calls == [1]
    assert digest(first.state) == digest(second.state)
    assert (first.weight, first.metrics["loss"]) == (second.weight, second.metrics["loss"])
    # Not even another request for the same round makes it draw anew.
    other = {"shared": {n: t + 1 for n, t in start(method)["shared"].items()}}
    assert digest(site.handle(ask(site, state=other)).state) == digest(first.state)
    assert method.calls == [1]


def test_training_again_in_a_round_starts_from_the_round_before(tmp_path: Path) -> None:
    """Whether later rounds were written or not: a site redoes round 2 from its state of round 1."""
    method = make("local")
    site = tiny_sites(method)["a"]
    site.store = DirectoryStore(tmp_path, "a")
    replies = {r: site.handle(ask(site, r)) for r in (1, 2, 3)}
    second = tmp_path / "00002.safetensors"
    bytes_of = {n: (tmp_path / f"0000{n}.safetensors").read_bytes() for n in (1, 2, 3)}
    second.unlink()
    again = site.handle(ask(site, 2))
    assert second.read_bytes() == bytes_of[2]
    assert again.metrics["loss"] == replies[2].metrics["loss"]


def test_what_is_stored_holds_no_clock(tmp_path: Path) -> None:
    site = tiny_sites(make("fedopal"))["a"]
    site.store = DirectoryStore(tmp_path, "a")
    assert site.handle(ask(site)).metrics["seconds"] > 0
    stored = site.store.reply(1)
    assert stored is not None
    assert "seconds" not in stored.metrics


@dataclass(frozen=True, kw_only=True)
class Sends(FedIT):
    """Sends what a test tells it to send."""

    payload: dict[str, Any] = field(default_factory=dict)

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        return self.payload, {}


@dataclass(frozen=True, kw_only=True)
class Declares(Sends):
    """Declares even what must never leave."""

    sends = ("shared", "private")


@pytest.mark.parametrize(
    ("method", "payload", "message"),
    [
        (Sends, {"scaffold": {}}, "group scaffold"),
        (Sends, {"private": {"w": torch.ones(1)}}, "group private"),
        (Declares, {"private": {"w": torch.ones(1)}}, "group private"),
        (Sends, {"shared": {"w": torch.tensor([1.0, float("nan")])}}, "group shared, w"),
        (Sends, {"shared": {"w": torch.tensor(float("inf"))}}, "group shared, w"),
    ],
)
def test_what_may_not_leave_is_refused_named_and_not_kept(
    method: type[Sends], payload: dict[str, Any], message: str
) -> None:
    site = tiny_sites(FedIT())["a"]
    site.method = method(payload=payload)
    with pytest.raises(UpdateRefusedError, match=f"site a, round 4, {message}"):
        site.handle(ask(site, 4))
    assert site.store.reply(4) is None
    assert site.store.before(9) is None
    (answer,) = InProcess({"a": site}).exchange({"a": ask(site, 4)})
    assert isinstance(answer, Failure)
    assert message in answer.reason


def test_a_method_that_sends_nothing_may_not_send() -> None:
    with pytest.raises(UpdateRefusedError, match="local may send only nothing"):
        check_payload(make("local"), "a", 1, {"shared": {}})
    check_payload(make("local"), "a", 1, {})


def test_a_loss_that_is_not_finite_is_a_failure_and_leaves_the_store_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    site = tiny_sites(make("fedit"))["b"]
    monkeypatch.setattr(Learner, "_objective", lambda self: lambda logits, labels: logits.sum() * float("nan"))
    with pytest.raises(TrainingError, match="site b, round 1, step 1"):
        site.handle(ask(site))
    assert site.store.before(9) is None


def test_a_gradient_that_is_not_finite_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def rooted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits - logits.detach()).square().sum().sqrt()  # 0, with gradient 0/0

    monkeypatch.setattr(Learner, "_objective", lambda self: rooted)
    site = tiny_sites(make("fedit"))["b"]
    with pytest.raises(TrainingError, match="not finite"):
        site.handle(ask(site))


def test_the_general_model_knows_nothing_of_the_site() -> None:
    method = make("fedopal")
    site, newcomer = tiny_sites(method)["a"], tiny_sites(method)["a"]
    trained = site.handle(ask(site))
    received = {"shared": trained.state["shared"]}
    request = ask(site, 1, kind="evaluate", state=received, model="general")
    assert digest({"p": site.params(request)}) == digest({"p": newcomer.params(request)})
    own = replace(request, model="personalised")
    assert digest({"p": site.params(own)}) != digest({"p": newcomer.params(own)})


def test_a_personalised_model_is_that_of_the_round_asked_for() -> None:
    site = tiny_sites(make("local"))["a"]
    marks = []
    for round_ in (1, 2, 3):
        site.handle(ask(site, round_))
        marks.append(digest({"p": site.params(ask(site, round_, kind="evaluate"))}))
    assert len(set(marks)) == 3
    assert [digest({"p": site.params(ask(site, r, kind="evaluate"))}) for r in (1, 2, 3)] == marks


def test_evaluating_changes_nothing_and_repeats() -> None:
    site = tiny_sites(make("fedopal"))["a"]
    site.handle(ask(site))
    before = digest(site.store.before(2) or {})
    first, second = (site.handle(ask(site, kind="evaluate")) for _ in range(2))
    assert first.metrics == second.metrics
    assert first.state == {}
    assert first.metrics["examples"] == len(site.data.rows("val"))
    assert digest(site.store.before(2) or {}) == before


def test_validation_images_are_a_fixed_subset() -> None:
    site = tiny_sites(make("fedit"))["a"]
    every = site.validation_rows()
    site.val_limit = 4
    some = site.validation_rows()
    assert len(some) == 4
    assert set(some) <= set(every)
    assert np.array_equal(some, np.sort(some))
    assert np.array_equal(some, site.validation_rows())
    assert site.handle(ask(site, kind="evaluate")).metrics["examples"] == 4
    site.val_limit = 10_000
    assert np.array_equal(site.validation_rows(), every)


def test_a_site_without_validation_images_gives_no_score() -> None:
    site = tiny_sites(make("fedopal"))["a"]
    site.data = replace(site.data, split=np.where(site.data.split == 1, 0, site.data.split).astype(np.int8))
    found = site.handle(ask(site, kind="evaluate")).metrics
    assert (found["score"], found["confidence"], found["examples"]) == (None, None, 0)
    assert site.handle(ask(site)).metrics["overlap"] is not None


@pytest.mark.parametrize("name", ["fedit", "fedopal", "local"])
def test_predictions_of_the_examination_stay_and_numbers_leave(name: str) -> None:
    kept: dict[str, Tensors] = {}

    def keep(model: str, predictions: Tensors) -> None:
        kept[model] = predictions

    site = tiny_sites(make(name))["a"]
    site.keep = keep
    site.handle(ask(site))
    request = ask(site, kind="evaluate", split="test")
    reply = site.handle(request)
    rows = site.data.rows("test")
    test = kept["personalised"]
    assert torch.equal(test["labels"], torch.from_numpy(site.data.labels[rows]))
    assert torch.equal(test["groups"], torch.from_numpy(site.data.groups[rows]))
    logits = predict(site.backbone, site.params(request), site.data, rows).double()
    expected = (logits / reply.metrics["temperature"]).softmax(1)
    torch.testing.assert_close(test["probabilities"], expected)
    assert reply.state == {}
    json.dumps(reply.metrics, allow_nan=False)

    def arrays(value: object) -> list[list[Any]]:
        if isinstance(value, Mapping):
            return [a for v in value.values() for a in arrays(v)]
        return [list(value), *(a for v in value for a in arrays(v))] if isinstance(value, list | tuple) else []

    assert not any(len(a) >= len(rows) and all(isinstance(x, float) for x in a) for a in arrays(reply.metrics))


def test_overlap_is_reported_only_for_two_adapters() -> None:
    for name, two in (("fedit", False), ("local", False), ("fedopal", True), ("dual", True)):
        site = tiny_sites(make(name))["a"]
        overlap = site.handle(ask(site)).metrics["overlap"]
        assert (overlap is not None) == two
        if overlap is not None:
            assert set(overlap) == {"A", "B", "product", "outputs"}
            assert all(v is None or 0 <= v <= 1 + 1e-6 for v in overlap.values())


def test_a_transport_names_its_sites_in_order_and_lets_other_errors_through(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = tiny_sites(make("fedit"))
    transport = InProcess(dict(reversed(sites.items())))
    assert transport.sites() == SITES

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(site_module, "check_payload", bug)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no failure of a site
        transport.exchange({"a": ask(sites["a"])})


def test_the_tiny_sites_hold_every_class() -> None:
    for site in tiny_sites(make("fedit")).values():
        assert set(site.data.labels[site.data.rows("train")]) == set(range(len(CLASSES)))
