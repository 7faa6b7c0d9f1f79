"""What the audit ``attribute`` asks: columns of a table that can be guessed, and which hospital somebody was at.

Shapes: N rows, F columns, V values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confrere.audits.audit import Choice
from confrere.audits.references import audited_rows
from confrere.audits.tapped import AuditedRun
from confrere.data.numbers import read_numbers
from confrere.data.splits import TRAIN
from confrere.errors import ConfigError, nearest
from confrere.tokenset import TokenSet, as_numpy

Whole = NDArray[np.int64]
SITE, MOST = "site", 8
"""The attribute that every federation has; most values that are tried."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One attribute at one site: rows (N,), the number of the true value of each (N,), the most common value is 0.

    ``guesses``: V sets of these rows, with the attribute set to each value; empty if the attribute is the site.
    """

    name: str
    site: str
    rows: Whole
    truth: Whole
    guesses: tuple[TokenSet, ...] = ()


def attributes(columns: Sequence[str], table: NDArray[np.float64]) -> dict[str, list[int]]:
    """Return by name the columns (of N rows, NaN where missing) that can be guessed: of 2 to 8 values.

    Columns ``NAME_a``, ``NAME_b``, ... of which each row has one 1 and else 0 are one attribute, ``NAME``: of all but
    one of them the last would follow.
    """
    found: dict[str, list[int]] = {}
    for index, column in enumerate(columns):
        found.setdefault(column.rpartition("_")[0] or column, []).append(index)
    made = dict[str, list[int]]()
    for stem, group in found.items():
        known = table[:, group][~np.isnan(table[:, group]).any(1)]
        if len(group) > 1 and len(known) and np.isin(known, (0.0, 1.0)).all() and (known.sum(1) == 1).all():
            made[stem] = group
        else:
            made |= {columns[index]: [index] for index in group}
    return {name: one for name, one in made.items() if len(one) > 1 or 2 <= _values(table[:, one[0]]) <= MOST}


def _values(column: NDArray[np.float64]) -> int:
    return len(np.unique(column[~np.isnan(column)]))


def of_column(run: AuditedRun, site: str, name: str, columns: Sequence[int], choice: Choice) -> Question | None:
    """Return what is asked of a site's patients whose value is known; None where all or nobody have the same."""
    table, data = np.asarray(run.federation.site(site).images[:]), run.data[site]
    width, columns = table.shape[2] // 2, list(columns)  # values, then whether each is missing
    known = (table[:, 0, [width + c for c in columns]] == 0).all(1)
    values, at = np.unique(table[known][:, 0, columns], axis=0, return_inverse=True)
    held = at[(data.split != TRAIN)[known]]
    order = np.argsort(-np.bincount(held, minlength=len(values)), kind="stable")
    number = np.full(len(table), -1)
    number[known] = np.argsort(order)[at]
    rows = audited_rows(run, site, choice)
    rows = rows[known[rows]]
    if len(values) < 2 or not len(rows):
        return None
    guesses, own = [], replace(data, labels=data.labels[rows], groups=data.groups[rows], split=data.split[rows])
    for value in values[order]:
        changed = table[rows]
        changed[:, 0, columns] = value
        guesses.append(replace(own, tokens=as_numpy(run.task.backbone_of(site).prefix(changed))))
    return Question(name=name, site=site, rows=rows, truth=number[rows], guesses=tuple(guesses))


def of_site(run: AuditedRun, site: str, choice: Choice) -> Question:
    """Return which hospital is asked of a site's patients."""
    rows = audited_rows(run, site, choice)
    return Question(name=SITE, site=site, rows=rows, truth=np.full(len(rows), by_size(run).index(site)))


def by_size(run: AuditedRun) -> list[str]:
    """Return the sites, those of most held-out patients first."""
    held = {site: len(np.unique(run.data[site].groups[run.data[site].split != TRAIN])) for site in run.sites}
    return sorted(run.sites, key=lambda site: -held[site])


def questions(run: AuditedRun, choice: Choice) -> dict[str, list[Question]]:
    """Return what is asked, by attribute: that of the choice, or all there are.

    Raises:
        ConfigError: there is no such attribute, or nothing that could be guessed.
    """
    named, made = choice.attribute, dict[str, list[Question]]()
    known: Mapping[str, list[int]] = {}
    if run.federation.tabular:
        read = read_numbers(Path(run.experiment.path), run.experiment.data)
        known = attributes(read.listing.columns, np.array(list(read.values.values()), dtype=np.float64))
    several = [SITE] if len(run.sites) > 1 and not run.experiment.backbone.depths else []
    if named and named not in (*known, *several):
        what = f"{named!r} cannot be guessed: it is no column of 2 to {MOST} values"
        what += "" if run.federation.tabular else ", of which images have none"
        raise ConfigError(what, where="--attribute", fix=nearest(named, [*known, *several]), code="audit")
    for name in [named] if named else [*known, *several]:
        columns = known.get(name)
        each = [of_column(run, s, name, columns, choice) if columns else of_site(run, s, choice) for s in run.sites]
        made |= {name: [one for one in each if one is not None]} if any(each) else {}
    if not made:
        what, fix = "there is one site, and no column of few values that differ", "audit a run of several sites"
        raise ConfigError(what, where="attribute", fix=fix, code="audit")
    return made
