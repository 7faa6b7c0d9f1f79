"""Was this patient in the training set? RMIA and offline LiRA, by the confidence in the right class alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from confrere.audits import statistics
from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.references import Evidence, by_patient, evidence
from confrere.audits.tapped import MODELS, AuditedRun, Guarantee

Floats = NDArray[np.float64]
Score = Callable[[Evidence], Floats]
Sides = tuple[Floats, Floats]
RATES = (0.01, 0.001)
OFFSETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MEANS = (
    "AUC: how often a training patient scores above another one, 0.5 is guessing. TPR: the share of training patients "
    "that are found while at most so many others are accused; chance is the upper end of that share of others. "
    "Advantage: TPR - FPR at the best threshold, chosen on one half of the patients and tried on the other."
)
CONTROL = (
    "The same attack, with the same members and others, on reference models whose training does not depend on who "
    "trained the run (mean over them); it must find nothing."
)
LIMITS = (
    "A stronger attack, with more reference models or with the weights themselves, may find more.",
    "Others are test patients of the same hospitals; strangers from elsewhere are told apart more easily.",
    "Nothing is said of patients that no side holds.",
)
NO_POWER = (
    "The attack does not find the training patients of a reference model either, where they are known ({models}): that "
    "it finds none in the run says nothing."
)


def rmia_score(seen: Evidence, offset: float) -> Floats:
    """Return RMIA's score (N,): the share of others ``z`` with ``ratio(x) > ratio(z)``, equal ones by the ratio itself.

    ``ratio(x) = p(x) / (((1 + a) mean_out(x) + (1 - a)) / 2)`` (Zarifzadeh et al., ICML 2024, offline form, gamma 1).
    """

    def ratio(right: Floats, outside: Floats) -> Floats:
        """Return its logarithm: of a model that is sure of what is wrong, chances are zero in double precision."""
        beside = np.maximum(((1 + offset) * outside + 1 - offset) / 2, np.finfo(np.float64).tiny)
        return np.asarray(right - np.log(beside), dtype=np.float64)

    own = ratio(seen.right, seen.mean_outside(np.exp(seen.rights)))
    others = np.sort(ratio(seen.right_beside, np.exp(seen.rights_beside).mean(0)))
    return np.asarray(np.searchsorted(others, own, "left") + expit(own), dtype=np.float64)


def lira_score(seen: Evidence) -> Floats:
    """Return offline LiRA's score (N,) of a model, see :func:`calibrated`."""
    return calibrated(seen.right - seen.other, seen.rights - seen.others, ~seen.trained)


def calibrated(phi: Floats, phis: Floats, out: NDArray[np.bool_]) -> Floats:
    """Return ``(phi - mu_out) / sigma`` (N,) of offline LiRA: its ``1 - Pr[N > phi]`` grows with it.

    ``phi = log p_y - log(1 - p_y)`` (Carlini et al., S&P 2022). One sigma for all images, as with few references;
    ``mu_out`` is the mean over references that did not train on the image.

    Args:
        phi: (N,), of the attacked model.
        phis: (R, N), of each reference.
        out: bool (R, N), whether a reference did not train on it; for every image one did not.
    """
    mean = (phis * out).sum(0) / out.sum(0)
    free = max(1, int((out.sum(0) - 1).clip(0).sum()))
    sigma = float(np.sqrt((((phis - mean) * out) ** 2).sum() / free))
    return np.asarray((phi - mean) / max(sigma, 1e-9), dtype=np.float64)


