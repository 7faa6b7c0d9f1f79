"""The learning rate over a run: its curve beside PyTorch's, where it enters, and that nobody has to remember it."""

from __future__ import annotations

import cmath
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import SITES, backbone_of, initial_params, tiny_data, tiny_learner, tiny_run, tiny_sites

from confrere.audits.inversion_bench import gradient_of
from confrere.config import validate
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Request, make
from confrere.noisy import NoisyLearner
from confrere.optimiser import AdamW, scheduled
from confrere.privacy.mechanism import Mechanism
from confrere.record.run import Run
from confrere.tensors import State, digest, sub

COSINE: dict[str, Any] = {"schedule": "cosine", "warmup": 0.25}


def with_rate(schedule: str, warmup: float, round_: int, rounds: int, lr: float = 1.0) -> Learner:
    learner = tiny_learner(make("fedit"), "a")
    settings = replace(learner.settings, lr=lr, schedule=schedule, warmup=warmup)
    return replace(learner, settings=settings, round=round_, rounds=rounds)


def slow(schedule: str, warmup: Fraction, round_: int, rounds: int, step: int, steps: int) -> float:
    """Half-steps of the whole run, counted one by one; the cosine as half a turn in the complex plane."""
    total = 2 * steps * rounds
    here = sum(1 for r in range(1, rounds + 1) for _ in range(2 * steps) if r < round_) + 2 * step + 1
    if here < warmup * total:
        return float(Fraction(here) / (warmup * total))
    if schedule == "constant":
        return 1.0
    turned = float((here - warmup * total) / (total - warmup * total))
    return (1 + cmath.rect(1, cmath.pi * turned).real) / 2


@given(st.sampled_from(["constant", "cosine"]), st.integers(0, 19), st.integers(1, 12), st.integers(1, 9), st.data())
def test_the_rate_is_that_of_counting_half_steps(
    schedule: str, twentieths: int, rounds: int, steps: int, data: st.DataObject
) -> None:
    round_, step = data.draw(st.integers(1, rounds)), data.draw(st.integers(0, steps - 1))
    warmup = Fraction(twentieths, 20)
    found = with_rate(schedule, float(warmup), round_, rounds).rate(step, steps)
    assert found == pytest.approx(slow(schedule, warmup, round_, rounds, step, steps), abs=1e-9)
    assert 0 < found <= 1


@given(st.floats(1e-12, 1), st.integers(1, 10_000), st.integers(1, 10_000), st.data())
def test_by_default_the_rate_is_the_given_number_itself(
    lr: float, rounds: int, steps: int, data: st.DataObject
) -> None:
    round_, step = data.draw(st.integers(1, rounds)), data.draw(st.integers(0, steps - 1))
    learner = with_rate("constant", 0.0, round_, rounds, lr)
    assert learner.rate(step, steps).hex() == lr.hex()


def test_the_curve_is_that_of_pytorch() -> None:
    rounds, steps = 4, 3
    fine = 2 * rounds * steps
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=fine)
    curve = []
    for _ in range(fine):
        optimiser.step()
        theirs.step()
        curve.append(theirs.get_last_lr()[0])
    ours = [with_rate("cosine", 0.0, r, rounds, 0.3).rate(s, steps) for r in range(1, rounds + 1) for s in range(steps)]
    np.testing.assert_allclose(ours, curve[::2], rtol=1e-6)


