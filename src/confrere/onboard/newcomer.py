"""A new hospital's images: the few that are labelled for it, in folds, and the rest, which test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from confrere.config import Experiment
from confrere.data.federation import SiteImages, load_federation
from confrere.data.options import DataOptions
from confrere.data.paths import slug
from confrere.data.table import read_rows
from confrere.errors import ConfigError, DataError
from confrere.prefix import cache_dir
from confrere.record.files import read_json
from confrere.seeds import numpy_generator

_FOLDS = 4
_UNUSED = 3  # a code of no split


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """One site and its draw.

    Attributes:
        site: its images; labels are those of the run's classes.
        known: (k,) rows with labels to use, ascending. folds: (k,) the fold of each, 0..; a patient is in one.
        test: rows of patients of whom nothing is known. Other images of known patients are in neither.
    """

    site: SiteImages
    known: np.ndarray
    folds: np.ndarray
    test: np.ndarray

    def split(self, fold: int | None) -> np.ndarray:
        """Return (N,): 0 for the known images outside of ``fold`` (all for None), 1 for those in it, 2 for test."""
        split = np.full(len(self.site.labels), _UNUSED, dtype=np.int8)
        split[self.known] = self.folds == fold if fold is not None else 0
        split[self.test] = 2
        return split


def newcomer(
    run: Path, experiment: Experiment, data: Path, name: str, images: int, seed: int, info: Mapping[str, Any]
) -> Newcomer:
    """Read a site that took no part in ``run`` and draw its images.

    Data of the run itself (a held-out site) are read as the run read them, with simulated shifts of pixels and names.

    Raises:
        ConfigError: no such site, or several to choose from.
        DataError: it took part in the run, has classes the run lacks, or too few images.
    """
    trained = {s for s, entry in read_json(run / "results.json")["sites"].items() if not entry["held_out"]}
    own = data.resolve() == Path(experiment.path).resolve()
    options = experiment.data if own else DataOptions(max_pixels=experiment.data.max_pixels)
    shifts = tuple(s for s in options.shift if s.kind in ("scanner", "stain", "concept"))
    options = options.model_copy(update={"image_size": tuple(info["image_size"]), "shift": shifts})
    federation = load_federation(
        data,
        options=options,
        image_size=tuple(info["image_size"]),
        seed=experiment.split_seed,
        cache=cache_dir(),
        splits=run / "splits.csv" if own else None,
    )
    names = [site.name for site in federation.sites if not (own and site.name in trained)]
    if name and slug(name) not in names:
        took = own and slug(name) in trained
        what = f"{slug(name)!r} {'took part in the run' if took else 'is no site of the data'}"
        raise ConfigError(
            what, where="--site", fix=f"use one of: {', '.join(names) or 'none: bring new data'}", code="onboarding"
        )
    if len(names) != 1 and not name:
        fix = f"name one with --site: {', '.join(names)}" if names else "hold one out, or bring new data"
        raise ConfigError(
            f"{len(names)} sites of the data took no part in the run", where=str(data), fix=fix, code="onboarding"
        )
    site = _relabelled(federation.site(slug(name) if name else names[0]), federation.classes, info["classes"])
    if federation.tabular:
        raise DataError(
            "the data are rows of numbers",
            where=str(data),
            fix="only hospitals with images can arrive",
            code="onboarding",
        )
    _refuse_known_pictures(run, site, trained)
    known, test = draw(site.labels, site.groups, images, seed, site.name)
    return Newcomer(site=site, known=known, folds=folds(site.labels[known], site.groups[known]), test=test)


def _relabelled(site: SiteImages, classes: tuple[str, ...], wanted: list[str]) -> SiteImages:
    unknown = [classes[k] for k in np.unique(site.labels) if classes[k] not in wanted]
    if unknown:
        fix = f"rename it to one of {', '.join(wanted)}, or leave its images out"
        raise DataError(f"the run knows no class {unknown[0]!r}", where=f"site {site.name}", fix=fix, code="onboarding")
    new = np.array([wanted.index(name) if name in wanted else -1 for name in classes], dtype=np.int64)
    return replace(site, labels=new[site.labels])


def _refuse_known_pictures(run: Path, site: SiteImages, trained: set[str]) -> None:
    rows = read_rows(run / "splits.csv", ["site", "sha256"])
    seen = {cells["sha256"] for _, cells in rows if cells["site"] in trained}
    copies = len(seen & set(site.digests))
    if copies:
        fix = "only images that no model has seen can judge one"
        raise DataError(
            f"{copies} of its images took part in the run", where=f"site {site.name}", fix=fix, code="onboarding"
        )


def draw(labels: np.ndarray, groups: np.ndarray, k: int, seed: int, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ``k`` rows, as evenly over classes as possible, and the rows of all patients who are not among them.

    A class gives images patient by patient, and at most half of its patients, so that all classes can be tested.

    Raises:
        DataError: fewer than ``k`` images can be given, from two patients at least, or nothing is left to test on.
    """
    queues = []
    for label in np.unique(labels):
        patients = np.unique(groups[labels == label])
        order = numpy_generator(seed, "onboard", site, int(label)).permutation(patients)
        pool = order[: len(order) // 2]
        queues.append([row for patient in pool for row in np.flatnonzero((labels == label) & (groups == patient))])
    room = sum(map(len, queues))
    if not 2 <= k <= room:
        fix = f"use 2 to {room}: at most half of each class's patients are used" if room >= 2 else "bring more images"
        raise DataError(f"{k} images cannot be drawn at {site}", where="--images", fix=fix, code="onboarding")
    turns = (queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue))
    known = np.sort([row for row, _ in zip(turns, range(k), strict=False)])
    test = np.flatnonzero(~np.isin(groups, groups[known]))
    if not len(test) or len(np.unique(groups[known])) < 2:
        raise DataError(
            "too few patients to choose by some and test on others",
            where=f"site {site}",
            fix="bring more",
            code="onboarding",
        )
    return known, test


def folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the fold of each image, at most 4: patients are dealt out class by class, so that folds resemble."""
    first = {group: (int(labels[groups == group][0]), group) for group in groups.tolist()}
    order = sorted(first, key=lambda group: first[group])
    number = {group: index % min(_FOLDS, len(order)) for index, group in enumerate(order)}
    return np.array([number[group] for group in groups.tolist()])
