"""The data sets of a comparison: each one's name, digest and experiment."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.job import open_data


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


def open_sets(experiments: Sequence[Experiment]) -> list[DataSet]:
    """Return the data sets of ``experiments``; those of equal names are numbered.

    Raises:
        DataError: data cannot be used as they are.
    """
    found = []
    for experiment in experiments:
        with tempfile.TemporaryDirectory() as scratch:  # the split is drawn anew: changed data are other data
            found.append(open_data(experiment, Path(scratch)))
    names = Counter(federation.name for federation in found)
    seen: Counter[str] = Counter()
    sets = []
    for experiment, federation in zip(experiments, found, strict=True):
        name = federation.name
        seen[name] += 1
        sets.append(
            DataSet(
                name=f"{name}-{seen[name]}" if names[name] > 1 else name,
                digest=federation.digest,
                experiment=experiment,
                facts={
                    "synthetic": federation.synthetic,
                    "classes": list(federation.classes),
                    "digest": federation.digest,
                    "sites": [site.name for site in federation.sites],
                },
            )
        )
    return sets
