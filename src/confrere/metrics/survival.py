"""Metrics of survival models with 95 % intervals over patients.

Shapes: N records, P patients, R resamples (row 0 of a weight matrix is the sample itself), T times.

A pair is comparable when one had the event and the other is known to have lived longer: a later time, or the same one
and censored. Equal predictions count half. Weights against censoring (IPCW) are one over the Kaplan-Meier estimate of
being uncensored just before an event, or at the time that is judged, made of the same sample and anew in each resample;
they hold if censoring does not depend on the patient.

Ours and not a library's: lifelines and torchsurv judge one sample at a time and do not resample patients; here a
thousand resamples share one matrix product. Both, and slow loops, are the truth in tests.

References:
    Harrell et al., JAMA 247 (1982). Antolini et al., Statistics in Medicine 24 (2005). Uno et al., Statistics in
    Medicine 30 (2011), 1105 (C). Graf et al., Statistics in Medicine 18 (1999) (Brier). Uno et al., JASA 102 (2007);
    Hung and Chiang, Canadian J. Statistics 38 (2010) (cumulative/dynamic AUC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from confrere.errors import DataError
from confrere.metrics.bootstrap import (
    ENOUGH_PATIENTS,
    Floats,
    Ints,
    draw,
    effective_patients,
    mean_defined,
    per_patient,
    percentile,
    ratio,
)
from confrere.metrics.kaplan_meier import (
    Bools,
    censoring,
    d_calibration,
    few_times,
    grouped_curves,
    kaplan_meier,
    survival_calibration,
)

BLOCK = 256  # rows of a matrix of pairs that exist at a time
HEADLINE = ("harrell", "antolini", "uno", "ibs", "auc")
Curves = Callable[[Floats], Floats]


def evaluate_survival(
    times: Floats,
    events: Ints | Bools,
    groups: Ints,
    *,
    curves: Curves,
    horizon: float,
    grid: Floats,
    generator: np.random.Generator,
    risk: Floats | None = None,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return every metric with its 95 % interval from resampled patients, ready for JSON.

    Args:
        times: (N,) of event or censoring, >= 0; what comes after the horizon does not count. N may be 0.
        events: (N,) 1 or 0.
        groups: (N,) patient of each record.
        curves: predicted survival (N, T) in 0..1 at any T times in 0..horizon.
        horizon: > 0, public; the last time that is judged.
        grid: (T,) rising times in (0, horizon], where Brier score and AUC are looked at.
        generator: source of the resamples.
        risk: (N,) the higher, the sooner the event; default: minus the mean of the curves over the grid.
        resamples: R.

    Returns:
        ``n``, ``patients``, ``events``; ``harrell``, ``antolini``, ``uno`` (concordances), ``auc`` (mean over the
        grid), ``ibs``, each ``{"value", "low", "high"}`` in 0..1 with None for what is undefined; at few times of the
        grid ``by_time`` (``times``, ``brier``, ``auc``), ``kaplan_meier`` and, by risk, ``curves``; ``calibration`` at
        the horizon, ``d_calibration``; ``notes``. A time or a group of fewer than ``FEWEST`` patients is left out.

    Raises:
        DataError: shapes, times, events, predictions or grid are wrong.
    """
    t, e, g, at = _checked(times, events, groups, horizon, grid)
    inside, cut = e & (t <= horizon), np.minimum(t, horizon)
    patient_N = np.unique(g, return_inverse=True)[1].astype(np.int64)
    P = int(patient_N.max(initial=-1)) + 1
    weights_RN = draw(P, generator, resamples)[:, patient_N]
    grid_NT = _predicted(curves, at, len(t))
    score = -grid_NT.mean(1) if risk is None else np.asarray(risk, dtype=np.float64)
    if score.shape != t.shape or not np.isfinite(score).all():
        raise _refused(f"risks of shape {score.shape}", "give one finite risk for each record")
    brier_RT, auc_RT = _by_time(t, e, grid_NT, at, weights_RN)
    samples = {
        "harrell": harrell(cut, inside, score, weights_RN),
        "antolini": antolini(cut, inside, curves, weights_RN),
        "uno": uno(cut, inside, score, weights_RN),
        "ibs": integrated(brier_RT, at),
        "auc": mean_defined(auc_RT),
    }
    effective = effective_patients(per_patient(patient_N, inside.astype(np.int64), (P, 2)))
    out: dict[str, Any] = {"n": len(t), "patients": P, "events": int(inside.sum())}
    out |= {name: percentile(s[0], s[1:], P, effective=max(effective, 2.0)) for name, s in samples.items()}
    out["d_calibration"] = d_calibration(_at_own_time(curves, cut), inside)
    out |= _where_enough(t, e, patient_N, grid_NT, at, (brier_RT[0], auc_RT[0]))
    out["notes"] = _notes(out)
    return out


