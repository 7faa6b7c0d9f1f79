"""What a run that hides who took part has spent, and whether it may go on: debits are counted, never rounds.

A debit is written before a release, so that a crash can only count too much. Debits are read from the whole journal:
what a later line undid was released all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confrere.choices import FederationChoice, PrivacyChoice
from confrere.errors import ConfigError, RunError
from confrere.federation.sampling import cohort_size
from confrere.method import Method
from confrere.privacy import check_delta, epsilon, finite, statement
from confrere.record import journal
from confrere.record.run import Run

UNIT = "hospital"
NOT_COVERED = (
    "losses, validation scores and failures of single sites, and who took part: in journal, report, trackers, watch",
    "the run directory: digests of single sites' updates, by which a guess can be tried; in one process the updates "
    "themselves, under secure aggregation their sums: share model and report, not the directory",
    "test metrics of single sites in the results and the report",
    "the number of sites, their classes and their data sheets, which count as known",
    "tuning, comparing settings, and other runs on the same data: each spends anew",
    "patients within a hospital, beyond what hiding the whole hospital gives",
)
NOT_COVERED_AT_SITES = (
    "validation and test images: their metrics at the end, and the calibration of what a site takes home",
    "how many images and patients each site has, which set weights and rate; classes, splits and data sheets",
    "who took part, when, how long it took, and failures, in the journal",
    "what a site takes home: its own adapter may be trained without noise, and so tell of training images, and a little"
    " by its metrics on test images, which leave once",
    "other images of the same patient, and the same image in another file, where the unit is one image",
    "the same patient by another name, or at another hospital",
    "rounding: noise is added in double precision, which does not stop attacks on the last bits of floats",
    "tuning, comparing settings, controls, and other runs on the same data: each spends anew",
)
NAMES = {"record": "one training image of a site", "patient": "all training images of one patient of a site"}
CONDITION = "holds only against those who cannot know which hospitals were drawn: not against whoever holds the seed"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the releases of one run are accounted by.

    Args:
        delta: of the guarantee. limit: largest epsilon without amplification; 0 for none.
        fraction: of ``sites`` drawn a round. poisson: each by itself.
    """

    delta: float
    limit: float
    fraction: float
    poisson: bool
    sites: int

    @property
    def neighbours(self) -> str:
        """Return what is hidden: where a fixed share is drawn, one more site would push out another one."""
        return "add-remove" if self.poisson or self.fraction == 1.0 else "replace-one"

    @property
    def expected(self) -> float:
        """Return how many sites are expected a round."""
        return self.fraction * self.sites if self.poisson else float(cohort_size(self.fraction, self.sites))

    def spent(self, debits: Sequence[Mapping[str, Any]]) -> float:
        """Return epsilon of all debits, without amplification; 0 for none."""
        if not debits:
            return 0.0
        quiet = any(not debit["sigma"] for debit in debits)
        sigma = 0.0 if quiet else sum(debit["sigma"] ** -2 for debit in debits) ** -0.5  # all as one release
        return epsilon(sigma, rounds=1, delta=self.delta, sampling="all", neighbours=self.neighbours)  # type: ignore[arg-type]

    def conditional(self, debits: Sequence[Mapping[str, Any]]) -> float | None:
        """Return an upper bound of epsilon with amplification; None without Poisson sampling, or without debits.

        A round that was done again drew the same sites again: all rounds count as often as the most repeated one.
        """
        if not debits or not self.poisson or self.fraction == 1.0:
            return None
        often = Counter(debit["round"] for debit in debits)
        sigma = min(debit["sigma"] for debit in debits) / math.sqrt(max(often.values()))
        amplified = epsilon(sigma, rounds=len(often), delta=self.delta, rate=self.fraction)
        return min(amplified, self.spent(debits))

    def stops(self, run: Run, round_: int) -> dict[str, Any] | None:
        """Return the event that ends a run before ``round_``, None if the budget covers one more release.

        Raises:
            RunError: there is no committed round to end with.
        """
        if not self.limit:
            return None
        debits = debits_of(run)
        if not debits or self.spent([*debits, debits[-1]]) <= self.limit:
            return None
        reason = f"{len(debits)} releases have spent the budget: one more would exceed epsilon {self.limit:g}"
        if round_ == 1:
            fix = "start a new run with a larger privacy.epsilon or method.sigma"
            raise RunError(reason, where="privacy.epsilon", fix=fix, code="privacy")
        return {"event": "stop", "round": round_ - 1, "reason": reason}

    def record(self, method: Method, run: Run) -> dict[str, Any]:
        """Return what results.json says of privacy; epsilon is None where there is none."""
        debits = debits_of(run)
        total, conditional = self.spent(debits), self.conditional(debits)
        said = statement(total, delta=self.delta, rounds=len(debits), sampling="all", neighbours=self.neighbours)
        seeded = any(debit["seeded"] for debit in debits)
        if seeded:
            said = f"Simulation, no privacy: who knows method.noise_seed takes the noise off again. Else: {said}"
        return {
            "unit": UNIT,
            "neighbours": self.neighbours,
            **method.release(),
            "sampling": "poisson" if self.poisson else "fixed",
            "expected_sites": self.expected,
            "debits": len(debits),
            "delta": self.delta,
            "epsilon": finite(total),
            "limit": self.limit or None,
            "conditional_epsilon": None if conditional is None else finite(conditional),
            "condition": CONDITION,
            "simulation": seeded,
            "statement": said,
            "not_covered": list(NOT_COVERED),
        }


