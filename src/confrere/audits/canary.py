"""A lower bound of epsilon from one training (Steinke, Nasr and Jagielski, NeurIPS 2023).

Canaries are included by independent fair coins; whoever sees the result guesses some of the coins. Under (epsilon,
delta) differential privacy for one canary, more right guesses than a fair binomial with chance ``e^eps / (1 + e^eps)``
gives are unlikely: the least epsilon that is not refuted is the bound.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtr

from confrere.audits.audit import LEVEL, Audit, Choice, Interval, Row, register
from confrere.audits.references import confidence
from confrere.audits.tapped import MODELS, AuditedRun
from confrere.data.splits import TEST, TRAIN, VAL
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator

Floats = NDArray[np.float64]
SHARES = (1.0, 0.5, 0.2, 0.05)
"""Of the canaries, how many are guessed: the surest ones. The best bound counts, each at a quarter of the error."""
MOST = 60.0
FEWEST = 8
CANARIES = 0.2
"""At most so large a share of a site's patients become canaries, so that the rest still trains a model."""


def p_value(epsilon: float, delta: float, correct: int, guesses: int, canaries: int) -> float:
    """Return the most likely that (epsilon, delta) makes ``correct`` or more right guesses (their theorem 5.2).

    ``P[B >= v] + 2 m delta max_i P[v - i <= B < v] / i``, B binomial with ``guesses`` trials of chance
    ``e^eps / (1 + e^eps)``, i from 1 to v.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    fewer = float(bdtr(correct - 1, guesses, chance)) if correct else 0.0
    tail = 1 - fewer
    if not delta or not correct:
        return min(1.0, tail)
    back = np.arange(1, correct + 1)
    below = fewer - np.where(back < correct, bdtr(np.maximum(correct - 1 - back, 0), guesses, chance), 0.0)
    return min(1.0, tail + 2 * canaries * delta * float((below / back).max()))


def least_epsilon(correct: int, guesses: int, canaries: int, delta: float, error: float = 1 - LEVEL) -> float:
    """Return the largest epsilon that ``correct`` of ``guesses`` refute with this error; 0 if they refute none."""
    if not guesses or p_value(0.0, delta, correct, guesses, canaries) > error:
        return 0.0
    if p_value(MOST, delta, correct, guesses, canaries) <= error:
        return MOST
    return float(brentq(lambda e: p_value(e, delta, correct, guesses, canaries) - error, 0.0, MOST, xtol=1e-6))


def lower_bound(scores: Floats, included: NDArray[np.bool_], delta: float, error: float = 1 - LEVEL) -> float:
    """Return the bound for canaries with these scores (higher: more likely included) and coins.

    Of each of :data:`SHARES` the highest half is guessed to be in and the lowest half to be out; trying several costs
    as many times smaller an error each.

    Raises:
        ConfigError: fewer than two canaries, or as many scores as coins there are not.
    """
    m = len(scores)
    if m < 2 or len(included) != m or not np.isfinite(scores).all():
        what, fix = "canaries need two or more finite scores, and a coin each", "give as many scores as coins"
        raise ConfigError(what, where="canaries", fix=fix, code="audit")
    order, best = np.argsort(scores, kind="stable"), 0.0
    for share in SHARES:
        half = max(1, math.floor(share * m / 2))
        right = int(included[order[m - half :]].sum() + (~included[order[:half]]).sum())
        best = max(best, least_epsilon(right, 2 * half, m, delta, error / len(SHARES)))
    return best


@register(
    "canary",
    title="Epsilon from below, by canaries",
    question="Does the training protect a record as well as its epsilon says?",
)
def canary(run: AuditedRun, choice: Choice) -> Audit:
    """Return the bound for one more training like the run, whose canaries have wrong labels and a coin each.

    The attacker compares the confidence in the wrong label with that of the run's own model. Differences from the
    paper: canaries are images of patients with wrong labels; the attack sees the final models only, not every step.
    """
    started, rows = time.perf_counter(), list[Row]()
    splits, labels, chosen, coins = _plant(run, choice)
    trained = run.train_again("canary", splits, labels)
    promised = trained.guarantee  # of this training: other numbers of images need other noise
    delta = promised.delta if promised else 1e-5
    flat = np.concatenate([coins[site] for site in run.sites])
    for model in MODELS:
        scores = [_scores(run, trained, site, model, chosen[site], labels[site]) for site in run.sites]
        if any(one is None for one in scores):
            continue
        found = np.concatenate([one for one in scores if one is not None])
        rng = numpy_generator(choice.seed, "audit", "canary", "placebo", model)
        bound, placebo = (lower_bound(found, c, delta) for c in (flat, rng.random(len(flat)) < 0.5))
        covered = promised is not None and promised.covers(model)
        row = Row(
            subject="all",
            model=model,
            measure="epsilon, at least",
            strength=Interval(bound, bound, None),
            control=Interval(placebo, None, placebo),
            bound=promised.epsilon if covered and promised else None,
            n=f"{len(flat)} canaries",
        )
        rows.append(row)
    ceiling = max(
        least_epsilon(2 * h, 2 * h, len(flat), delta, (1 - LEVEL) / len(SHARES))
        for h in (max(1, math.floor(share * len(flat) / 2)) for share in SHARES)
    )
    return Audit(
        name="canary",
        rows=tuple(rows),
        means="With 95 % confidence, the training gives no better epsilon for a record than this; 0 says nothing.",
        control="The same scores against other coins, that decided nothing.",
        limits=(
            f"With so many canaries, all guessed right, it could not show more than {ceiling:.1f}.",
            "It sees the models after the last round only; a low bound does not prove a low epsilon.",
        ),
        warnings=() if promised else ("The training promises no epsilon; the bound says how far it is from one.",),
        settings={"canaries": len(flat), "included": int(flat.sum()), "delta": delta, "seed": choice.seed},
        costs={"models trained": 1, "seconds": round(time.perf_counter() - started, 1)},
    )


Planted = tuple[
    dict[str, NDArray[np.int8]],
    dict[str, NDArray[np.int64]],
    dict[str, NDArray[np.int64]],
    dict[str, NDArray[np.bool_]],
]


def _plant(run: AuditedRun, choice: Choice) -> Planted:
    """Return splits, labels, the rows of the canaries and their coins, by site; one image a patient."""
    splits, labels, chosen, coins = {}, {}, {}, {}
    for site in run.sites:
        data, rng = run.data[site], numpy_generator(choice.seed, "audit", "canary", site)
        pool = np.flatnonzero(data.split != VAL)
        _, first = np.unique(data.groups[pool], return_index=True)
        count = min(choice.patients, math.floor(CANARIES * len(first)))
        rows = np.sort(rng.permutation(pool[first])[:count])
        flipped, coin = data.labels.copy(), rng.random(count) < 0.5
        shift = rng.integers(1, len(data.classes), size=count)
        flipped[rows] = (flipped[rows] + shift) % len(data.classes)
        split = np.where(np.isin(data.groups, data.groups[rows]) & (data.split != VAL), TEST, data.split)
        split[rows] = np.where(coin, TRAIN, TEST)
        splits[site], labels[site], chosen[site], coins[site] = split.astype(np.int8), flipped, rows, coin
    if sum(map(len, chosen.values())) < FEWEST:
        what, fix = f"fewer than {FEWEST} canaries can be planted", "audit a run with more patients"
        raise ConfigError(what, where="canary", fix=fix, code="audit")
    return splits, labels, chosen, coins


def _scores(
    run: AuditedRun, trained: AuditedRun, site: str, model: str, rows: NDArray[np.int64], labels: NDArray[np.int64]
) -> Floats | None:
    if not len(rows):
        return np.zeros(0)
    after, before = (one.logits(site, model, rows) for one in (trained, run))
    if after is None or before is None:
        return None
    return confidence(after, labels[rows])[0] - confidence(before, labels[rows])[0]
