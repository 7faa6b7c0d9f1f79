"""The calibrated audit (EMA) as "Audit to Forget" uses it: a historical baseline, which does not measure membership."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr
from torch import Tensor

from confrere.audits import statistics
from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.references import by_patient, rows_of
from confrere.audits.tapped import MODELS, AuditedRun
from confrere.data.splits import TEST, TRAIN, VAL
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
WARNING = (
    "A historical baseline. Its p-value depends on nothing but how many images have none of three signs of membership "
    "(four are p < 0.05 for any number), and so on how well a model fits, not on what it was trained on. Do not decide "
    "by it whether data were used; see rmia, lira and usage."
)


def signs(logits: Tensor, labels: Whole) -> tuple[Floats, Whole]:
    """Return (N, 3) correctness, confidence in the right class and negative entropy, and the predicted class (N,)."""
    chances = logits.double().log_softmax(1)
    predicted = chances.argmax(1).numpy()
    right = chances.gather(1, torch.from_numpy(labels)[:, None])[:, 0].exp().numpy()
    entropy = (chances.exp() * chances).sum(1).numpy()
    return np.stack([(predicted == labels).astype(np.float64), right, entropy], 1), predicted


def threshold(inside: Floats, outside: Floats) -> float:
    """Return the value ``v`` with the largest ``(P(in >= v) + P(out < v)) / 2`` of those observed; infinity of none."""
    values = np.unique(np.concatenate([inside, outside]))
    if not len(values):
        return float("inf")
    above = 1 - np.searchsorted(np.sort(inside), values, "left") / max(1, len(inside))
    below = np.searchsorted(np.sort(outside), values, "left") / max(1, len(outside))
    return float(values[int((above + below).argmax())])


def bits(query: tuple[Floats, Whole], inside: tuple[Floats, Whole], outside: tuple[Floats, Whole]) -> Floats:
    """Return how many of three signs of membership (N,) each image of a query has, by its predicted class.

    All three arguments are what :func:`signs` returns: of the query, of known members, and of known others.
    """
    found, predicted = query
    total = found[:, 0].copy()
    for k in np.unique(predicted):
        here = predicted == k
        for sign in (1, 2):
            total[here] += found[here, sign] >= threshold(
                inside[0][inside[1] == k, sign], outside[0][outside[1] == k, sign]
            )
    return total


def p_used(count: Floats) -> float:
    """Return the two-sided p of an equal-variance t-test of "has a sign" against as many ones; 1 if all have one.

    With ``m`` misses among ``n``, ``t = sqrt(m (n - 1) / (n - m))``: only ``m`` counts. Small means "not used".
    """
    n, misses = len(count), int((count < 1).sum())
    if misses in (0, n):
        return 1.0 if misses == 0 else 0.0
    return float(2 * stdtr(2 * n - 2, -math.sqrt(misses * (n - 1) / (n - misses))))


@register(
    "historical",
    title="Calibrated audit (historical baseline)",
    question="Does the audit of “Audit to Forget” (EMA) call used data used?",
)
def historical(run: AuditedRun, choice: Choice) -> Audit:
    """Return the calibrated audit with the best calibration there is: known members, and validation patients.

    Differences from the sources: both calibration sets are what their names say, where the released configurations
    calibrate on two sets of others; a class without calibration images gives no sign.
    """
    started, rows, said = time.perf_counter(), list[Row](), dict[str, list[float]]()
    for model in MODELS:
        sites: list[tuple[Floats, Floats]] = []
        for site in run.sites:
            counted = _counts(run, site, model, choice)
            if counted is None:
                continue
            used, unused, p = counted
            said[f"{model}, {site}"] = [p[0], p[1]]
            sites.append((used, unused))
            rows.append(_row(site, model, [(used, unused)], choice))
        if sites:
            rows.append(_row("all", model, sites, choice))
    if not rows:
        what, fix = "every site has too few patients, validation or test images", "audit a run with more patients"
        raise ConfigError(what, where="historical", fix=fix, code="audit")
    wrong = [sum(p[side] < 0.05 for p in said.values()) for side in (0, 1)]
    verdicts = (
        f"At p < 0.05 it calls data not used in {wrong[0]} of {len(said)} cases where they were used, and in "
        f"{wrong[1]} of {len(said)} where they were not."
    )
    return Audit(
        name="historical",
        rows=tuple(rows),
        means="TPR - FPR of its rule for single images, two of three signs; 0 is guessing.",
        control="The same rule between two halves of the others.",
        limits=("It does not measure membership.",),
        warnings=(WARNING, verdicts),
        settings={"p (used, not used)": said, "seed": choice.seed},
        costs={"models trained": 0, "seconds": round(time.perf_counter() - started, 1)},
    )


def _counts(
    run: AuditedRun, site: str, model: str, choice: Choice
) -> tuple[Floats, Floats, tuple[float, float]] | None:
    """Return the signs of used and of unused patients (mean of each one's images), and p of both sets.

    None where there is no such model, or where too few patients calibrate or are asked about.
    """
    data = run.data[site]
    train, val, test = (rows_of(run, site, split, choice) for split in (TRAIN, VAL, TEST))
    patients = np.unique(data.groups[train])
    if len(patients) < 2 or not len(val) or not len(test):
        return None
    rng = numpy_generator(choice.seed, "audit", "historical", site)
    known = np.isin(data.groups[train], rng.permutation(patients)[: len(patients) // 2])
    parts = []
    for rows in (train[known], val, train[~known], test):
        logits = run.logits(site, model, rows)
        if logits is None:
            return None
        parts.append(signs(logits, data.labels[rows]))
    used, unused = (bits(parts[i], parts[0], parts[1]) for i in (2, 3))
    marks = np.arange(len(used) + len(unused)) < len(used)
    groups = np.concatenate([data.groups[train[~known]], data.groups[test]])
    members, others = by_patient(np.concatenate([used, unused]), groups, marks)
    return members, others, (p_used(used), p_used(unused))


def _row(subject: str, model: str, found: list[tuple[Floats, Floats]], choice: Choice) -> Row:
    used, unused = (np.concatenate([one[side] for one in found]) for side in (0, 1))
    half = numpy_generator(choice.seed, "audit", "historical", subject, model).permutation(len(unused)) % 2 == 0
    return Row(
        subject=subject,
        model=model,
        measure="TPR - FPR",
        strength=_gap(used, unused),
        control=_gap(unused[half], unused[~half]),
        n=f"{len(used)} members, {len(unused)} others",
        main=subject == "all",
    )


def _gap(first: Floats, second: Floats) -> Interval:
    if not len(first) or not len(second):
        return Interval()
    return statistics.difference(int((first >= 2).sum()), len(first), int((second >= 2).sum()), len(second))
