"""The privacy budget of rounds of a subsampled Gaussian mechanism, and how loud its noise is.

Each round releases ``sum of vectors clipped to norm S + N(0, (S sigma)^2)``. A unit is what one vector stands for: a
whole hospital in client-level privacy, a record in DP-SGD inside one. An epsilon means nothing without its delta, its
unit and the neighbours: :func:`statement` says all of them.

- ``poisson``: every unit is drawn by itself with probability ``rate``, so that rounds differ in size and may be empty;
  divide by a fixed number. Neighbours differ by one unit more or less (``add-remove``).
- ``all``: every unit takes part in every round; no amplification. For both kinds of neighbours.
- ``fixed``: exactly ``round(rate * units)`` of ``units`` are drawn without replacement. Neighbours have one unit
  replaced (``replace-one``), which moves the sum by up to 2 S.

dp-accounting does the numbers: privacy-loss distributions (PLD, tight; of ``all`` their exact curve), or Rényi
divergence at whole orders (RDP, an upper bound); ``fixed`` has RDP only.

References:
    Koskela et al., AISTATS 2020, arXiv 1906.03049; Doroshenko et al., PoPETs 2022, arXiv 2207.04380 (PLD).
    Mironov et al., 2019, arXiv 1908.10530 (RDP, Poisson). Wang et al., AISTATS 2019, arXiv 1808.00087 (RDP, fixed).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

from confrere.errors import ConfigError, MissingExtraError

Sampling = Literal["poisson", "all", "fixed"]
Neighbours = Literal["add-remove", "replace-one"]
Accountant = Literal["pld", "rdp"]
ORDERS = (*range(2, 65), 72, 80, 96, 128, 192, 256)
MOST_DELTA = 0.1
"""Delta times the number of units is at most this."""
QUIET, LOUD = 1.0, 10.0
"""Ratios of noise to clip: below the first, noise is smaller than one hospital's update; above the second, our own
trials lost most of what was to be learnt (16: concordance .68 -> .54 to .61; 24: .53 to .57, near chance)."""


def epsilon(
    sigma: float,
    *,
    rounds: int,
    delta: float,
    sampling: Sampling = "poisson",
    rate: float = 1.0,
    units: int = 0,
    neighbours: Neighbours = "add-remove",
    accountant: Accountant = "pld",
) -> float:
    """Return epsilon after all rounds; infinite without noise.

    Args:
        sigma: standard deviation of the noise in units of S, >= 0.
        rounds: releases, >= 1; a round that is done again is one more.
        delta: in (0, 1), well below one over the number of units.
        sampling: how units are drawn, see above.
        rate: chance of a unit to be drawn, in (0, 1]; not used by ``all``.
        units: how many there are; ``fixed`` alone needs it.
        neighbours: what must stay hidden.
        accountant: ``pld`` or ``rdp``.

    Raises:
        ConfigError: a value out of range, or a combination for which no proof is implemented.
        MissingExtraError: dp-accounting is not installed.
    """
    _check(rounds, delta, sampling, rate, units, neighbours, accountant)
    if not 0 <= sigma < math.inf:
        raise ConfigError(f"{sigma} is out of range", where="privacy.sigma", fix="use sigma >= 0")
    if sigma == 0:
        return math.inf
    drawn = round(rate * units)
    if sampling == "poisson" and rate == 1.0:
        sampling = "all"
    return _epsilon(float(sigma), rounds, float(delta), sampling, float(rate), units, drawn, neighbours, accountant)


def check_delta(delta: float, units: int, what: str = "hospitals") -> None:
    """Raise ConfigError where delta is above :data:`MOST_DELTA` over so many units; ``what`` they are.

    A mechanism that tells all of each unit with chance delta, and nothing else, is (0, delta)-private.
    """
    if units < 1 or delta * units > MOST_DELTA * (1 + 1e-9):
        what = (
            f"delta {delta:g} is too large for {units} {what}: it would let one be told with chance {delta * units:.2g}"
        )
        fix = f"use {MOST_DELTA / max(units, 1):.2g} or less"
        raise ConfigError(what, where="privacy.delta", fix=fix, code="privacy")


def finite(value: float) -> float | None:
    """Return an epsilon for JSON, which knows no infinity."""
    return value if math.isfinite(value) else None


def _check(rounds: int, delta: float, sampling: str, rate: float, units: int, neighbours: str, accountant: str) -> None:
    chosen = {"sampling": sampling, "neighbours": neighbours, "accountant": accountant}
    valid = {
        "sampling": ("poisson", "all", "fixed"),
        "neighbours": ("add-remove", "replace-one"),
        "accountant": ("pld", "rdp"),
    }
    for key, value in chosen.items():
        if value not in valid[key]:
            fix = f"use one of: {', '.join(valid[key])}"
            raise ConfigError(f"{value!r} is not a choice", where=f"privacy.{key}", fix=fix, code="unknown-name")
    if rounds < 1 or not 0 < delta < 1 or not 0 < rate <= 1:
        what = f"rounds {rounds}, delta {delta} or rate {rate} is out of range"
        raise ConfigError(what, where="privacy", fix="use rounds >= 1, 0 < delta < 1 and 0 < rate <= 1")
    if sampling == "fixed" and not 1 <= round(rate * units) <= units:
        what = f"a fixed cohort needs the number of units; a share of {rate} of {units} is nobody"
        raise ConfigError(what, where="privacy.units", fix="give units >= 1 and a rate that draws one")
    wrong = {
        ("poisson", "replace-one"): "use neighbours='add-remove' with Poisson sampling",
        ("fixed", "add-remove"): "use neighbours='replace-one' with a fixed cohort: its size is public",
    }
    fix = wrong.get((sampling, neighbours), "")
    if not fix and sampling == "fixed" and accountant == "pld":
        fix = "use accountant='rdp' with a fixed cohort"
    if fix:
        what = f"no accounting of {sampling} sampling, {neighbours} neighbours by {accountant}"
        raise ConfigError(what, where="privacy", fix=fix, code="accounting")


LEAST_SIGMA = 0.25
"""With less noise sampling is not credited: the privacy loss has so many steps that its distribution fills memory."""


@lru_cache(maxsize=256)  # seconds each
def _epsilon(
    sigma: float,
    rounds: int,
    delta: float,
    sampling: str,
    rate: float,
    units: int,
    drawn: int,
    neighbours: str,
    accountant: str,
) -> float:
    dp = dp_accounting()
    if neighbours == "replace-one":
        sigma /= 2  # the sum moves by 2 S
    relation = dp.NeighboringRelation.REPLACE_ONE if sampling == "fixed" else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if sampling == "all" and accountant == "pld":
        return _gaussian(sigma / math.sqrt(rounds), delta)  # rounds of Gaussian noise are one of less noise
    if sampling == "poisson" and accountant == "pld" and sigma < LEAST_SIGMA:  # epsilon is hopeless, its table endless
        return _epsilon(sigma, rounds, delta, "all", 1.0, units, drawn, neighbours, accountant)
    if sampling == "all":
        event, count = dp.GaussianDpEvent(sigma / math.sqrt(rounds)), 1
    elif sampling == "fixed":
        event, count = dp.SampledWithoutReplacementDpEvent(units, drawn, dp.GaussianDpEvent(sigma)), rounds
    else:
        event, count = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), rounds
    if accountant == "pld":
        from dp_accounting.pld import PLDAccountant

        book: Any = PLDAccountant(relation, value_discretization_interval=interval(rounds))
    else:
        from dp_accounting.rdp import RdpAccountant

        book = RdpAccountant(list(ORDERS), relation)
    book.compose(event, count)
    return float(book.get_epsilon(delta))


def interval(rounds: int) -> float:
    """Return to what multiples losses are rounded up: some 1e-4 of epsilon, for a tenth of the time of the default."""
    return min(1e-3, max(1e-4, 0.2 / rounds))


def _gaussian(sigma: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism from its exact curve of delta, rounded up by at most 1e-6 of itself.

    Where there is so little noise that the curve cannot be computed, Rényi divergence bounds it.
    """
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    most = epsilon(sigma, rounds=1, delta=delta, sampling="all", accountant="rdp")
    if most > 500:
        return most
    curve, low, high = GaussianPrivacyLoss(sigma), 0.0, most
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if curve.get_delta_for_epsilon(middle) > delta else (low, middle)
    return high


