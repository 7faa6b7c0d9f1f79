"""Sites and federations as values: arrays of images, labels, patients and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data import splits
from confrere.data.mapped import Mapped
from confrere.data.paths import check_site_name
from confrere.data.sources import SplitName
from confrere.data.view import View
from confrere.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SiteImages:
    """One site's usable images in the order of their hashes, and what is known of each.

    Attributes:
        name: 1 to 64 of ``a-z 0-9 _ -``.
        images: (N, H, W, 3) uint8, mapped from disk; index it with an integer array. Of a table: (N, 1, F) float32; of
            volumes (N, X, Y, Z, 1) float32.
        labels: (N,) int64, index into :attr:`Federation.strata`.
        groups: (N,) int64, opaque patient number, the same for a patient at every site.
        digests: SHA-256 of each file (of an image that a simulated shift changes: of both), hexadecimal.
        split: (N,) int8; 0 train, 1 validation, 2 test.
        targets: what a model learns where that is not the label: masks (N, H, W) or (N, X, Y, Z) uint8, index into
            :attr:`Federation.classes`; boxes (N, most, 5) float32, see :mod:`confrere.data.boxes`; findings (N, K)
            float32, 1, 0 or -1 (not known); or time and event (N, 2) float32. ``target_digests``: one a row.
        named: the ``groups`` that are one patient, named. An image without a patient counts as one of its own; patients
            who share a file are one group.
    """

    name: str
    images: Mapped | View | NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    digests: tuple[str, ...]
    split: NDArray[np.int8]
    targets: View | NDArray[np.float32] | None = None
    target_digests: tuple[str, ...] = ()
    named: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_site_name(self.name)

    def indices(self, split: SplitName) -> NDArray[np.int64]:
        """Return the rows of one split, ascending."""
        return np.flatnonzero(self.split == splits.NAMES.index(split))


@dataclass(frozen=True, kw_only=True)
class Federation:
    """All sites of an experiment.

    Attributes:
        name: shown in reports.
        classes: names of what a model tells apart.
        strata: names, in the order of the labels, by which images are split and drawn: the classes, but of other
            targets what their images are called, their rarest finding, or whether there was an event.
        sites: by name.
        image_size: (height, width) in pixels; (1, F) of a table of F numbers a row; (X, Y, Z) of volumes.
        synthetic: generated, not from patients.
        sheet: the data sheet, JSON-able, without names of files or patients.
        digest: SHA-256 over classes, sites, file hashes, labels, groups and splits.
    """

    name: str
    classes: tuple[str, ...]
    strata: tuple[str, ...]
    sites: tuple[SiteImages, ...]
    image_size: tuple[int, ...]
    synthetic: bool
    sheet: dict[str, Any]
    digest: str

    @property
    def tabular(self) -> bool:
        """Return whether the sites hold rows of numbers."""
        return len(self.sites[0].images.shape) == 3

    def site(self, name: str) -> SiteImages:
        """Return the site called ``name``.

        Raises:
            DataError: there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        known = ", ".join(site.name for site in self.sites)
        raise DataError(
            f"there is no site {name!r}", where=self.name, fix=f"the sites are {known}", code="unknown-site"
        )
