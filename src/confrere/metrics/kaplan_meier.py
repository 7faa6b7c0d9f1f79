"""Kaplan-Meier curves, of events and of censoring, for a sample and for all its resamples at once.

Shapes: N records, R resamples (rows of weights: how often each record's patient was drawn), T times. Where an event and
a censoring share a time, the event comes first.

Ours and not a library's: lifelines and torchsurv take one sample at a time, and a thousand resamples need a thousand
curves. Both serve as the truth in tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtri

from confrere.metrics.bootstrap import LEVEL, Floats, Ints, ratio

Bools = NDArray[np.bool_]
FEWEST = 10
"""Patients that a group, and those still at risk at a time, have at least where a curve leaves its site."""
POINTS = 5
"""Times at most at which such a curve is looked at: between two of them nobody's own time shows."""


def kaplan_meier(times_N: Floats, events_N: Bools, at_T: Floats | None = None) -> dict[str, list[float | None]]:
    """Return the survival curve with pointwise 95 % log-log Greenwood intervals, ready for JSON.

    Args:
        times_N: of event or censoring, >= 0.
        events_N: whether the event was seen.
        at_T: where to look at the curve, rising; default: every time of an event.

    Returns:
        ``times``, ``survival``, ``low``, ``high``, ``at_risk``, ``events`` (until and with each time since the one
        before). None: no interval where survival is 1 or 0, nor a value after the last patient was censored.

    References:
        Kaplan and Meier, JASA 53 (1958). Greenwood (1926); Kalbfleisch and Prentice, "The Statistical Analysis of
        Failure Time Data" (1980), for the log-log scale.
    """
    times, events = np.asarray(times_N, dtype=np.float64), np.asarray(events_N, dtype=bool)
    at = np.unique(times[events]) if at_T is None else np.asarray(at_T, dtype=np.float64)
    when, deaths, at_risk = (a[0] if a.ndim == 2 else a for a in _counts(times, events, np.ones((1, len(times)))))
    survival = np.cumprod(1 - deaths / np.maximum(at_risk, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(deaths / (at_risk * (at_risk - deaths)))
        reach = -ndtri((1 - LEVEL) / 2) * np.sqrt(greenwood) / np.abs(np.log(survival))
        low, high = survival ** np.exp(reach), survival ** np.exp(-reach)
    low[(survival <= 0) | (survival >= 1)] = high[(survival <= 0) | (survival >= 1)] = np.nan
    last = times.max(initial=0.0)
    known = (at <= last) | (survival[-1:].sum() == 0 if len(survival) else False)
    index = np.searchsorted(when, at, side="right")

    def looked(values: Floats, before: float) -> list[float | None]:
        found = np.where(known, np.concatenate([[before], values])[index], np.nan)
        return [None if np.isnan(value) else float(value) for value in found]

    so_far = np.concatenate([[0.0], np.cumsum(deaths)])[index]
    return {
        "times": at.tolist(),
        "survival": looked(survival, 1.0),
        "low": looked(low, np.nan),
        "high": looked(high, np.nan),
        "at_risk": [float((times >= t).sum()) for t in at],
        "events": np.diff(so_far, prepend=0.0).tolist(),
    }


def _counts(times_N: Floats, happened_N: Bools, weights_RN: Floats) -> tuple[Floats, Floats, Floats]:
    """Return times (U,) rising, and by resample and time the weight of what happened and of who is at risk (R, U)."""
    when, place = np.unique(times_N, return_inverse=True)
    if not len(when):
        return when, np.zeros((len(weights_RN), 0)), np.zeros((len(weights_RN), 0))
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(when)))
    happened = np.add.reduceat(weights_RN[:, order] * happened_N[order], starts, axis=1)
    leaving = np.add.reduceat(weights_RN[:, order], starts, axis=1)
    return when, happened, np.cumsum(leaving[:, ::-1], axis=1)[:, ::-1]


def censoring(times_N: Floats, events_N: Bools, weights_RN: Floats, at_T: Floats, *, before: bool) -> Floats:
    """Return the chance (R, T) to be uncensored at each time, or just ``before`` it, by Kaplan-Meier of each resample.

    Events leave before those who are censored at the same time.
    """
    when, gone, at_risk = _counts(times_N, ~events_N, weights_RN)
    events = _counts(times_N, events_N, weights_RN)[1]
    left = at_risk - events
    steps = 1 - np.divide(gone, left, out=np.zeros_like(gone), where=left > 0)
    curve = np.concatenate([np.ones((len(weights_RN), 1)), np.cumprod(steps, axis=1)], axis=1)
    return np.asarray(curve[:, np.searchsorted(when, at_T, side="left" if before else "right")])