def calibrate_sigma(target: float, *, tolerance: float = 1e-3, **options: Any) -> float:
    """Return the least sigma, up to ``tolerance``, whose epsilon is at most ``target``.

    Args:
        target: epsilon, > 0.
        tolerance: of sigma; the answer errs on the side of more noise.
        options: as for :func:`epsilon`, without ``sigma``.

    Raises:
        ConfigError: as :func:`epsilon`, or a target that no sigma of 0.05 to 10,000 meets.
    """
    if not 0 < target < math.inf:
        raise ConfigError(f"{target} is out of range", where="privacy.epsilon", fix="use epsilon > 0")
    high = 0.05
    rough = {**options, "accountant": "rdp"}  # an upper bound in milliseconds: PLD needs no more noise
    epsilon(1.0, **options) if options.get("accountant") == "rdp" else epsilon(1.0, **rough)
    while epsilon(high, **rough) > target:
        high *= 2
        if high > 1e4:
            fix = "use a larger epsilon, fewer rounds or a smaller rate"
            raise ConfigError(f"no noise gives epsilon {target}", where="privacy.epsilon", fix=fix, code="accounting")
    low, high = _bisect(high / 2, high, target, tolerance, rough)
    if options.get("accountant", "pld") == "pld":
        low = high / 2
        while low > tolerance and epsilon(low, **options) <= target:
            low, high = low / 2, low
        low, high = _bisect(low, high, target, tolerance, options)
    return high


