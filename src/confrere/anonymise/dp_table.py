"""A table drawn from noisy counts: what epsilon-differential privacy gives on the same task, to stand beside k.

Of each unit one record is drawn. Published are, with two-sided geometric noise, the count of each target, and for each
target the count of every bin, leaf and item. A unit adds 1 to one count of each of these histograms, and to at most
``most_items`` counts of items (more are left out at random), so adding or removing it changes the counts by at most
S = 1 + Q + most_items in L1, and noise with P(x) proportional to exp(-|x| epsilon / S) gives pure epsilon-DP for units;
what follows only looks at the noisy counts. Records are drawn from them as if columns were independent given the
target. Whole numbers: the low bits of a floating-point Laplace draw would tell (Mironov, CCS 2012).

A unit at two sites is protected by the sum of both epsilons.

References:
    Dwork et al., TCC 2006; Ghosh, Roughgarden and Sundararajan, STOC 2009 (geometric mechanism).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.hierarchy import Hierarchy
from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator


def sensitivity(plan: Plan, most_items: int) -> int:
    """Return by how much one unit changes all counts together."""
    return 1 + len(plan.identifiers) + (most_items if plan.tree is not None else 0)


def noisy_table(
    plan: Plan, records: Records, targets: Sequence[str], *, epsilon: float, most_items: int = 8, seed: int = 0
) -> Records:
    """Return made-up records whose distribution is epsilon-DP in the units of ``records``.

    Args:
        plan: which columns there are; it may keep none.
        records: of one site.
        targets: the public list of targets.
        epsilon: above 0; infinite adds no noise.
        most_items: items of a record that count.
        seed: of noise and draws. Whoever knows it can take the noise away: for experiments only.

    Raises:
        ConfigError: epsilon is not positive, or the plan keeps columns, for which there are no public values.
    """
    if not epsilon > 0 or most_items < 1:
        raise ConfigError("epsilon must be above 0 and most_items at least 1", where="epsilon", fix="give larger ones")
    if plan.keep:
        what, fix = "columns that are kept have no public list of values", "make them identifiers with cut points"
        raise ConfigError(what, where="plan.keep", fix=fix)
    rng = numpy_generator(seed, "noisy table")
    one = records.take(_one_each(records, rng))
    scale = epsilon / sensitivity(plan, most_items)
    label = np.array([targets.index(kept[0]) for kept in one.kept])
    counts = _noisy(np.bincount(label, minlength=len(targets)), scale, rng)
    drawn = np.repeat(np.arange(len(targets)), counts)
    if not len(drawn):
        drawn = np.zeros(1, dtype=np.int64)
    codes = np.zeros((len(drawn), len(plan.identifiers)), dtype=np.int64)
    values = [np.arange(len(cuts) - 1) for cuts in plan.numeric.values()]
    values += [np.array(tree.leaves) for tree in plan.categorical.values()]
    for q, known in enumerate(values):
        for target in range(len(targets)):
            own = one.codes[label == target, q]
            noisy = _noisy(np.array([(own == value).sum() for value in known]), scale, rng).astype(np.float64)
            chance = noisy / noisy.sum() if noisy.sum() else np.full(len(known), 1.0 / len(known))
            rows = drawn == target
            codes[rows, q] = rng.choice(known, size=int(rows.sum()), p=chance)
    items = _items(plan.tree, one, label, drawn, counts, scale, most_items, rng)
    centres = [(np.array(cuts[1:]) + np.array(cuts[:-1])) / 2.0 for cuts in plan.numeric.values()]
    numbers = [centre[codes[:, q]] for q, centre in enumerate(centres)]
    return Records(
        codes=codes,
        numbers=np.array(numbers).T.reshape(len(drawn), len(plan.numeric)),
        items=items,
        kept=tuple((targets[target],) for target in drawn.tolist()),
        units=np.arange(len(drawn)),
    )


def _one_each(records: Records, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a record of each unit, drawn at random."""
    order = rng.permutation(len(records))
    _, first = np.unique(records.units[order], return_index=True)
    return np.sort(order[first])


def _noisy(counts: NDArray[np.int64], scale: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return counts with two-sided geometric noise, P(x) proportional to exp(-scale |x|), negative ones as 0."""
    if math.isinf(scale):
        return counts
    stop = -math.expm1(-scale)
    noise = rng.geometric(stop, counts.shape) - rng.geometric(stop, counts.shape)
    return np.maximum(counts + noise, 0)


def _items(
    tree: Hierarchy | None,
    one: Records,
    label: NDArray[np.int64],
    drawn: NDArray[np.int64],
    counts: NDArray[np.int64],
    scale: float,
    most_items: int,
    rng: np.random.Generator,
) -> tuple[tuple[int, ...], ...]:
    if tree is None:
        return ((),) * len(drawn)
    at = {leaf: number for number, leaf in enumerate(tree.leaves)}
    had = np.zeros((len(counts), len(tree.leaves)), dtype=np.int64)
    for target, leaves in zip(label, one.items, strict=True):
        for number in rng.permutation(len(leaves))[:most_items]:
            had[target, at[leaves[number]]] += 1
    noisy = _noisy(had, scale, rng)
    chance = np.minimum(noisy / np.maximum(counts, 1)[:, None], 1.0)
    chosen = rng.random((len(drawn), len(tree.leaves))) < chance[drawn]
    return tuple(tuple(tree.leaves[number] for number in np.flatnonzero(row)) for row in chosen)