def budget_of(method: Method, federation: FederationChoice, privacy: PrivacyChoice, sites: int) -> Budget | None:
    """Return the budget of a method that hides who took part, None for others.

    Raises:
        ConfigError: delta is too large for so many sites, or the first release would exceed the budget.
        MissingExtraError: dp-accounting is not installed.
    """
    released = method.release()
    if not released:
        return None
    check_delta(privacy.delta, sites)
    budget = Budget(
        delta=privacy.delta,
        limit=privacy.epsilon,
        fraction=federation.fraction,
        poisson=federation.sampling == "poisson",
        sites=sites,
    )
    first = budget.spent([{**released, "round": 1}])
    if budget.limit and first > budget.limit:
        what = f"one round alone has epsilon {first:.3g}, above the budget of {budget.limit:g}"
        raise ConfigError(what, where="privacy.epsilon", fix="raise method.sigma, or the budget", code="privacy")
    return budget


def privacy_said(budget: Budget | None, method: Method, run: Run, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``privacy`` of results.json, if anything was hidden: whole sites, or what each site says it hid.

    Args:
        budget: of whole sites, None without.
        method: that was trained.
        run: holds the debits of whole sites.
        sites: results of every site, of which each may have a ledger of its own.
    """
    if budget is not None:
        return {"privacy": budget.record(method, run)}
    each = {name: entry.pop("privacy") for name, entry in sites.items() if isinstance(entry.get("privacy"), dict)}
    return {"privacy": _of_sites(each)} if each else {}


def _of_sites(each: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what all sites spent: sites hold different images, so that the largest epsilon holds for each of them."""
    values = [number(said.get("epsilon")) for said in each.values()]
    worst = None if None in values else max(value for value in values if value is not None)
    units = sorted({str(said.get("unit")) for said in each.values()})
    unit = " or ".join(NAMES.get(name, "unknown") for name in units)
    seeded = any(said.get("seeded") is not False for said in each.values())
    levels = {
        key: [number(said.get(key)) for said in each.values()] for key in ("sigma", "rate", "steps", "clip", "delta")
    }
    span = {key: _span([v or 0.0 for v in found]) for key, found in levels.items()}
    said = "no privacy" if worst is None else f"epsilon {worst:.2f} at delta {span['delta']}"
    said += (
        f"; unit: {unit}, added or removed, their number known; noise {span['sigma']} times the clip of "
        f"{span['clip']}, Poisson sampling at rate {span['rate']}, {span['steps']} steps a site; PLD by dp-accounting"
    )
    if seeded:
        said = f"Simulation, no privacy: who knows privacy.noise_seed takes the noise off again. Else: {said}"
    return {
        "unit": " or ".join(units),
        "neighbours": "add-remove",
        "epsilon": worst,
        **{key: max(v or 0.0 for v in levels[key]) for key in ("delta", "sigma", "clip")},
        "simulation": seeded,
        "sites": dict(each),
        "statement": said,
        "not_covered": list(NOT_COVERED_AT_SITES),
    }


def _span(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{end:.4g}" for end in (min(values), max(values)))
    return " to ".join(ends)


def number(value: object) -> float | None:
    """Return a finite number as it is, None for anything else that a site may say."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None  # type: ignore[arg-type]


def debits_of(run: Run) -> list[dict[str, Any]]:
    """Return every debit of a run, also those of rounds that were done again."""
    return [event for event in journal.read(run.events_file)[0] if event["event"] == "debit"]
