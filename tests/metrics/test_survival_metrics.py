"""Survival metrics against loops over pairs, lifelines and torchsurv: ties, all censored, one patient, time zero."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.errors import DataError
from confrere.metrics.bootstrap import draw
from confrere.metrics.kaplan_meier import (
    FEWEST,
    POINTS,
    censoring,
    d_calibration,
    few_times,
    grouped_curves,
    kaplan_meier,
    survival_calibration,
)
from confrere.metrics.survival import (
    HEADLINE,
    antolini,
    auc_at,
    brier,
    evaluate_survival,
    harrell,
    integrated,
    uno,
)

ONE = np.ones((1, 1))


def sample(seed, n=15, *, ties=True, events=0.6):
    """Return times (0 among them with ties), events, and a rate for each patient with some ties."""
    g = np.random.default_rng(seed)
    times = g.integers(0, 8, n).astype(float) if ties else g.uniform(0.1, 8, n)
    return times, g.random(n) < events, np.round(np.exp(g.normal(size=n)), 1) + 0.1


def curves_of(rates):
    """Exponential curves that cross: the shape depends on the rate, too."""
    return lambda at: np.exp(-((rates[:, None] * 0.2 * np.asarray(at)) ** (0.5 + rates[:, None] / 2)))


def repeated(weights, *arrays):
    """Return each record as often as a resample drew it."""
    return [np.repeat(a, weights.astype(int), axis=0) for a in arrays]


def longer(t, e, i, j):
    return i != j and (t[j] > t[i] or (t[j] == t[i] and not e[j]))


def free_by_hand(t, e, at, *, before):
    """Chance to be uncensored: at each time of censoring, events have left."""
    chance = 1.0
    for when in sorted(set(t[~e])):
        if when < at or (when == at and not before):
            left = sum((t > when) | ((t == when) & ~e))
            chance *= 1 - sum((t == when) & ~e) / left
    return chance


def concordance_by_hand(t, e, better, weight):
    right = all_ = 0.0
    for i in range(len(t)):
        for j in range(len(t)):
            if e[i] and longer(t, e, i, j):
                right += weight(i) * better(i, j)
                all_ += weight(i)
    return right / all_ if all_ else np.nan


def half(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def slow(t, e, rates, at):
    """Return every metric by loops: Harrell, Uno, Antolini, then Brier score and AUC at a time."""
    curve, n = curves_of(rates), len(t)
    at_all = curve(t) if n else np.zeros((0, 0))
    free = [free_by_hand(t, e, t[i], before=True) for i in range(n)]
    s = curve(np.array([at]))[:, 0]
    found = {
        "harrell": concordance_by_hand(t, e, lambda i, j: half(rates[i], rates[j]), lambda i: 1.0),
        "uno": concordance_by_hand(t, e, lambda i, j: half(rates[i], rates[j]), lambda i: free[i] ** -2),
        "antolini": concordance_by_hand(t, e, lambda i, j: half(at_all[j, i], at_all[i, i]), lambda i: 1.0),
    }
    late = free_by_hand(t, e, at, before=False)
    terms = [
        s[i] ** 2 / free[i] if t[i] <= at and e[i] else (1 - s[i]) ** 2 / late if t[i] > at else 0.0 for i in range(n)
    ]
    found["brier"] = np.nan if late == 0 or not n else sum(terms) / n
    right = all_ = 0.0
    for i in range(n):
        for j in range(n):
            if e[i] and t[i] <= at < t[j]:
                right, all_ = right + half(s[j], s[i]) / free[i], all_ + 1 / free[i]
    found["auc"] = right / all_ if all_ else np.nan
    return found


def fast(t, e, rates, at, weights):
    curve = curves_of(rates)
    grid = np.array([at])
    return {
        "harrell": harrell(t, e, rates, weights),
        "uno": uno(t, e, rates, weights),
        "antolini": antolini(t, e, curve, weights),
        "brier": brier(t, e, curve(grid), grid, weights)[:, 0],
        "auc": auc_at(t, e, -curve(grid)[:, 0], at, weights),
    }


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 14),
    ties=st.booleans(),
    events=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    at=st.sampled_from([0.0, 2.0, 3.5, 9.0]),
)
def test_every_resample_agrees_with_loops_over_pairs(seed, n, ties, events, at):
    t, e, rates = sample(seed, n, ties=ties, events=events)
    weights = draw(n, np.random.default_rng(seed), 3)
    found = fast(t, e, rates, at, weights)
    for r, w in enumerate(weights):
        drawn = repeated(w, t, e, rates)
        for name, value in slow(*drawn, at).items():
            np.testing.assert_allclose(found[name][r], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.slow  # the import alone takes seconds
@pytest.mark.parametrize("seed", range(4))
def test_harrells_c_is_that_of_lifelines(seed):
    pytest.importorskip("lifelines")
    from lifelines.utils import concordance_index

    t, e, rates = sample(seed, 60)
    ours = float(harrell(t, e, rates, np.ones((1, 60)))[0])
    assert ours == pytest.approx(concordance_index(t, -rates, e), abs=1e-12)


@pytest.mark.slow  # the import alone takes seconds
@pytest.mark.parametrize("seed", range(3))
def test_kaplan_meier_and_its_intervals_are_those_of_lifelines(seed):
    pytest.importorskip("lifelines")
    from lifelines import KaplanMeierFitter

    t, e, _ = sample(seed, 50)
    t[:2], e[:2] = 0.0, True  # an event at time zero
    ours = kaplan_meier(t, e)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KaplanMeierFitter().fit(t, e)
    at = ours["times"]
    np.testing.assert_allclose(ours["survival"], theirs.survival_function_at_times(at).to_numpy(), atol=1e-12)
    bounds = theirs.confidence_interval_.loc[at].to_numpy()
    for k, key in enumerate(("low", "high")):
        known = [i for i, value in enumerate(ours[key]) if value is not None]
        assert len(known) >= len(at) - 1
        np.testing.assert_allclose(np.array(ours[key], float)[known], bounds[known, k], atol=1e-10)
    assert ours["at_risk"] == theirs.event_table.loc[at, "at_risk"].tolist()
    assert ours["events"] == theirs.event_table.loc[at, "observed"].tolist()


@pytest.mark.slow  # the import alone takes seconds
@pytest.mark.parametrize("seed", range(3))
def test_brier_score_and_uno_are_those_of_torchsurv_given_our_weights(seed):
    """With the same weights against censoring: the one thing that libraries define differently at ties."""
    torch = pytest.importorskip("torch")
    cindex = pytest.importorskip("torchsurv.metrics.cindex")
    score = pytest.importorskip("torchsurv.metrics.brier_score")
    t, e, rates = sample(seed, 40, ties=False)
    ones, grid = np.ones((1, 40)), np.array([1.0, 2.0, 4.0])
    s = curves_of(rates)(grid)
    own = 1 / censoring(t, e, ones, t, before=True)[0]
    late = 1 / censoring(t, e, ones, grid, before=False)[0]
    as_tensor = lambda a: torch.tensor(a, dtype=torch.float64)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = score.BrierScore()(
            as_tensor(s),
            torch.tensor(e),
            as_tensor(t),
            as_tensor(grid),
            weight=as_tensor(own),
            weight_new_time=as_tensor(late),
        )
        c = cindex.ConcordanceIndex()(as_tensor(rates), torch.tensor(e), as_tensor(t), weight=as_tensor(own))
    np.testing.assert_allclose(brier(t, e, s, grid, ones)[0], theirs.numpy(), rtol=1e-6)
    assert float(uno(t, e, rates, ones)[0]) == pytest.approx(float(c), rel=1e-6)


def judged(t, e, rates, **options):
    defaults = {"horizon": 6.0, "grid": np.array([1.0, 2.0, 4.0]), "resamples": 60}
    return evaluate_survival(
        t, e, np.arange(len(t)), curves=curves_of(rates), generator=np.random.default_rng(0), **{**defaults, **options}
    )


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 30), events=st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_output_is_strict_json_with_values_inside_their_intervals(seed, n, events):
    t, e, rates = sample(seed, n, events=events)
    out = judged(t, e, rates)
    json.dumps(out, allow_nan=False)
    for name in HEADLINE:
        value, low, high = (out[name][key] for key in ("value", "low", "high"))
        assert (low is None) == (high is None)
        if low is not None:
            assert 0 <= low <= value <= high
    assert out["n"] == n
    assert sum(group["n"] for group in out["calibration"]) == (n if n >= FEWEST else 0)
    assert all(group["n"] >= FEWEST for group in (*out["calibration"], *out["curves"]))
    assert all(at_risk >= FEWEST for at_risk in out["kaplan_meier"]["at_risk"])


def test_a_good_model_is_better_than_a_bad_one_and_its_interval_says_so():
    g = np.random.default_rng(1)
    rates = np.exp(g.normal(size=200, scale=1.5))
    t, c = g.exponential(5 / rates), g.uniform(0, 10, 200)
    curves = lambda at: np.exp(-rates[:, None] / 5 * np.asarray(at))  # noqa: E731
    grid, options = np.linspace(0.5, 6, 12), {"generator": np.random.default_rng(0), "resamples": 200}
    seen = (np.minimum(t, c), t <= c, np.arange(200))
    out = evaluate_survival(*seen, curves=curves, horizon=6.0, grid=grid, **options)
    assert out["harrell"]["low"] > 0.7
    assert out["antolini"]["value"] == pytest.approx(out["harrell"]["value"])  # proportional hazards do not cross
    assert abs(out["uno"]["value"] - out["harrell"]["value"]) < 0.05
    assert out["d_calibration"]["p"] > 0.01
    bad = evaluate_survival(*seen, curves=lambda at: np.full((200, len(at)), 0.5), horizon=6.0, grid=grid, **options)
    assert bad["harrell"] == {"value": 0.5, "low": None, "high": None}
    assert bad["ibs"]["value"] == pytest.approx(0.25, abs=0.02)
    assert out["ibs"]["high"] < bad["ibs"]["value"]
    assert bad["d_calibration"]["p"] < 1e-6
    worst, *_, best = out["calibration"]
    assert worst["observed"] < best["observed"]
    assert all(
        group["low"] is None or group["low"] <= group["observed"] <= group["high"] for group in out["calibration"]
    )


def test_all_censored_one_patient_and_nobody():
    t, e, rates = sample(0, 40, events=0.0)
    out = judged(t, e, rates)
    assert out["harrell"] == out["uno"] == out["antolini"] == out["auc"] == {"value": None, "low": None, "high": None}
    assert set(out["kaplan_meier"]["survival"]) == {1.0}
    assert "No event" in out["notes"][0]
    one = judged(np.array([3.0]), np.array([1]), np.array([1.0]))
    assert one["harrell"]["value"] is None
    assert one["ibs"]["value"] is not None
    assert one["ibs"]["low"] is None
    nobody = judged(np.zeros(0), np.zeros(0), np.zeros(0))
    assert nobody["n"] == nobody["patients"] == 0
    assert nobody["ibs"]["value"] is None
    assert nobody["d_calibration"]["p"] is None
    assert nobody["calibration"] == []


def test_an_event_at_time_zero_counts():
    t, e = np.array([0.0, 1.0, 2.0]), np.array([True, True, False])
    assert harrell(t, e, np.array([3.0, 2.0, 1.0]), np.ones((1, 3))).tolist() == [1.0]
    assert harrell(t, e, np.array([1.0, 2.0, 3.0]), np.ones((1, 3))).tolist() == [0.0]
    assert kaplan_meier(t, e)["survival"] == pytest.approx([2 / 3, 1 / 3])


def test_what_comes_after_the_horizon_is_censored_there():
    """An event after it may not change anything that was before."""
    t, e, rates = sample(2, 30, ties=False)
    later = np.where((t > 4) & e, t + 3, t)
    options = {"horizon": 4.0, "grid": np.array([1.0, 4.0])}
    assert judged(t, e, rates, **options) == judged(later, e, rates, **options)


def test_a_grid_beyond_the_last_follow_up_has_no_brier_score():
    t, e = np.array([1.0, 2.0, 3.0]), np.array([True, True, False])
    s = np.full((3, 2), 0.5)
    found = brier(t, e, s, np.array([2.5, 3.5]), np.ones((1, 3)))[0]
    assert found[0] == pytest.approx(0.25)
    assert np.isnan(found[1])
    assert np.isnan(integrated(found[None], np.array([2.5, 3.5]))[0])
    assert kaplan_meier(t, e, np.array([2.5, 3.5]))["survival"] == [pytest.approx(1 / 3), None]


def test_d_calibration_by_hand():
    """Two bins: .2 and .7 were events; censored at .8 gives (.8 - .5)/.8 to the upper and .5/.8 to the lower bin."""
    found = d_calibration(np.array([0.2, 0.7, 0.8]), np.array([True, True, False]), bins=2)
    assert found["shares"] == pytest.approx([(1 + 0.5 / 0.8) / 3, (1 + 0.3 / 0.8) / 3])
    from scipy import stats

    counts = np.array(found["shares"]) * 3
    assert found["p"] == pytest.approx(stats.chisquare(counts).pvalue)
    zero = d_calibration(np.array([0.0, 1.0]), np.array([False, True]), bins=2)
    assert zero["shares"] == [0.5, 0.5]


def test_equal_predictions_make_one_group():
    found = survival_calibration(np.full(40, 0.4), np.arange(1.0, 41.0), np.ones(40, bool), np.arange(40), 5.0)
    assert len(found) == 1
    assert found[0]["observed"] == pytest.approx(35 / 40)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 90), patients=st.integers(1, 90))
def test_no_curve_that_leaves_a_site_is_about_fewer_than_ten_patients(seed, n, patients):
    t, e, rates = sample(seed, n)
    whose = np.random.default_rng(seed).integers(0, patients, n)
    at = np.linspace(0.5, 8.0, 16)
    predicted = curves_of(rates)(at)
    found = grouped_curves(predicted, t, e, whose, at)
    rank, counted = predicted.mean(1), 0
    for group in found:  # the highest risk first: the next n by rank
        inside = np.argsort(rank, kind="stable")[counted : counted + group["n"]]
        counted += group["n"]
        assert group["patients"] == len(set(whose[inside])) >= FEWEST
        assert 1 <= len(group["times"]) <= POINTS
        assert all(len(set(whose[inside][t[inside] >= when])) >= FEWEST for when in group["times"])
        seen = kaplan_meier(t[inside], e[inside], np.array(group["times"]))
        assert group["observed"] == seen["survival"]
        assert group["low"] == seen["low"]
        assert group["predicted"] == pytest.approx(predicted[inside][:, np.isin(at, group["times"])].mean(0))
    assert counted in (0, n)
    counted = 0
    for group in survival_calibration(predicted[:, -1], t, e, whose, 8.0):  # the worst first, too
        inside = np.argsort(predicted[:, -1], kind="stable")[counted : counted + group["n"]]
        counted += group["n"]
        assert len(set(whose[inside])) >= FEWEST
    if len(set(whose[t >= at[0]])) >= FEWEST:
        assert found, "a whole site of enough patients is one group"


def test_few_times_are_spread_over_those_with_enough_patients():
    t = np.repeat([2.0, 6.0, 9.0], 10)
    at, everybody = np.arange(1.0, 11.0), np.arange(30)
    assert few_times(at, t, everybody).tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert few_times(at, t, everybody // 2).tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]
    assert few_times(at, t, everybody // 10).tolist() == []


def test_patients_are_drawn_and_not_their_records():
    """Ten records of each patient make no interval narrower."""
    t, e, rates = sample(4, 25, ties=False)
    ten = [np.repeat(a, 10) for a in (t, e, rates)]
    options = {"horizon": 6.0, "grid": np.array([2.0]), "resamples": 300}
    many = evaluate_survival(
        ten[0],
        ten[1],
        np.repeat(np.arange(25), 10),
        curves=curves_of(ten[2]),
        generator=np.random.default_rng(0),
        **options,
    )
    single = judged(t, e, rates, **options)
    widths = [out["uno"]["high"] - out["uno"]["low"] for out in (many, single)]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def test_hostile_input_is_refused():
    t, e, rates = sample(0, 8)
    bad = [
        (t - 9, e, rates, {}),
        (np.where(t > 3, np.nan, t), e, rates, {}),
        (t, e * 2, rates, {}),
        (t, e[:-1], rates, {}),
        (t, e, rates[:-1], {}),
        (t, e, rates, {"horizon": 0.0}),
        (t, e, rates, {"grid": np.array([])}),
        (t, e, rates, {"grid": np.array([2.0, 1.0])}),
        (t, e, rates, {"grid": np.array([7.0])}),
        (t, e, rates, {"risk": np.full(8, np.nan)}),
    ]
    for times, events, predicted, options in bad:
        with pytest.raises(DataError) as raised:
            judged(times, events, predicted, **options)
        assert raised.value.code == "metric-input"


@pytest.mark.slow
def test_a_thousand_patients_and_resamples_take_seconds():
    import time

    t, e, rates = sample(0, 1000, ties=False, events=0.3)
    started = time.perf_counter()
    judged(t, e, rates, resamples=1000, grid=np.linspace(0.5, 6, 30))
    seconds = time.perf_counter() - started
    print(f"1,000 patients, 1,000 resamples: {seconds:.1f} s")
    assert seconds < 300
