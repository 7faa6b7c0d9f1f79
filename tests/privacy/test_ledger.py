"""A site's record of noisy steps: never too little, over kills, redeliveries, lost files and budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from noisy import EVERYBODY
from tiny_federation import SITES, backbone_of, initial_params, tiny_data, tiny_plan, tiny_sites

from confrere.adapters.names import slot_of
from confrere.choices import PrivacyChoice
from confrere.errors import ConfigError, RunError, TrainingError, UpdateRefusedError
from confrere.federation.budget import privacy_said
from confrere.federation.events import brief
from confrere.federation.ledger import Ledger, all_spent, ledger_of
from confrere.federation.loop import federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.learner import TrainSettings
from confrere.method import Method, Request, make
from confrere.privacy import epsilon
from confrere.privacy.spending import spent, within
from confrere.record.run import Run
from confrere.tensors import State, digest

FEDIT = make("fedit")
IN_TURN = make("fedopal", {"training": "in-turn", "warmup": 0})
LOUD = replace(EVERYBODY, rate=0.5, sigma=4.0, noise_seed=0)


def ledger(folder: Path | None, **changes: Any) -> Ledger:
    file = folder / "privacy.jsonl" if folder else None
    options = {"mechanism": LOUD, "delta": 1e-3, "limit": 0.0, "file": file} | changes
    return Ledger(**options)


def hiding(method: Method, run: Run, **changes: Any) -> dict[str, Site]:
    """Return three sites that keep state and ledger on disk."""
    stores: dict[str, Any] = {name: run.store(name) for name in SITES}
    sites = tiny_sites(method, stores=stores, steps=2, balance="none")
    for name, site in sites.items():
        site.ledger = ledger(stores[name].folder, **changes)
        site.hides = PrivacyChoice(unit="record", noise_seed=site.ledger.mechanism.noise_seed)
    return sites


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def asked(method: Method, round_: int = 1) -> Request:
    return Request(kind="train", round=round_, state=method.broadcast(start(method), "a"))


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def test_a_request_that_comes_twice_gets_the_stored_answer_and_costs_once(tmp_path: Path) -> None:
    site = hiding(FEDIT, Run(tmp_path))["a"]
    first, second = site.handle(asked(FEDIT)), site.handle(asked(FEDIT))
    assert digest(first.state) == digest(second.state)
    assert [(d["round"], d["steps"]) for d in site.ledger.debits()] == [(1, 2)]  # type: ignore[union-attr]


def test_two_sites_with_one_seed_differ_in_their_noise(tmp_path: Path) -> None:
    """H9: and with a seed of the noise they do not."""
    of_system = [hiding(FEDIT, Run(tmp_path / name))["a"].handle(asked(FEDIT)) for name in "ab"]
    assert digest(of_system[0].state) != digest(of_system[1].state)
    seeded = replace(LOUD, noise_seed=3)
    same = [hiding(FEDIT, Run(tmp_path / name), mechanism=seeded)["a"].handle(asked(FEDIT)) for name in "cd"]
    assert digest(same[0].state) == digest(same[1].state)
    assert same[0].metrics["kept"] == same[1].metrics["kept"]


@pytest.mark.parametrize("method", [FEDIT, IN_TURN], ids=["fedit", "fedopal"])
def test_an_answer_says_nothing_that_was_made_without_noise(method: Method, tmp_path: Path) -> None:
    site = hiding(method, Run(tmp_path))["a"]
    reply = site.handle(asked(method))
    assert set(reply.metrics) == {"examples", "overlap", "spent", "kept", "stored", "seconds"}
    assert reply.metrics["overlap"] is None
    assert reply.metrics["stored"] == digest(reply.state)
    state = {k: v for k, v in site.store.before(2).items()}  # type: ignore[union-attr]
    assert reply.metrics["kept"] == digest(state)
    assert len(np.unique(state.pop("salt")["salt"].numpy())) == 8  # without which a guess of the state could be tried
    judged = site.handle(Request(kind="evaluate", round=1, state=method.broadcast(start(method), "a")))
    assert judged.metrics == {"score": None, "confidence": None, "examples": 6, "overlap": None}
    said = site.handle(Request(kind="evaluate", round=1, state=method.broadcast(start(method), "a"), split="test"))
    own = said.metrics["privacy"]
    steps = 2 if method is FEDIT else 1
    assert (own["unit"], own["steps"], own["debits"], own["delta"]) == ("record", steps, 1, 1e-3)
    assert own["epsilon"] == pytest.approx(epsilon(4.0, rounds=steps, delta=1e-3, rate=0.5))


def test_a_training_of_the_same_run_that_sends_nothing_tells_nothing_either(tmp_path: Path) -> None:
    """Its losses and scores would be read off the images that others' noise hides, and no ledger counts them."""
    method, stores = make("local"), {name: Run(tmp_path).store(name) for name in SITES}
    site = tiny_sites(method, stores=stores)["a"]  # type: ignore[arg-type]
    told = site.handle(asked(method, 1))
    assert told.metrics["loss"] > 0
    site.hides = PrivacyChoice(unit="record")
    hidden = site.handle(asked(method, 2))
    assert set(hidden.metrics) == {"examples", "overlap", "kept", "stored", "seconds"}
    assert "salt" in (site.store.before(3) or {})
    judged = site.handle(Request(kind="evaluate", round=2, state=method.broadcast(start(method), "a")))
    assert (judged.metrics["score"], judged.metrics["confidence"], judged.metrics["overlap"]) == (None, None, None)


