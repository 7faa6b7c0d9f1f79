"""Budgets against the published table, dp-accounting itself and a formula written slowly; verdicts on noise."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("dp_accounting")

import sys

from confrere.errors import ConfigError, MissingExtraError
from confrere.privacy import (
    calibrate_sigma,
    check_delta,
    epsilon,
    noise_ratio,
    noise_verdict,
    refuse_hopeless,
    sites_needed,
    statement,
)
from confrere.privacy.accounting import _epsilon

STUDY = {"rounds": 50, "delta": 1e-3, "rate": 0.5}
FIXED = {"sampling": "fixed", "units": 10, "neighbours": "replace-one", "accountant": "rdp"}


@pytest.mark.parametrize(
    ("options", "at_2", "at_3"),
    [
        ({"accountant": "rdp"}, "8.00", "4.62"),
        ({}, "6.98", "4.03"),
        pytest.param({"sampling": "all"}, "16.5", "9.4", marks=pytest.mark.slow),
        (FIXED, "48", "28"),
        pytest.param({"sampling": "all", "neighbours": "replace-one"}, "46", "25", marks=pytest.mark.slow),
        pytest.param({"delta": 1e-5}, "9.5", "5.6", marks=pytest.mark.slow),
    ],
)
def test_the_table_of_ten_hospitals_and_fifty_rounds(options, at_2, at_3):
    """Half of ten hospitals a round; to the digits that are printed."""
    for sigma, printed in ((2.0, at_2), (3.0, at_3)):
        digits = len(printed.partition(".")[2])
        assert f"{epsilon(sigma, **{**STUDY, **options}):.{digits}f}" == printed


def test_epsilon_is_that_of_dp_accounting_used_directly():
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    book = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    book.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.5)), 20)
    found = epsilon(1.5, rounds=20, delta=1e-5, rate=0.1)
    assert found == pytest.approx(book.get_epsilon(1e-5), abs=1e-3)
    every = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    every.compose(dp.GaussianDpEvent(4.0), 10)  # round by round, where we take one round of less noise
    assert epsilon(4.0, rounds=10, delta=1e-5, sampling="all") == pytest.approx(every.get_epsilon(1e-5), abs=1e-3)


def rdp_by_hand(q, sigma, order):
    """Return the divergence at a whole order of the sampled Gaussian (Mironov et al. 2019, section 3.3)."""
    logs = [
        math.log(math.comb(order, k)) + (order - k) * math.log(1 - q) + k * math.log(q) + (k * k - k) / (2 * sigma**2)
        for k in range(order + 1)
    ]
    return (max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs))) / (order - 1)


def epsilon_by_hand(q, sigma, rounds, delta, orders):
    """Return the least over orders of ``R + log((a - 1) / a) - (log delta + log a) / (a - 1)``, as Opacus has it."""
    return min(
        rounds * rdp_by_hand(q, sigma, a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in orders
    )


@pytest.mark.parametrize(
    ("q", "sigma", "rounds", "delta"), [(0.5, 2, 50, 1e-3), (0.1, 1.2, 200, 1e-5), (0.9, 5, 30, 1e-4)]
)
def test_renyi_agrees_with_the_formula_of_opacus_and_bounds_the_tight_answer(q, sigma, rounds, delta):
    found = epsilon(sigma, rounds=rounds, delta=delta, rate=q, accountant="rdp")
    assert found == pytest.approx(epsilon_by_hand(q, sigma, rounds, delta, range(2, 65)), abs=1e-6)
    if rounds == 30:
        assert epsilon(sigma, rounds=rounds, delta=delta, rate=q) < found


def test_the_numbers_that_opacus_publishes_in_its_own_tests():
    """G22: noise 1.5, rate 0.04, 2,250 steps, delta 1e-5: 7.32911117 by Renyi divergence, 6.77739571 by PRV."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))  # those of Opacus
    book = RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    book.compose(dp.PoissonSampledDpEvent(0.04, dp.GaussianDpEvent(1.5)), 2250)
    assert book.get_epsilon(1e-5) == pytest.approx(7.32911117, rel=1e-3)
    plan = {"rounds": 2250, "delta": 1e-5, "rate": 0.04}
    assert 7.32911 < epsilon(1.5, **plan, accountant="rdp") < 7.4  # whole orders alone: a little above
    assert epsilon(1.5, **plan) == pytest.approx(6.77739571, rel=2e-3)
    assert epsilon(1.5, **plan) <= 6.77739571 + 1e-3


def test_less_noise_more_rounds_or_more_sampling_cost_more():
    def cost(sigma=2.0, rounds=10, rate=0.3):
        return epsilon(sigma, rounds=rounds, delta=1e-4, rate=rate, accountant="rdp")

    assert cost(sigma=1.0) > cost() > cost(sigma=4.0)
    assert cost(rounds=5) < cost() < cost(rounds=20)
    assert cost(rate=0.1) < cost() < cost(rate=0.9) < cost(rate=1.0)
    assert math.isinf(cost(sigma=0.0))