def _where_enough(
    t: Floats, e: Bools, patient_N: Ints, grid_NT: Floats, at: Floats, scores: tuple[Floats, Floats]
) -> dict[str, Any]:
    """Return what would show single patients, at few times and of groups of enough patients only."""
    shown = few_times(at, t, patient_N)
    brier_T, auc_T = (values[np.searchsorted(at, shown)] for values in scores)
    return {
        "by_time": {"times": shown.tolist(), "brier": _plain(brier_T), "auc": _plain(auc_T)},
        "curves": grouped_curves(grid_NT, t, e, patient_N, at),
        "calibration": survival_calibration(grid_NT[:, -1], t, e, patient_N, float(at[-1])),
        "kaplan_meier": kaplan_meier(t, e, shown),
    }


def _by_time(t: Floats, e: Bools, grid_NT: Floats, at: Floats, weights_RN: Floats) -> tuple[Floats, Floats]:
    """Return Brier scores and AUC (R, T) at each time of the grid."""
    auc = [auc_at(t, e, -grid_NT[:, i], float(s), weights_RN) for i, s in enumerate(at)]
    return brier(t, e, grid_NT, at, weights_RN), np.stack(auc, axis=1)


def harrell(times_N: Floats, events_N: Bools, risk_N: Floats, weights_RN: Floats) -> Floats:
    """Return Harrell's C (R,) of a risk that does not change with time, NaN without comparable pairs."""
    return _concordance(times_N, events_N, weights_RN, weights_RN, lambda rows: _against(risk_N[rows], risk_N))


def uno(times_N: Floats, events_N: Bools, risk_N: Floats, weights_RN: Floats, *, truncation: float = np.inf) -> Floats:
    """Return Uno's C (R,): pairs weighed by the inverse square of the chance to be uncensored before the first event.

    Args:
        times_N: of event or censoring.
        events_N: whether the event was seen.
        risk_N: the higher, the sooner.
        weights_RN: of resamples.
        truncation: pairs whose first event is not before this time are left out.
    """
    free = censoring(times_N, events_N, weights_RN, times_N, before=True)
    first_RN = np.where(weights_RN > 0, ratio(weights_RN, free**2), 0.0)
    usable = events_N & (times_N < truncation)
    return _concordance(times_N, usable, first_RN, weights_RN, lambda rows: _against(risk_N[rows], risk_N), events_N)


def antolini(times_N: Floats, events_N: Bools, curves: Curves, weights_RN: Floats) -> Floats:
    """Return Antolini's time-dependent concordance (R,): at i's event, i's curve is below j's, who lives longer."""

    def better(rows: Ints) -> Floats:
        at, place = np.unique(times_N[rows], return_inverse=True)
        there_bN = _predicted(curves, at, len(times_N)).T[place]
        return _against(there_bN, there_bN[np.arange(len(rows)), rows][:, None], columns=True)

    return _concordance(times_N, events_N, weights_RN, weights_RN, better)


def _against(first: Floats, others: Floats, *, columns: bool = False) -> Floats:
    """Return (b, N) whether the first of a pair is ``above`` the other: 1, or a half when they are equal."""
    above, below = (first, others) if columns else (first[:, None], others)
    return np.asarray((above > below) + 0.5 * (above == below))


def _concordance(
    times_N: Floats,
    first_N: Bools,
    first_RN: Floats,
    weights_RN: Floats,
    better: Callable[[Ints], Floats],
    events_N: Bools | None = None,
) -> Floats:
    """Return the weighted share of comparable pairs in the right order, a block of first events at a time."""
    happened = first_N if events_N is None else events_N
    right, all_ = np.zeros(len(weights_RN)), np.zeros(len(weights_RN))
    events = np.flatnonzero(first_N)
    for rows in (events[i : i + BLOCK] for i in range(0, len(events), BLOCK)):
        longer_bN = (times_N > times_N[rows, None]) | ((times_N == times_N[rows, None]) & ~happened)
        pairs_RbN = weights_RN @ np.concatenate([longer_bN, longer_bN * better(rows)]).T
        all_ += (first_RN[:, rows] * pairs_RbN[:, : len(rows)]).sum(1)
        right += (first_RN[:, rows] * pairs_RbN[:, len(rows) :]).sum(1)
    return ratio(right, all_)


