"""``property``: what sums of adapter updates give away of single sites, from a finished run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.property import Floats, Posterior, System, posterior, score_of_sum
from confrere.audits.property_classifier import persistence, train_score
from confrere.audits.property_order import MIXED, mixed, order_rows, resampled
from confrere.audits.property_shadows import Property, class_share, draw_shadows, flat, shadow_updates
from confrere.audits.statistics import proportion
from confrere.audits.tapped import AuditedRun
from confrere.errors import ConfigError
from confrere.federation.participation import Identifiability, cohorts_of, identifiability
from confrere.federation.secure.total import SUMS
from confrere.method import Method
from confrere.record.store import round_file
from confrere.tensors import State

SHADOWS = 50
"""With the property, and as many without, in every round."""
ROUNDS = 12
"""At most so many rounds are attacked, spread over the run."""
SHIFT = 1.0
"""See :class:`confrere.audits.property.System`: the level of all scores is trusted as little as that of one site."""


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What the attack knows of every site, in shares of images; arrays are (N,) in the order of ``sites``.

    ``guess``: the share the adversary expects of any site. ``mixed``: (200, N) estimates where others took part.
    ``accuracy``: of the classifier on single updates of ``judged`` shadows, mean over the rounds. ``seen``: see
    :func:`confrere.federation.participation.identifiability`. ``system``: for estimates other than the posterior.
    """

    sites: tuple[str, ...]
    truth: Floats
    estimate: Posterior
    mixed: Floats
    guess: float
    high: float
    system: System
    accuracy: float
    judged: int
    seen: Identifiability


def observed(run: AuditedRun, round_: int) -> tuple[State, Floats] | None:
    """Return what the server held before a round, and the mean change (d,) it saw; None where either is not kept."""
    before, masked = run.server(round_ - 1), run.experiment.masked
    if masked and not round_file(run.path / SUMS, round_).exists():
        return None
    after = run.total(round_) if masked else run.server(round_)
    if before is None or after is None:
        return None
    received = run.method.broadcast(before, run.sites[0])["shared"]
    return before, flat({name: after["shared"][name] for name in received}, received)


def check(run: AuditedRun) -> None:
    """Raise ConfigError where the server's states are no means of the sites' updates, or sites differ in form."""
    method, choice = run.method, run.experiment
    sums = choice.masked or (
        type(method).aggregate is Method.aggregate
        and choice.federation.rule == "mean"
        and not choice.federation.canonical
    )
    if choice.privacy.at_sites:
        what, fix = "shadows would have to be as noisy as the sites' steps were", "audit a run without privacy.unit"
        raise ConfigError(what, where="privacy.unit", fix=fix, code="audit")
    fix = "audit a run with secure aggregation, or of a method that averages, such as fedit"
    if "shared" not in method.sends or method.pools or not sums:
        what = f"what the server has of {method.name} with these choices is no mean of updates"
        raise ConfigError(what, where="method.name", fix=fix, code="audit")
    if choice.adapter.ranks or choice.backbone.depths or len(run.sites) < 2:
        what = "two sites or more, of one rank and one depth, make a sum"
        raise ConfigError(what, where="adapter.ranks", fix=fix, code="audit")


def infer(
    run: AuditedRun, asked: Property, choice: Choice, *, shadows: int = SHADOWS, rounds: int = ROUNDS
) -> Inferred:
    """Return every site's share of images with a property, as a server infers it from one sum a round.

    Args:
        run: finished.
        asked: the property.
        choice: its seed and its progress are used.
        shadows: of either kind, in each round.
        rounds: at most so many are attacked.

    Raises:
        ConfigError: the run shows no sums, or too few images, shadows or rounds are there.
    """
    check(run)
    made = draw_shadows(run, asked, shadows, choice.seed)
    kept = [(r, cohort) for r, cohort in cohorts_of(run.run.events()) if observed(run, r) is not None]
    if not kept:
        raise ConfigError("no round's states are kept", where="record.keep", fix="run with record.keep=0", code="audit")
    some = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, min(rounds, len(kept))).round().astype(int))]
    A, b, scores = np.zeros((len(some), len(run.sites))), np.zeros(len(some)), []
    for index, (round_, cohort) in enumerate(some):
        before, mean = observed(run, round_) or ({}, np.zeros(0))
        A[index] = coefficients(run, cohort)
        score = train_score(shadow_updates(run, made, round_, before, choice.seed), made.kinds, seed=choice.seed)
        b[index] = score_of_sum(score.direction, score.offset, len(cohort) * mean, A[index])
        scores.append(score)
        choice.notify(f"property: round {round_}, {index + 1} of {len(some)}, {2 * shadows} shadows")
    system = System(
        A=A,
        b=b,
        mean_with=np.array([s.mean_with for s in scores]),
        var_with=np.array([s.var_with for s in scores]),
        mean_without=np.array([s.mean_without for s in scores]),
        var_without=np.array([s.var_without for s in scores]),
        persistence=persistence(np.stack([s.deviations for s in scores])),
        shift=SHIFT,
    )
    return Inferred(
        sites=tuple(run.sites),
        truth=np.array([asked.share(run, s) for s in run.sites]),
        estimate=in_shares(posterior(system, made.prior), made.high),
        mixed=np.stack([in_shares(posterior(mixed(system, i), made.prior), made.high).mean for i in range(MIXED)]),
        guess=made.prior * made.high,
        high=made.high,
        system=system,
        accuracy=float(np.mean([s.accuracy for s in scores])),
        judged=len(scores[0].deviations),
        seen=identifiability((A > 0).astype(float), run.sites),
    )