def test_a_site_with_other_steps_is_at_the_same_place() -> None:
    one = with_rate("cosine", 0.3, 2, 5)
    assert one.rate(2, 5) == one.rate(0, 1) == one.rate(10, 21)
    assert scheduled(1.0, "cosine", 0.5, 0.5) == 1.0


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which every step of AdamW adds its rate."""
    rates: list[float] = []
    step = AdamW.step

    def watched(self: AdamW) -> None:
        rates.append(self.lr)
        step(self)

    monkeypatch.setattr(AdamW, "step", watched)
    return rates


def test_both_models_of_a_round_span_the_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, method = recorded(monkeypatch), make("ditto")
    learner = tiny_learner(method, "a")
    learner = replace(learner, settings=replace(learner.settings, lr=0.01, steps=5, **COSINE), round=2)
    received = {"shared": initial_params(backbone_of(method), method, "a")}
    method.update(learner, received, {"private": {}})
    assert rates == [learner.rate(s, n) for n in (3, 2) for s in range(n)]
    assert len(set(rates)) == 5


def test_noisy_steps_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, learner = recorded(monkeypatch), with_rate("cosine", 0.25, 3, 3, 0.01)
    mechanism = Mechanism(unit="record", units=12, rate=0.5, sigma=1.0, clip=1.0, noise_seed=1)
    noisy = NoisyLearner(**vars(learner), mechanism=mechanism, steps_left=3)
    noisy.fit(initial_params(learner.backbone, make("fedit"), "a"))
    assert rates == [learner.rate(step, 3) for step in range(3)]


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def test_a_run_cut_anywhere_ends_with_the_same_bytes(tmp_path: Path) -> None:
    method = make("fedopal")
    whole, sites = tiny_run(method, tmp_path / "whole", disk=True, **COSINE)
    kept = {name: digest(site.store.before(4) or {}) for name, site in sites.items()}
    cut = tmp_path / "cut"
    tiny_run(method, cut, disk=True, **COSINE)
    run = Run(cut)
    lines = [one for one in run.events_file.read_text().splitlines() if not re.search('"round": [23]', one)]
    run.events_file.write_text("".join(f"{line}\n" for line in lines) + '{"event": "rou')
    for round_ in (2, 3):  # neither the server nor any site has seen them
        run.server_file(round_).unlink()
        for name in SITES:
            files = list((cut / "sites" / name).glob(f"*{round_}.safetensors"))
            assert files
            for file in files:
                file.unlink()
    resumed, again = tiny_run(method, cut, disk=True, **COSINE)
    assert digest(resumed) == digest(whole)
    assert {name: digest(site.store.before(4) or {}) for name, site in again.items()} == kept


def test_a_site_that_comes_late_trains_at_the_rate_of_the_round() -> None:
    method = make("fedit")
    sites = tiny_sites(method, **COSINE)
    server = start(method)
    late = sites["b"].handle(Request(kind="train", round=3, state=method.broadcast(server, "b")))
    learner = replace(tiny_learner(method, "b"), settings=sites["b"].settings, round=3)
    expected, _ = method.update(learner, method.broadcast(server, "b"), {})
    assert digest(late.state) == digest(expected)


def test_a_single_step_of_a_single_round_still_moves() -> None:
    learner = with_rate("cosine", 0.5, 1, 1, 0.01)
    params = initial_params(learner.backbone, make("fedit"), "a")
    moved = learner.fit(params, steps=1)
    assert learner.rate(0, 1) == 0.01
    assert any(not torch.equal(moved[name], params[name]) for name in params)


def test_what_an_attacker_reads_off_one_step_is_a_sign_at_any_rate() -> None:
    learner = replace(with_rate("cosine", 0.0, 3, 3, 0.01), data=tiny_data(backbone_of(make("fedit")), "a"))
    before = {n: v + 0.1 for n, v in initial_params(learner.backbone, make("fedit"), "a").items()}
    change = sub(learner.fit(before, steps=1), before)
    shown = gradient_of(change, before, learner.rate(0, 1), learner.settings.weight_decay)
    np.testing.assert_allclose(shown["head.bias"].abs(), 1.0, atol=0.02)


@pytest.mark.parametrize("train", [{"schedule": "linear"}, {"warmup": 1.0}, {"warmup": -0.1}, {"warmup": float("nan")}])
def test_what_is_no_schedule_is_refused(train: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="train"):
        validate({"path": "x", "train": train})
    assert validate({"path": "x", "train": COSINE}).for_method("fedit:train.schedule=constant").train.warmup == 0.25