def test_no_image_decides_whether_a_hiding_site_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server could send weights that overflow for one image alone."""
    site = hiding(IN_TURN, Run(tmp_path))["a"]
    site.data = replace(site.data, split=np.where(site.data.split == 1, 0, site.data.split))  # none to validate with
    monkeypatch.setattr(Site, "_look", lambda *_: pytest.fail("images were looked at without noise"))
    monkeypatch.setattr("confrere.learner.Learner.fit", lambda *_, **__: (_ for _ in ()).throw(TrainingError("x")))
    before = site.params(asked(IN_TURN))
    with pytest.warns(RuntimeWarning, match="stays as it was: x"):
        reply = site.handle(asked(IN_TURN))
    after = site.params(Request(kind="train", round=1, state=asked(IN_TURN).state))
    assert digest(reply.state) != digest(asked(IN_TURN).state)  # the noisy half went on
    assert digest({"": {n: t for n, t in after.items() if slot_of(n) == "personal"}}) == digest(
        {"": {n: t for n, t in before.items() if slot_of(n) == "personal"}}
    )


def test_a_kill_before_the_answer_is_kept_costs_a_second_debit_and_new_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, sent = hiding(FEDIT, Run(tmp_path))["a"], []

    def kill(round_: int, state: State, reply: Any) -> None:
        sent.append(reply)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(site.store), "write", lambda self, *args: kill(*args))
        with pytest.raises(KeyboardInterrupt):
            site.handle(asked(FEDIT))
    again = hiding(FEDIT, Run(tmp_path))["a"]
    reply = again.handle(asked(FEDIT))
    assert [d["round"] for d in again.ledger.debits()] == [1, 1]  # type: ignore[union-attr]
    assert digest(reply.state) != digest(sent[0].state)


def test_a_kill_before_the_debit_is_whole_costs_nothing_for_nothing_was_made(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.debit(1, 5)
    whole = book.file.read_bytes()  # type: ignore[union-attr]
    book.debit(2, 5)
    torn = book.file.read_bytes()[:-7]  # type: ignore[union-attr]
    book.file.write_bytes(torn)  # type: ignore[union-attr]
    assert [d["round"] for d in ledger(tmp_path).debits()] == [1]
    ledger(tmp_path).debit(2, 5)
    assert book.file.read_bytes().startswith(whole)  # type: ignore[union-attr]
    assert [d["round"] for d in book.debits()] == [1, 2]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["ask", "ask twice", "kill in steps", "kill in debit", "kill after"]), max_size=12))
def test_the_ledger_never_counts_less_than_what_was_made(
    tmp_path_factory: pytest.TempPathFactory, story: list[str]
) -> None:
    """G25, at every place where a process may end: what counts is whether noisy steps began."""
    folder, begun, round_ = tmp_path_factory.mktemp("ledger"), 0, 1
    stored: set[int] = set()
    for event in story:
        book = ledger(folder)
        if round_ in stored:
            round_ += 1
        if event == "kill in debit":
            before = book.file.read_bytes() if book.file.exists() else b""  # type: ignore[union-attr]
            book.debit(round_, 3)
            book.file.write_bytes(before + book.file.read_bytes()[len(before) :][:20])  # type: ignore[union-attr]
            continue
        book.debit(round_, 3)
        begun += 3
        if event in ("ask", "ask twice", "kill after"):
            (folder / f"{round_:05d}.safetensors").touch()
            stored.add(round_)
    assert ledger(folder).said()["steps"] >= begun
    assert ledger(folder).said()["epsilon"] == pytest.approx(spent([{**ledger(folder)._entry(1, begun)}], 1e-3))


def test_a_ledger_that_was_lost_or_harmed_stops_the_site(tmp_path: Path) -> None:
    site = hiding(FEDIT, Run(tmp_path))["a"]
    site.handle(asked(FEDIT))
    file = site.ledger.file  # type: ignore[union-attr]
    content = file.read_bytes()  # type: ignore[union-attr]
    for harmed, code in ((None, "privacy-ledger"), (content.replace(b'"steps": 2', b'"steps": 1'), "journal")):
        file.unlink(missing_ok=True)  # type: ignore[union-attr]
        if harmed:
            file.write_bytes(harmed)  # type: ignore[union-attr]
        with pytest.raises(RunError) as raised:
            hiding(FEDIT, Run(tmp_path))["a"].handle(asked(FEDIT, 2))
        assert raised.value.code == code
        assert "delete" not in raised.value.fix  # epsilon would be too small


def test_a_budget_refuses_the_round_that_would_exceed_it_and_enters_nothing(tmp_path: Path) -> None:
    limit = epsilon(4.0, rounds=4, delta=1e-3, rate=0.5) + 1e-6
    site = hiding(FEDIT, Run(tmp_path), limit=limit)["a"]
    assert [site.handle(asked(FEDIT, r)).metrics["spent"] for r in (1, 2)] == [False, True]
    with pytest.raises(UpdateRefusedError) as raised:
        site.handle(asked(FEDIT, 3))
    assert raised.value.code == "privacy-spent"
    assert len(site.ledger.debits()) == 2  # type: ignore[union-attr]
    assert site.ledger.said()["epsilon"] <= limit  # type: ignore[union-attr]
    digests = {digest(site.handle(asked(FEDIT, 2)).state) for _ in range(2)}  # what was released is sent again
    assert len(digests) == 1


def test_a_run_ends_when_every_site_has_spent_its_budget(tmp_path: Path) -> None:
    limit = epsilon(4.0, rounds=4, delta=1e-3, rate=0.5) + 1e-6
    run = Run(tmp_path)
    sites = hiding(FEDIT, run, limit=limit)
    sites["b"].ledger.debit(1, 2)  # type: ignore[union-attr]  # a try that was killed: it is out a round earlier
    sites = {name: replace(site, rounds=5) for name, site in sites.items()}
    federate(FEDIT, start(FEDIT), InProcess(sites), tiny_plan(FEDIT, rounds=5), run)
    assert run.last_round() == 2
    assert [e["site"] for e in of(run, "failure")] == ["b"]
    assert of(run, "failure")[0]["code"] == "privacy-spent"
    (stop,) = of(run, "stop")
    assert "spent its privacy budget" in stop["reason"]
    assert all(len(site.ledger.debits()) == 2 for site in sites.values())  # type: ignore[union-attr]


def test_sites_that_were_not_asked_have_not_spent_their_budget() -> None:
    """With a part of the sites a round, those of one round may all be out while others are not."""
    journal = [brief({"event": "round", "round": 1, "sites": {"a": {"spent": True}, "b": {}}})]
    assert not all_spent([], ())
    assert not all_spent(journal, "ab")
    journal += [brief({"event": "evaluation", "round": 2, "sites": {"a": 0.5}, "mean": 0.5, "criterion": 0.5})]
    journal += [brief({"event": "round", "round": 2, "sites": {"b": {"spent": True}}})]
    assert all_spent(journal, "ab")
    assert not all_spent(journal, "abc")


def test_the_noise_is_made_for_the_noisy_steps_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[Any] = []
    monkeypatch.setattr("confrere.federation.ledger.calibrate_sigma", lambda *a, **o: asked_for.append((a, o)) or 9.0)
    chosen = PrivacyChoice(unit="record", epsilon=2.0, delta=1e-3)
    for method, steps in ((FEDIT, 15), (IN_TURN, 9), (make("fedit-ft"), 10)):
        settings_ = TrainSettings(steps=5, batch_size=3, balance="none")
        book = ledger_of(method, chosen, settings_, tiny_data(backbone_of(method), "a"), 3, None)
        assert book is not None
        assert (book.mechanism.sigma, book.limit) == (9.0, 2.0)
        target, options = asked_for.pop()
        assert target == (2.0,)
        assert (options["rounds"], options["rate"], options["delta"]) == (steps, 0.25, 1e-3)


@pytest.mark.slow
def test_the_noise_is_the_least_that_the_budget_allows_for_all_rounds() -> None:
    settings_ = TrainSettings(steps=5, batch_size=3, balance="none")
    chosen = PrivacyChoice(unit="record", epsilon=2.0, delta=1e-3)
    for method, steps in ((FEDIT, 15), (IN_TURN, 9), (make("fedit-ft"), 10)):
        book = ledger_of(method, chosen, settings_, tiny_data(backbone_of(method), "a"), 3, None)
        assert book is not None
        assert (book.mechanism.rate, book.mechanism.units, book.mechanism.expected) == (0.25, 12, 3.0)
        cost = epsilon(book.mechanism.sigma, rounds=steps, delta=1e-3, rate=0.25)
        assert cost <= 2.0 < epsilon(book.mechanism.sigma - 0.02, rounds=steps, delta=1e-3, rate=0.25)
    assert ledger_of(make("local"), chosen, settings_, tiny_data(backbone_of(make("local")), "a"), 3, None) is None
    assert ledger_of(FEDIT, PrivacyChoice(), settings_, tiny_data(backbone_of(FEDIT), "a"), 3, None) is None


def test_patients_are_counted_and_have_to_be_named() -> None:
    data = tiny_data(backbone_of(FEDIT), "a")
    chosen = PrivacyChoice(unit="patient", sigma=1.0, delta=1e-3, images=3)
    settings_ = TrainSettings(batch_size=16)
    pairs, rows = np.arange(24) // 2, data.rows("train")
    everybody = frozenset(range(12))
    but_one = everybody - {int(pairs[rows[0]])}
    for named, said in ((frozenset(), "whose 12 of 12 training images"), (but_one, "whose 2 of 12 training images")):
        with pytest.raises(ConfigError, match=said) as raised:
            ledger_of(FEDIT, chosen, settings_, replace(data, groups=pairs, named=named), 3, None)
        assert (raised.value.code, raised.value.where) == ("privacy", "privacy.unit")
    trained = frozenset(pairs[rows].tolist())  # who is tested on need not be named
    book = ledger_of(FEDIT, chosen, settings_, replace(data, groups=pairs, named=trained), 3, None)
    assert book is not None
    own = book.mechanism
    assert (own.unit, own.units, own.rate, own.images, own.expected) == ("patient", 6, 1.0, 3, 6.0)
    one_each = ledger_of(FEDIT, chosen, settings_, replace(data, named=frozenset(data.groups.tolist())), 3, None)
    assert one_each is not None
    assert one_each.mechanism.units == 12
    with pytest.raises(ConfigError, match="too large for 12 images"):
        ledger_of(FEDIT, PrivacyChoice(unit="record", sigma=1.0, delta=0.01), settings_, data, 3, None)


def test_debits_of_unequal_noise_compose_and_are_bounded() -> None:
    def of_(sigma: float, rate: float, steps: int) -> dict[str, Any]:
        return {"sigma": sigma, "rate": rate, "steps": steps}

    assert spent([], 1e-3) == spent([of_(1.0, 0.5, 0)], 1e-3) == 0.0
    assert within([], 1e-3, 0.1)
    assert math.isinf(spent([of_(0.0, 0.5, 1)], 1e-3))
    assert not within([of_(0.0, 0.5, 1)], 1e-3, 1e9)
    one, two = of_(2.0, 0.3, 4), of_(3.0, 0.2, 6)
    both = spent([one, two], 1e-3)
    assert max(spent([one], 1e-3), spent([two], 1e-3)) < both < spent([one], 1e-3) + spent([two], 1e-3)
    assert spent([one, one], 1e-3) == epsilon(2.0, rounds=8, delta=1e-3, rate=0.3)
    assert spent([of_(0.1, 0.3, 1), two], 1e-3) > spent([two], 1e-3)
    assert within([one], 1e-3, spent([one], 1e-3))
    assert not within([one], 1e-3, spent([one], 1e-3) - 0.01)


def test_what_results_say_survives_what_a_site_may_send() -> None:
    fine = ledger(None).said() | {"epsilon": 1.5}
    run = Run(Path("nowhere"))
    said = privacy_said(None, FEDIT, run, {"a": {"privacy": fine}, "b": {"privacy": {**fine, "epsilon": 2.5}}})[
        "privacy"
    ]
    assert (said["epsilon"], said["unit"], said["delta"], said["sigma"], said["clip"]) == (
        2.5,
        "record",
        1e-3,
        4.0,
        0.5,
    )
    for part in ("epsilon 2.50", "delta 0.001", "one training image", "4 times the clip of 0.5", "Poisson", "PLD"):
        assert part in said["statement"]
    assert any("validation and test" in part for part in said["not_covered"])
    odd = {"unit": 3, "epsilon": "1", "delta": None, "sigma": True, "seeded": 1}
    said = privacy_said(None, FEDIT, run, {"a": {"privacy": fine}, "b": {"privacy": odd}})["privacy"]
    assert said["epsilon"] is None
    assert said["statement"].startswith("Simulation, no privacy")
    assert "no privacy; unit: unknown or one training image" in said["statement"]
    assert privacy_said(None, FEDIT, run, {"a": {}}) == {}
