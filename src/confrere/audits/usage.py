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
    "reference models trained on half of the patients: it may leave 0 to 1, and is biased where patients weigh less "
    "in the run, which trained on more."
)


def usage(
    seen: Sequence[Evidence], seed: int, resamples: int = RESAMPLES
) -> tuple[Interval, Interval, tuple[int, int]]:
    """Return the share used of the members, that of some others, and how many members and others there are.

    DUCI: the mean over a set of ``(m - FPR) / (TPR - FPR)``, where ``m`` says whether a patient's LiRA score is above a
    threshold. ``TPR - FPR`` (the power) is that of references whose members are known, each by the threshold that the
    rest of them choose. Run and references are scored by equally many references.

    Difference from DUCI: the single FPR is not that of the references but that of the run's own others, half of them,
    as its models are surer or less sure of everybody than references trained on fewer patients; the other half is the
    control. Intervals: percentiles over patients, references and their members. Where the power may be zero, shares
    are undefined.
    """
    known, pairs = on_references(lira_score, seen, known=True), len(seen[0].trained) // 2
    found = [sides(lira_score, [one.without(pair) for one in seen]) for pair in range(pairs)]
    threshold, counts = _threshold(known), []
    for r, one in enumerate(known):
        counts.append(_counts(one, _threshold([other for k, other in enumerate(known) if k != r])))
    used, others = (np.mean([one[s] > threshold for one in found], axis=0) for s in (0, 1))
    sizes = len(used), len(others)
    powers = [statistics.difference(*count).low for count in counts]
    if np.mean([-1.0 if low is None else low for low in powers]) <= 0 or not len(used) or len(others) < 4:
        return Interval(), Interval(), sizes
    table = np.array(counts)  # (R, 4)
    rng = numpy_generator(seed, "audit", "usage", seen[0].model, *(one.site for one in seen))
    half = rng.permutation(len(others)) % 2 == 0
    unused, base = others[half], others[~half]
    picked = table[rng.integers(len(table), size=(resamples, len(table)))]  # (B, R, 4)
    true, false = (rng.binomial(picked[..., k + 1], picked[..., k] / picked[..., k + 1]).sum(1) for k in (0, 2))
    power = np.maximum(true / picked[..., 1].sum(1) - false / picked[..., 3].sum(1), 1e-3)
    mean = float((table[:, 0] / table[:, 1] - table[:, 2] / table[:, 3]).mean())
    shares = []
    for mark in (used, unused):
        spread = np.quantile(
            (_drawn(mark, resamples, rng) - _drawn(base, resamples, rng)) / power, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        )
        shares.append(Interval(float((mark.mean() - base.mean()) / mean), *map(float, spread)))
    return shares[0], shares[1], sizes


def _drawn(marks: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the means of resamples (B,)."""
    return np.asarray(marks[rng.integers(len(marks), size=(resamples, len(marks)))].mean(1), dtype=np.float64)


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
        control="The same estimate for half of the test patients, of whom none was used; the other half is the zero.",
        limits=("It says nothing of a single patient.", "Who is asked about must come from the site's own population."),
        warnings=(NO_POWER.format(models=", ".join(powerless)),) if powerless else (),
        settings={"references": choice.references, "resamples": RESAMPLES, "seed": choice.seed},
        costs={"models trained": choice.references, "seconds": round(time.perf_counter() - started, 1)},
    )
