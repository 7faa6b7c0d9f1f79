"""What training reads of a site, to find out where it is what it was: with patients gone, also others may change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data.federation import Federation, SiteImages
from confrere.data.splits import TRAIN, VAL


def learnt(site: SiteImages, rows: NDArray[np.int64]) -> Any:
    """Return what training reads of some images, so that it can be compared: also what others there change in it.

    A table's rows are standardised by all of them, and simulated shifts draw among all.
    """
    targets = [site.target_digests[i] for i in rows] if site.target_digests else _bytes(site.targets, rows)
    numbers = _bytes(site.images, rows) if len(site.images.shape) == 3 else b""
    return [site.digests[i] for i in rows], site.labels[rows].tolist(), targets, numbers


def changed_sites(before: Federation | None, after: Federation) -> set[str]:
    """Return the sites where training, or the judgement of rounds, reads something else than before, or that are gone.

    None for ``before``: the data of a site that is forgotten are gone already, all others are what they were.
    """
    left = {site.name: site for site in after.sites}
    sites = before.sites if before else ()
    return {site.name for site in sites if site.name not in left or _judged(site) != _judged(left[site.name])}


def _judged(site: SiteImages) -> Any:
    return [learnt(site, np.flatnonzero(site.split == part)) for part in (TRAIN, VAL)]


def _bytes(values: Any, rows: NDArray[np.int64]) -> bytes:
    return b"" if values is None else np.asarray(values[rows]).tobytes()
