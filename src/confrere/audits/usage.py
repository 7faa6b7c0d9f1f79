"""Was this set of patients used? The share of a set that trained a model, estimated from a membership attack."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confrere.audits import statistics
from confrere.audits.audit import LEVEL, Audit, Choice, Interval, Row, register
from confrere.audits.membership import NO_POWER, lira_score, on_references, sides
from confrere.audits.references import Evidence, evidence
from confrere.audits.tapped import MODELS, AuditedRun
from confrere.seeds import numpy_generator

Floats = NDArray[np.float64]
RESAMPLES = 1000
MEANS = (
    "The share of a site's training patients that the attack holds to be used: 1 is all of them. It is an estimate, of "
    "reference models trained on half of the patients: it may leave 0 to 1, and is biased where the run trained on "
    "many more than they did."
)


def usage(
    seen: Sequence[Evidence], seed: int, resamples: int = RESAMPLES
) -> tuple[Interval, Interval, tuple[int, int]]:
    """Return the share used of the members, that of the others, and how many members and others there are.

    DUCI: the mean over a set of ``(m - FPR) / (TPR - FPR)``, where ``m`` says whether a patient's LiRA score is above a
    threshold, and TPR and FPR are those of references whose members are known. Run and references are scored by equally
    many references; the rates of each are by the threshold that the rest of them choose. Intervals: percentiles over
    resampled patients and references. Where ``TPR - FPR`` of references may be zero, shares are undefined.
    """
    known, pairs = on_references(lira_score, seen, known=True), len(seen[0].trained) // 2
    found = [sides(lira_score, [one.without(pair) for one in seen]) for pair in range(pairs)]
    threshold, counts = _threshold(known), []
    for r, one in enumerate(known):
        counts.append(_counts(one, _threshold([other for k, other in enumerate(known) if k != r])))
    marks = [np.mean([one[s] > threshold for one in found], axis=0) for s in (0, 1)]
    sizes = len(marks[0]), len(marks[1])
    powers = [statistics.difference(*count).low for count in counts]
    if np.mean([-1.0 if low is None else low for low in powers]) <= 0 or not all(sizes):
        return Interval(), Interval(), sizes
    rates = np.array([[true / m, false / n] for true, m, false, n in counts])  # (R, 2)
    rng = numpy_generator(seed, "audit", "usage", seen[0].model, *(one.site for one in seen))
    drawn = rates[rng.integers(len(rates), size=(resamples, len(rates)))].mean(1)  # (B, 2)
    shares = []
    for mark in marks:
        means = mark[rng.integers(len(mark), size=(resamples, len(mark)))].mean(1)
        spread = np.quantile(_share(means, drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        shares.append(Interval(float(_share(mark.mean(), rates.mean(0))), *map(float, spread)))
    return shares[0], shares[1], sizes


def _share(marked: Floats, rates: Floats) -> Floats:
    """Return ``(m - FPR) / (TPR - FPR)`` of marked shares and of rates (..., 2)."""
    true, false = rates[..., 0], rates[..., 1]
    return np.asarray((marked - false) / np.maximum(true - false, 1e-6), dtype=np.float64)


def _threshold(known: Sequence[tuple[Floats, Floats]]) -> float:
    return statistics.best_threshold(*(np.concatenate([one[side] for one in known]) for side in (0, 1)))


def _counts(known: tuple[Floats, Floats], threshold: float) -> tuple[int, int, int, int]:
    inside, outside = known
    return int((inside > threshold).sum()), len(inside), int((outside > threshold).sum()), len(outside)


@register(
    "usage",
    title="Use of a set of patients",
    question="Can a hospital's patients, as a set, be told to have been used for training?",
)
def usage_audit(run: AuditedRun, choice: Choice) -> Audit:
    """Return the estimated share used of every site's training patients, beside that of its test patients."""
    started, everything = time.perf_counter(), evidence(run, choice)
    rows: list[Row] = []
    powerless: list[str] = []
    for model in MODELS:
        of_model = [one for one in everything if one.model == model]
        sets = {"all": of_model, **{one.site: [one] for one in of_model}} if of_model else {}
        for subject, seen in sets.items():
            used, unused, sizes = usage(seen, choice.seed)
            row = Row(
                subject=subject,
                model=model,
                measure="share used",
                strength=used,
                control=unused,
                n=f"{sizes[0]} members, {sizes[1]} others",
                main=subject == "all",
            )
            rows.append(row)
            if subject == "all" and used.value is None:
                powerless.append(model)
    return Audit(
        name="usage",
        rows=tuple(rows),
        means=MEANS,
        control="The same estimate for the site's test patients, of whom none was used.",
        limits=("It says nothing of a single patient.", "Who is asked about must come from the site's own population."),
        warnings=(NO_POWER.format(models=", ".join(powerless)),) if powerless else (),
        settings={"references": choice.references, "resamples": RESAMPLES, "seed": choice.seed},
        costs={"models trained": choice.references, "seconds": round(time.perf_counter() - started, 1)},
    )