@pytest.mark.parametrize("options", [{"accountant": "rdp"}, pytest.param(FIXED, marks=pytest.mark.slow)])
def test_sigma_for_a_target_meets_it_and_just_so(options):
    options = {**STUDY, **options}
    sigma = calibrate_sigma(3.0, tolerance=0.02, **options)
    assert epsilon(sigma, **options) <= 3.0 < epsilon(sigma - 0.02, **options)


@pytest.mark.slow
def test_sigma_for_a_target_by_the_tight_accountant():
    tight = calibrate_sigma(4.0344, **STUDY, tolerance=0.01)
    assert tight == pytest.approx(3.0, abs=0.011)
    assert epsilon(tight, **STUDY) <= 4.0344
    assert tight < calibrate_sigma(4.0344, **STUDY, accountant="rdp")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"sigma": -1.0}, "value"),
        ({"sigma": float("nan")}, "value"),
        ({"rounds": 0}, "value"),
        ({"delta": 0.0}, "value"),
        ({"delta": 1.0}, "value"),
        ({"rate": 0.0}, "value"),
        ({"rate": 1.1}, "value"),
        ({"sampling": "shuffled"}, "unknown-name"),
        ({"accountant": "moments"}, "unknown-name"),
        ({"neighbours": "one"}, "unknown-name"),
        ({"neighbours": "replace-one"}, "accounting"),
        ({"sampling": "fixed", "units": 10}, "accounting"),
        ({**FIXED, "accountant": "pld"}, "accounting"),
        ({**FIXED, "units": 0}, "value"),
    ],
)
def test_what_no_proof_covers_is_refused(options, code):
    with pytest.raises(ConfigError) as raised:
        epsilon(**{"sigma": 2.0, **STUDY, **options})
    assert raised.value.code == code


def test_targets_that_cannot_be_are_refused():
    for target, code in ((0.0, "value"), (float("inf"), "value"), (1e-9, "accounting")):
        with pytest.raises(ConfigError) as raised:
            calibrate_sigma(target, rounds=1000, delta=1e-9, accountant="rdp")
        assert raised.value.code == code


def test_the_ratio_of_noise_to_clip_and_its_verdict():
    """The numbers of our page: ViT-S adapters of rank 4, with A frozen, a head of 384 x 7."""
    assert [round(noise_ratio(3.0, d, 5)) for d in (73_728, 36_864, 384 * 7)] == [163, 115, 31]
    assert "out of reach" in noise_verdict(3.0, 73_728, 5)
    assert "can work" in noise_verdict(3.0, 100, 100)
    assert "loss of accuracy" in noise_verdict(1.0, 100, 5)
    assert (
        noise_ratio(3.0, 73_728, sites_needed(3.0, 73_728))
        <= 1
        < noise_ratio(3.0, 73_728, sites_needed(3.0, 73_728) - 1)
    )
    with pytest.raises(ConfigError) as raised:
        refuse_hopeless(3.0, 73_728, 5)
    assert raised.value.code == "noise-drowns"
    refuse_hopeless(3.0, 73_728, 5, most=200)
    refuse_hopeless(0.0, 73_728, 5)
    with pytest.raises(ConfigError):
        noise_ratio(3.0, 10, 0)


def test_a_statement_says_delta_unit_neighbours_sampling_and_accountant():
    said = statement(4.034, **STUDY)
    for part in ("4.03", "0.001", "whole hospital", "added or removed", "50 rounds", "Poisson", "0.5", "PLD"):
        assert part in said
    assert "no privacy" in statement(math.inf, rounds=1, delta=0.1)


def test_without_dp_accounting_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    _epsilon.cache_clear()
    with pytest.raises(MissingExtraError, match="dp-accounting"):
        epsilon(2.0, rounds=3, delta=0.1, accountant="rdp")


def test_delta_is_at_most_a_tenth_over_the_units() -> None:
    check_delta(1e-3, 100)
    check_delta(1e-2, 10)
    with pytest.raises(ConfigError, match="too large for 100 hospitals") as raised:
        check_delta(1.1e-3, 100)
    assert (raised.value.code, raised.value.where, raised.value.fix) == (
        "privacy",
        "privacy.delta",
        "use 0.001 or less",
    )


def test_hopeless_noise_is_told_at_once_and_bounds_what_sampling_could_save() -> None:
    """The distribution of so large a loss would fill the memory."""
    few = epsilon(1e-6, rounds=3, delta=1e-3, sampling="poisson", rate=0.5)
    assert few == epsilon(1e-6, rounds=3, delta=1e-3, sampling="all")
    near = epsilon(0.3, rounds=1, delta=1e-3, sampling="poisson", rate=0.5)
    assert near <= epsilon(0.3, rounds=1, delta=1e-3, sampling="all")
