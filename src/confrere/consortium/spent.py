"""What was ever spent on a site's data, over all jobs, and whether one more may begin.

Whatever trained with one state folder counts as the same data: patients overlap, and a folder that was renamed or given
again holds the same ones. Within a training noisy steps compose by privacy-loss distributions; over trainings epsilons
add up, and so do deltas. That is the simplest rule and a loose one, but it holds when a later job is chosen by what an
earlier one gave, and for jobs that take turns.

References:
    Dwork et al., EUROCRYPT 2006 (basic composition). Rogers et al., NeurIPS 2016, arXiv 1605.08294 (budgets that are
    chosen on the way). Vadhan and Zhang, STOC 2023, arXiv 2207.08335 (mechanisms that take turns).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.consortium.policy import ROUNDING, Policy, refusal
from confrere.errors import PolicyError
from confrere.federation.ledger import entered
from confrere.fingerprint import trainings
from confrere.method import make
from confrere.privacy.spending import spent


@dataclass(frozen=True)
class Budget:
    """What one training has spent, or may spend: ``unit`` is what its noise hides, "" where it has none."""

    epsilon: float
    delta: float
    unit: str


def spent_ever(file: Path) -> dict[str, Budget]:
    """Return what each training in the record of a site's state folder has spent; those that cost nothing are left out.

    Epsilon is infinite without noise, and with noise that can be made again.

    Raises:
        RunError: the record is damaged, or lacks what was trained.
        MissingExtraError: dp-accounting is not installed.
    """
    each: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for debit in entered(file).debits:
        if debit["steps"] > 0:
            each[debit.get("training", "")].append(debit)
    return {training: _of_one(debits) for training, debits in each.items()}


def budgets(experiment: Experiment, job: str) -> dict[str, Budget]:
    """Return the most that each training of a job may spend, of those that send anything."""
    names = [path.as_posix() for path in trainings(Path(job), experiment)]
    methods = [experiment.build_method(), *map(make, experiment.other_controls)]
    own = experiment.privacy
    allowed = Budget(own.epsilon, own.delta, own.unit)
    return {name: allowed for name, method in zip(names, methods, strict=True) if method.sends}


def total(each: Iterable[Budget]) -> tuple[float, float]:
    """Return epsilon and delta of all together; infinite where they hide different units, which have no common sum."""
    known = list(each)
    mixed = len({one.unit for one in known}) > 1
    return math.inf if mixed else math.fsum(one.epsilon for one in known), math.fsum(one.delta for one in known)


def check_ever(policy: Policy, file: Path, planned: Mapping[str, Budget]) -> None:
    """Refuse a job whose budget is not left.

    A job that goes on is not counted twice: each of its trainings counts with its budget, or with what it has spent
    where that is more. As no training exceeds its budget (:class:`confrere.federation.ledger.Ledger`) and every job is
    asked anew whenever it goes on, the limit holds also for several jobs that take turns.

    Args:
        policy: of the site.
        file: the record of its state folder.
        planned: as :func:`budgets`.

    Raises:
        PolicyError: ``policy-spent``. Other errors as :func:`spent_ever`.
    """
    most, most_delta = policy.most_epsilon_ever, policy.most_delta_ever
    if not most or not planned:
        return
    before = spent_ever(file)
    after = {name: _larger(before.get(name, one), one) for name, one in {**before, **planned}.items()}
    epsilon, delta = total(after.values())
    if epsilon > most * (1 + ROUNDING) or delta > most_delta * (1 + ROUNDING):
        raise _too_much(policy, before, planned, delta)


def _too_much(policy: Policy, before: Mapping[str, Budget], planned: Mapping[str, Budget], delta: float) -> PolicyError:
    """Return why a job would exceed the limit: the first reason that holds."""
    most, most_delta, key = policy.most_epsilon_ever, policy.most_delta_ever, "most_epsilon_ever"
    asked = next(iter(planned.values()))
    if any(math.isinf(one.epsilon) for one in before.values()):
        what = "the site has trained without noise in an earlier experiment, so that no epsilon holds for its data"
        return refusal(what, key, code="policy-spent", fix="nothing: what was sent stands; talk to the site")
    others = {one.unit for one in before.values()} - {asked.unit}
    if others:
        what = f"noise has hidden each {min(others)} so far; with each {asked.unit} there is no common sum"
        return refusal(what, key, code="policy-spent", fix=f"set privacy.unit={min(others)}")
    if delta > most_delta * (1 + ROUNDING):
        what = f"with this experiment deltas add up to {delta:.4g} over all experiments; the site allows {most_delta:g}"
        return refusal(what, "most_delta_ever", code="policy-spent", fix="set a smaller privacy.delta")
    left = max(0.0, most - total(one for name, one in before.items() if name not in planned)[0])
    wanted = math.fsum(one.epsilon for one in planned.values())
    what = f"of epsilon {most:g} over all experiments {left:.4g} is left; this one may spend {wanted:g}"
    each = math.floor(1000 * left / len(planned)) / 1000
    return refusal(what, key, code="policy-spent", fix=f"set privacy.epsilon={each:g} or less" if each else "")


def _larger(one: Budget, other: Budget) -> Budget:
    """Return what covers either of two budgets of the same training."""
    epsilon = max(one.epsilon, other.epsilon) if one.unit == other.unit else math.inf
    return Budget(epsilon, max(one.delta, other.delta), one.unit)


def _of_one(debits: list[dict[str, Any]]) -> Budget:
    delta = min(debit["delta"] for debit in debits)
    units = {debit["unit"] for debit in debits}
    seeded = any(debit["seeded"] for debit in debits)
    epsilon = math.inf if seeded or len(units) > 1 else spent(debits, delta)
    return Budget(epsilon, delta, units.pop())