def survival_calibration(
    predicted_N: Floats, times_N: Floats, events_N: Bools, patient_N: Ints, horizon: float
) -> list[dict[str, Any]]:
    """Return predicted and observed survival at a horizon by up to five groups of the prediction, the worst first.

    Each group says ``n``, ``predicted`` (mean), ``observed`` (Kaplan-Meier) with ``low`` and ``high``; None where all
    of a group were censored before. See :func:`risk_groups` for how many there are.
    """
    found = []
    for inside in risk_groups(predicted_N, patient_N, 5):
        curve = kaplan_meier(times_N[inside], events_N[inside], np.array([horizon]))
        observed = {key: curve[name][0] for key, name in (("observed", "survival"), ("low", "low"), ("high", "high"))}
        found.append({"n": int(inside.sum()), "predicted": float(predicted_N[inside].mean()), **observed})
    return found


def risk_groups(predicted_N: Floats, patient_N: Ints, most: int) -> list[Bools]:
    """Return the records (N,) of up to ``most`` groups of rising prediction, each of ``FEWEST`` patients or more.

    Equal predictions stay together. Fewer patients make fewer groups, down to none.
    """
    for groups in range(min(most, len(predicted_N) // FEWEST), 0, -1):
        edges = np.quantile(predicted_N, np.arange(1, groups) / groups)
        place = np.searchsorted(np.unique(edges), predicted_N, side="left")
        parts = [place == group for group in np.unique(place)]
        if all(len(np.unique(patient_N[part])) >= FEWEST for part in parts):
            return parts
    return []


def few_times(at_T: Floats, times_N: Floats, patient_N: Ints) -> Floats:
    """Return up to ``POINTS`` of the times, evenly chosen from those when ``FEWEST`` patients or more are at risk."""
    known = [float(at) for at in at_T if len(np.unique(patient_N[times_N >= at])) >= FEWEST]
    spread = np.linspace(0, len(known) - 1, min(POINTS, len(known))).round().astype(np.int64)
    return np.array([known[place] for place in np.unique(spread)], dtype=np.float64)


def grouped_curves(
    predicted_NT: Floats, times_N: Floats, events_N: Bools, patient_N: Ints, at_T: Floats
) -> list[dict[str, Any]]:
    """Return predicted and observed survival over time of up to three groups of risk, the highest risk first.

    Args:
        predicted_NT: survival at each time; their mean over time makes the groups, see :func:`risk_groups`.
        times_N: of event or censoring.
        events_N: whether the event was seen.
        patient_N: whose record it is.
        at_T: rising.

    Returns:
        by group ``n``, ``patients``, and at :func:`few_times` of the group ``times``, ``predicted`` (mean),
        ``observed`` (Kaplan-Meier), ``low``, ``high``. There are as many groups as all have such a time.
    """
    rank = predicted_NT.mean(1)
    for most in (3, 2, 1):
        parts = risk_groups(rank, patient_N, most)
        times = [few_times(at_T, times_N[inside], patient_N[inside]) for inside in parts]
        if all(len(shown) for shown in times):
            break
    else:
        return []
    found = []
    for inside, shown in zip(parts, times, strict=True):
        curve = kaplan_meier(times_N[inside], events_N[inside], shown)
        mean = predicted_NT[inside][:, np.searchsorted(at_T, shown)].mean(0)
        group = {"n": int(inside.sum()), "patients": len(np.unique(patient_N[inside])), "times": shown.tolist()}
        seen = {"observed": curve["survival"], "low": curve["low"], "high": curve["high"]}
        found.append({**group, "predicted": mean.tolist(), **seen})
    return found


def d_calibration(at_own_time_N: Floats, events_N: Bools, bins: int = 10) -> dict[str, Any]:
    """Return whether predicted survival at everyone's own time is uniform, as it is for a calibrated model.

    Args:
        at_own_time_N: predicted S_i(t_i). Somebody censored at s counts for all bins below s, in proportion.
        events_N: whether the event was seen.
        bins: of equal width.

    Returns:
        ``shares`` of the bins from 0 up, ``statistic`` (chi-squared with bins - 1 degrees of freedom) and ``p``; a
        small p says that the model is not calibrated. None without patients. The test is rough
        where N / bins is below 5.

    References:
        Haider et al., "Effective Ways to Build and Evaluate Individual Survival Distributions", JMLR 21 (2020), 3.5.
    """
    s, N = np.asarray(at_own_time_N, dtype=np.float64), len(at_own_time_N)
    if not N:
        return {"shares": None, "statistic": None, "p": None}
    place = np.clip(np.ceil(s * bins).astype(int) - 1, 0, bins - 1)  # bins are closed above
    seen = np.bincount(place[events_N], minlength=bins).astype(np.float64)
    low = np.arange(bins) / bins
    out = s[~events_N, None]
    overlap = np.clip(out - low, 0, 1 / bins)
    shares = np.where(out > 0, ratio(overlap, out), np.arange(bins) == 0)
    counts = seen + shares.sum(0)
    statistic = float(((counts - N / bins) ** 2).sum() / (N / bins))
    return {"shares": (counts / N).tolist(), "statistic": statistic, "p": float(chdtrc(bins - 1, statistic))}