def _bisect(low: float, high: float, target: float, tolerance: float, options: dict[str, Any]) -> tuple[float, float]:
    """Halve the gap until it is below the tolerance; ``high`` meets the target throughout."""
    while high - low > tolerance:
        middle = (low + high) / 2
        if epsilon(middle, **options) <= target:
            high = middle
        else:
            low = middle
    return low, high


def noise_ratio(sigma: float, dimensions: int, cohort: float) -> float:
    """Return ``sigma sqrt(d) / K``: the expected norm of the noise in the mean of K sites, in units of the clip S.

    One site's update has at most norm S, and so has their mean: above 1 there is more noise than signal in a round.

    Args:
        sigma: noise in units of S.
        dimensions: d, numbers that are sent.
        cohort: K, (expected) sites a round, > 0.

    Raises:
        ConfigError: a value out of range.
    """
    if not (0 <= sigma < math.inf and dimensions >= 0 and 0 < cohort < math.inf):
        what = f"no noise ratio of sigma {sigma}, {dimensions} numbers and {cohort} sites"
        raise ConfigError(what, where="privacy", fix="use sigma >= 0, d >= 0 and at least one site a round")
    return sigma * math.sqrt(dimensions) / cohort


def sites_needed(sigma: float, dimensions: int, ratio: float = QUIET) -> int:
    """Return how many sites a round bring the noise down to ``ratio`` times the clip, at least one."""
    return max(1, math.ceil(sigma * math.sqrt(dimensions) / ratio))


def noise_verdict(sigma: float, dimensions: int, cohort: float) -> str:
    """Return in plain words whether noise of a whole hospital's privacy leaves anything to learn."""
    ratio = noise_ratio(sigma, dimensions, cohort)
    said = f"Noise is {ratio:.3g} times as large as the largest update of a hospital ({dimensions:,} numbers are sent)."
    if ratio <= QUIET:
        return f"{said} That can work."
    need = sites_needed(sigma, dimensions)
    if ratio <= LOUD:
        return f"{said} Expect a loss of accuracy; with {need:,} hospitals a round both would be equal."
    return (
        f"{said} Hiding whole hospitals is out of reach here: {need:,} hospitals a round would be needed for both to "
        "be equal. Send fewer numbers (a head alone, A frozen), or protect patients within each hospital instead "
        "(record-level DP-SGD)."
    )


def refuse_hopeless(sigma: float, dimensions: int, cohort: float, *, most: float = LOUD) -> None:
    """Refuse settings whose noise is above ``most`` times the clip.

    Raises:
        ConfigError: it is; the verdict is in the message.
    """
    if noise_ratio(sigma, dimensions, cohort) > most:
        what = noise_verdict(sigma, dimensions, cohort)
        fix = "more hospitals, fewer trained numbers, or record-level privacy"
        raise ConfigError(what, where="privacy", fix=fix, code="noise-drowns")


def statement(value: float, *, delta: float, rounds: int, unit: str = "one whole hospital", **options: Any) -> str:
    """Return an epsilon with all that it means nothing without; ``options`` as for :func:`epsilon`."""
    how = {"poisson": "Poisson sampling at rate {rate:g}", "all": "no sampling", "fixed": "fixed cohorts of {rate:g}"}
    sampled = how[options.get("sampling", "poisson")].format(rate=options.get("rate", 1.0))
    change = {"add-remove": "added or removed", "replace-one": "replaced"}[options.get("neighbours", "add-remove")]
    book = str(options.get("accountant", "pld")).upper()
    said = "no privacy" if math.isinf(value) else f"epsilon {value:.2f} at delta {delta:g}"
    return f"{said}; unit: {unit}, {change}; {rounds} rounds, {sampled}; {book} by dp-accounting"


def dp_accounting() -> Any:
    """Return the library; MissingExtraError without it."""
    try:
        import dp_accounting as library
    except ImportError as error:
        raise MissingExtraError("dp-accounting", "dp", needed_for="privacy accounting") from error
    return library
