"""The data sets of a comparison: each one's name, digest and experiment."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.errors import ConfigError
from confrere.opening import open_data

OWN = ("data.", "split_seed", "hold_out", "adapter.ranks.", "backbone.depths.", "attack.sites")
"""What data sets of one comparison may differ in: how their files are read, and what names their sites."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One federation that all methods are trained on.

    Args:
        name: unique in the comparison. digest: of images, labels, patients and split. facts: for the report.
        experiment: what is the same for all trainings on it.
    """

    name: str
    digest: str
    experiment: Experiment
    facts: dict[str, Any]


def own_choices(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Return for each data set the choices that are not the same for all, by dotted key.

    Raises:
        ConfigError: two are the same data, or differ in a choice that is none of the data's own.
    """
    flat = [{key.removeprefix("experiment."): v for key, v in one.choices().items()} for one in experiments]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if _differs(flat, key)]
    for key in keys:
        if not key.startswith(OWN):
            fix = "set it once for all, after the data; a data set's file says how its data are read"
            raise ConfigError(
                "the data sets of one comparison cannot differ in this", where=key, fix=fix, code="comparison"
            )
    own = [{key: one.get(key) for key in keys} for one in flat]
    given = [(one.path, choices) for one, choices in zip(experiments, own, strict=True)]
    if any(one in given[:number] for number, one in enumerate(given)):
        raise ConfigError(
            "a data set is named twice",
            where="DATA",
            fix="name each once, or read them differently",
            code="named-twice",
        )
    return own


def _differs(flat: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(one.get(key) != flat[0].get(key) for one in flat)


def open_sets(experiments: Sequence[Experiment], names: Sequence[str] = ()) -> list[DataSet]:
    """Return the data sets of ``experiments``; those of equal names are numbered.

    Args:
        experiments: one for each.
        names: what each is called; an empty one is called what its federation is.

    Raises:
        ConfigError: see :func:`own_choices`. DataError: data cannot be used as they are.
    """
    own = own_choices(experiments)
    found = []
    for experiment in experiments:
        with tempfile.TemporaryDirectory() as scratch:  # the split is drawn anew: changed data are other data
            found.append(open_data(experiment, Path(scratch)))
    called = [given or one.name for given, one in zip(names or [""] * len(found), found, strict=True)]
    seen: Counter[str] = Counter()
    sets = []
    for name, experiment, federation, choices in zip(called, experiments, found, own, strict=True):
        seen[name] += 1
        facts = {
            "synthetic": federation.synthetic,
            "classes": list(federation.classes),
            "digest": federation.digest,
            "sites": [site.name for site in federation.sites],
            "own": choices,
        }
        unique = f"{name}-{seen[name]}" if called.count(name) > 1 else name
        sets.append(DataSet(name=unique, digest=federation.digest, experiment=experiment, facts=facts))
    return sets


def origins(sets: Sequence[DataSet]) -> dict[str, str]:
    """Return the first data set with the same files, for each data set."""
    first: dict[str, str] = {}
    return {one.name: first.setdefault(one.experiment.path, one.name) for one in sets}