def coefficients(run: AuditedRun, cohort: tuple[str, ...]) -> Floats:
    """Return how often each site's update is in the sum (N,): its weight over the mean weight of who took part.

    The sum is the weighted mean of the updates times their number.
    """
    equal = run.experiment.federation.weights == "equal"
    weights = [(1 if equal else len(run.data[s].rows("train"))) if s in cohort else 0 for s in run.sites]
    return np.array(weights) / sum(weights) * len(cohort)


def in_shares(found: Posterior, high: float) -> Posterior:
    """Return estimates of tau as shares: 0 at tau 0, ``high`` at tau 1, none beyond."""
    return Posterior(
        mean=np.clip(found.mean, 0, 1) * high, sd=found.sd * high, low=found.low * high, high=found.high * high
    )


def skill(estimate: Floats, truth: Floats, guess: float) -> float:
    """Return ``1 - sum (estimate - truth)^2 / sum (guess - truth)^2``: 1 is exact, 0 no better than the guess."""
    missed = float(((guess - truth) ** 2).sum())
    return 1 - float(((estimate - truth) ** 2).sum()) / missed if missed else 0.0


@register(
    "property",
    title="Property inference against sums of updates",
    question="Does a server that sees only sums of updates learn what kind of patients a single site has?",
)
def property_inference(run: AuditedRun, choice: Choice) -> Audit:
    """Infer from the sums the share, at every site, of the class in which sites differ most; see :func:`infer`."""
    started = time.perf_counter()
    asked = class_share(run)
    found = infer(run, asked, choice)
    seen = found.seen
    warnings = []
    if not run.experiment.masked:
        warnings.append("The run had no secure aggregation: the server saw every update, and needs no sums.")
    if not seen.single:
        warnings.append("No single site is identifiable: the sums tell groups apart, not their members.")
    return Audit(
        name="property",
        rows=(
            *summary_rows(found, choice.seed),
            *order_rows(found.system, found.guess / found.high, found.truth, choice.seed),
            *site_rows(found),
        ),
        means=f"asking for {asked.name}; skill: share of the squared error of the mean guess that the attack removes; "
        "order: share of pairs of sites in the right order, by our estimate and by published ones",
        control="the same sums, with a random participation matrix; of a site, the adversary's guess without any sum",
        limits=(
            "Shadows train on images that the global model has not seen, sites on images it has: scores are shifted.",
            "One property, one classifier, shadows made of the sites' own held-out images; others may leak more.",
            "Where tau is between the levels of the shadows, its estimate is interpolated.",
            "Without a finding nothing is proven: only groups, or noise that is in the sum, bound this attack.",
        ),
        warnings=tuple(warnings),
        settings={
            "property": asked.name,
            "rounds": len(found.system.A),
            "shadows": 2 * SHADOWS,
            "persistence": round(found.system.persistence, 4),
            "identifiability": asdict(seen),
            "sites": {
                site: {
                    "true share": round(float(found.truth[i]), 4),
                    "estimate": [
                        round(float(v[i]), 4) for v in (found.estimate.mean, found.estimate.low, found.estimate.high)
                    ],
                }
                for i, site in enumerate(found.sites)
            },
        },
        costs={
            "seconds": round(time.perf_counter() - started, 1),
            "models trained": 2 * SHADOWS * len(found.system.A),
        },
    )


def summary_rows(found: Inferred, seed: int) -> tuple[Row, Row]:
    """Return the skill over all sites, and how well single updates would be told apart."""
    n, guess = len(found.sites), found.guess
    others = [skill(one, found.truth, guess) for one in found.mixed]
    control = Interval(float(np.mean(others)), *(float(q) for q in np.quantile(others, (0.025, 0.975))))
    return (
        Row(
            subject="all",
            model="sums",
            measure="skill",
            strength=resampled(lambda rows: skill(found.estimate.mean[rows], found.truth[rows], guess), n, seed),
            control=control,
            n=f"{n} sites, {len(found.system.A)} sums, {len(found.seen.single)} sites identifiable",
        ),
        Row(
            subject="all",
            model="update",
            measure="accuracy",
            strength=proportion(round(found.accuracy * found.judged), found.judged),
            chance=0.5,
            n=f"{found.judged} shadow updates a round, as a server without secure aggregation would see them",
        ),
    )


def site_rows(found: Inferred) -> list[Row]:
    """Return how near the estimate comes to each site's share: 1 is exact."""
    rows = []
    for i, site in enumerate(found.sites):
        truth, single = float(found.truth[i]), site in found.seen.single
        ends = [1 - abs(float(v[i]) - truth) for v in (found.estimate.low, found.estimate.high)]
        inside = found.estimate.low[i] <= truth <= found.estimate.high[i]
        best = 1.0 if inside else max(ends)
        plain = 1 - abs(found.guess - truth)
        rows.append(
            Row(
                subject=site,
                model="sums",
                measure="closeness",
                strength=Interval(1 - abs(float(found.estimate.mean[i]) - truth), min(ends), best),
                control=Interval(plain, plain, plain),
                chance=plain,
                n="identifiable from the sums" if single else "not identifiable from the sums",
                main=False,
            )
        )
    return rows