def brier(times_N: Floats, events_N: Bools, survival_NT: Floats, at_T: Floats, weights_RN: Floats) -> Floats:
    """Return the Brier score (R, T) weighed against censoring, 0..1 but for chance; NaN where none is followed.

    ``S^2 / G(t_i-)`` of who had the event by t, ``(1 - S)^2 / G(t)`` of who is still followed, over the sample's size.
    """
    free_RN = censoring(times_N, events_N, weights_RN, times_N, before=True)
    had_RN = np.where(weights_RN > 0, ratio(weights_RN, free_RN), 0.0) * events_N
    gone_NT = times_N[:, None] <= at_T
    early = had_RN @ (gone_NT * survival_NT**2)
    free_RT = censoring(times_N, events_N, weights_RN, at_T, before=False)
    late = ratio(weights_RN @ (~gone_NT * (1 - survival_NT) ** 2), free_RT)
    return ratio(early + late, weights_RN.sum(1, keepdims=True))


def integrated(brier_RT: Floats, at_T: Floats) -> Floats:
    """Return the mean over time (R,) by the trapezoid rule from the first to the last time of the grid."""
    if len(at_T) == 1:
        return np.asarray(brier_RT[:, 0])
    middle = (brier_RT[:, 1:] + brier_RT[:, :-1]) / 2
    return np.asarray((middle * np.diff(at_T)).sum(1) / (at_T[-1] - at_T[0]))


def auc_at(times_N: Floats, events_N: Bools, risk_N: Floats, at: float, weights_RN: Floats) -> Floats:
    """Return the AUC (R,) of who had the event by a time against who had it not, weighed against censoring."""
    cases, controls = np.flatnonzero(events_N & (times_N <= at)), np.flatnonzero(times_N > at)
    controls = controls[np.argsort(risk_N[controls], kind="stable")]
    free = censoring(times_N, events_N, weights_RN, times_N[cases], before=True)
    cases_RC = np.where(weights_RN[:, cases] > 0, ratio(weights_RN[:, cases], free), 0.0)
    below = np.zeros((len(weights_RN), len(controls) + 1))
    np.cumsum(weights_RN[:, controls], axis=1, out=below[:, 1:])
    less = below[:, np.searchsorted(risk_N[controls], risk_N[cases], side="left")]
    less_or_equal = below[:, np.searchsorted(risk_N[controls], risk_N[cases], side="right")]
    return ratio((cases_RC * (less + less_or_equal)).sum(1) / 2, cases_RC.sum(1) * below[:, -1])


def _at_own_time(curves: Curves, times_N: Floats) -> Floats:
    own = np.zeros(len(times_N))
    for start in range(0, len(times_N), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(times_N)))
        own[rows] = _predicted(curves, times_N[rows], len(times_N))[rows, np.arange(len(rows))]
    return own


def _predicted(curves: Curves, at_T: Floats, records: int) -> Floats:
    found = np.asarray(curves(at_T), dtype=np.float64)
    if found.shape != (records, len(at_T)) or not ((found >= -1e-9) & (found <= 1 + 1e-9)).all():
        what = f"predicted survival of shape {found.shape} for {records} records and {len(at_T)} times"
        raise _refused(what, "give (N, T) in 0..1, without NaN")
    return np.clip(found, 0.0, 1.0)


def _checked(
    times: Floats, events: Ints | Bools, groups: Ints, horizon: float, grid: Floats
) -> tuple[Floats, Bools, Ints, Floats]:
    t, at = np.asarray(times, dtype=np.float64), np.asarray(grid, dtype=np.float64)
    e, g = np.asarray(events), np.asarray(groups)
    if t.ndim != 1 or e.shape != t.shape or g.shape != t.shape:
        raise _refused(f"times {t.shape}, events {e.shape} and groups {g.shape}", "give one of each for every record")
    if not (np.isfinite(t) & (t >= 0)).all() or not np.isin(e, (0, 1)).all():
        raise _refused("times or events of a survival evaluation", "times are finite and >= 0, events 1 or 0")
    if not (0 < horizon < np.inf and at.ndim == 1 and len(at) and at[0] > 0 and at[-1] <= horizon):
        raise _refused(f"a grid of shape {at.shape} up to a horizon", "give times in (0, horizon]")
    if not (np.diff(at) > 0).all():
        raise _refused("a grid that does not rise", "sort its times")
    return t, e.astype(bool), g, at


def _refused(what: str, fix: str) -> DataError:
    return DataError(f"cannot judge {what}", where="survival metrics", fix=fix, code="metric-input")


def _plain(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _notes(out: dict[str, Any]) -> list[str]:
    """Return why something is missing or to be read with caution."""
    notes = []
    if not out["events"]:
        notes.append("No event was seen before the horizon: there is no pair to compare.")
    elif out["events"] < 10:
        notes.append(f"Only {out['events']} events before the horizon: concordances are little more than anecdotes.")
    if out["n"] and out["ibs"]["value"] is None:
        notes.append("No patient is followed up to the end of the grid: shorten it to judge the Brier score.")
    if 0 < out["patients"] < ENOUGH_PATIENTS:
        notes.append(f"Fewer than {ENOUGH_PATIENTS} patients allow no interval.")
    return notes