def sides(score: Score, seen: Sequence[Evidence], inside: Sequence[NDArray[np.bool_]] | None = None) -> Sides:
    """Return the scores of all members and all others, one a patient and site."""
    marks = inside or [one.inside for one in seen]
    parts = [by_patient(score(one), one.patients, mark) for one, mark in zip(seen, marks, strict=True)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def on_references(score: Score, seen: Sequence[Evidence], *, known: bool) -> list[Sides]:
    """Return the sides of the same attack on each reference: its own members if ``known``, else those of the run."""
    found = []
    for r in range(len(seen[0].trained)):
        marks = [one.trained[r] if known else one.inside for one in seen]
        found.append(sides(score, [one.against(r) for one in seen], marks))
    return found


def averaged(found: Sequence[Interval]) -> Interval:
    """Return the mean of intervals, end by end: no narrower than the interval of the mean; undefined if one is."""
    table = [(one.value, one.low, one.high) for one in found]
    if not table or any(end is None for line in table for end in line):
        return Interval()
    return Interval(*(float(x) for x in np.array(table, dtype=np.float64).mean(0)))


def rows(
    subject: str, score: Score, seen: Sequence[Evidence], guarantee: Guarantee | None, seed: int, *, main: bool
) -> list[Row]:
    """Return AUC, TPR at low FPR and advantage of an attack on one model, beside its placebo and bound."""
    model, (inside, outside) = seen[0].model, sides(score, seen)
    placebo, covered = on_references(score, seen, known=False), None
    if guarantee is not None and guarantee.covers(model):
        covered = guarantee.of_patient(max(one.most for one in seen))
    size = f"{len(inside)} members, {len(outside)} others"
    row = partial(Row, subject=subject, model=model, n=size, main=main)
    area = row(
        measure="AUC",
        strength=statistics.auc(inside, outside),
        control=averaged([statistics.auc(*pair) for pair in placebo]),
        chance=0.5,
        bound=statistics.auc_bound(*covered) if covered else None,
    )
    made = [area]
    for rate in RATES:
        true, false = statistics.tpr_at(inside, outside, rate)
        made.append(
            row(
                measure=f"TPR at {100 * rate:g} % FPR",
                strength=true,
                control=averaged([statistics.tpr_at(*pair, rate)[0] for pair in placebo]),
                chance=rate if false.high is None else false.high,
                bound=statistics.tpr_bound(*covered, false.high) if covered and false.high is not None else None,
            )
        )
    gap = row(
        measure="advantage",
        strength=statistics.advantage(inside, outside, seed, subject, model),
        control=averaged([statistics.advantage(*pair, seed, subject, model, i) for i, pair in enumerate(placebo)]),
        bound=statistics.advantage_bound(*covered) if covered else None,
    )
    return [*made, gap]


def report(
    name: str,
    run: AuditedRun,
    choice: Choice,
    make_score: Callable[[Sequence[Evidence]], tuple[Score, dict[str, float]]],
    tuned: int = 0,
) -> Audit:
    """Return the audit of an attack: on every model, over all sites, at each, and on each class of all sites.

    Args:
        name: of the audit.
        run: attacked.
        choice: how thorough.
        make_score: the score for a model, and what was chosen for it by looking at members of references.
        tuned: so many references, the first, were looked at: they say nothing of the power.
    """
    started, everything = time.perf_counter(), evidence(run, choice)
    found: list[Row] = []
    powerless: list[str] = []
    settings: dict[str, Any] = {"references": choice.references, "most patients": choice.patients, "seed": choice.seed}
    for model in MODELS:
        seen = [one for one in everything if one.model == model]
        if not seen:
            continue
        score, chosen = make_score(seen)
        settings |= {f"{key}, {model}": value for key, value in chosen.items()}
        found += rows("all", score, seen, run.guarantee, choice.seed, main=True)
        for one in seen:
            found += rows(one.site, score, [one], run.guarantee, choice.seed, main=False)
        for label, known in enumerate(run.federation.classes):
            own = [one.of_class(label) for one in seen]
            found += rows(f"class {known}", score, own, run.guarantee, choice.seed, main=False)
        power = averaged([statistics.auc(*pair) for pair in on_references(score, seen, known=True)[tuned:]])
        if power.low is None or power.low <= 0.5:
            powerless.append(model)
        settings[f"AUC on a reference of known members, {model}"] = [power.value, power.low, power.high]
    return Audit(
        name=name,
        rows=tuple(found),
        means=MEANS,
        control=CONTROL,
        limits=LIMITS,
        warnings=(NO_POWER.format(models=", ".join(powerless)),) if powerless else (),
        settings=settings,
        costs={"models trained": choice.references, "seconds": round(time.perf_counter() - started, 1)},
    )


@register(
    "rmia",
    title="Membership, RMIA",
    question="Can it be told from a model's confidence whether a patient was in the training set?",
)
def rmia(run: AuditedRun, choice: Choice) -> Audit:
    """Return the relative membership inference attack with few reference models."""

    def make_score(seen: Sequence[Evidence]) -> tuple[Score, dict[str, float]]:
        areas = []
        for offset in OFFSETS:  # chosen on one reference, whose members are known; the run is not looked at

            def tried(one: Evidence, offset: float = offset) -> Floats:
                return rmia_score(one, offset)

            first = sides(tried, [one.against(0) for one in seen], [one.trained[0] for one in seen])
            areas.append(statistics.auc(*first).value or 0.0)
        best = OFFSETS[int(np.argmax(areas))]
        return (lambda one: rmia_score(one, best)), {"a": best}

    return report("rmia", run, choice, make_score, tuned=1)


@register(
    "lira",
    title="Membership, LiRA (offline)",
    question="Is a model more confident about a patient's image than models that were not trained on it?",
)
def lira(run: AuditedRun, choice: Choice) -> Audit:
    """Return the likelihood-ratio attack with reference models that were not trained on the patient."""
    return report("lira", run, choice, lambda seen: (lira_score, {}))
