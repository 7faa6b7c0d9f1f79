"""Who trains, validates and tests: as a file or the rows say, or dealt by patient."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from confrere.data import splits
from confrere.data.images import SiteImages
from confrere.data.options import DataOptions
from confrere.data.register import Registration
from confrere.errors import DataError


def divided(
    sites: list[SiteImages], registration: Registration, options: DataOptions, seed: int, stored: Path | None
) -> tuple[SiteImages, ...]:
    """Return the sites with their split: that of the file ``stored``, else of the rows, else dealt by patient.

    A split that was dealt or read of rows is written to ``stored``.

    Raises:
        DataError: the file does not fit, a patient is in two splits, or a site has nothing to train on.
    """
    keys = [(site.name, digest) for site in sites for digest in site.digests]
    rows = {
        (files.name, f.digest): r
        for files in registration.sites
        for f, r in zip(files.entry.facts, files.rows, strict=True)
    }
    groups = [int(group) for site in sites for group in site.groups]
    if stored is not None and stored.exists():
        chosen, where = splits.read_splits(stored, keys), stored.name
    elif all(rows[key].split is not None for key in keys):
        chosen, where = [splits.NAMES.index(rows[key].split or "train") for key in keys], "column split"
    else:
        chosen, where = _deal(sites, options, seed), "splits"
    splits.check_groups(groups, chosen, where=where)
    if stored is not None and not stored.exists():
        splits.write_splits(stored, [(*key, split) for key, split in zip(keys, chosen, strict=True)])
    flat = np.array(chosen, dtype=np.int8)
    parts = np.split(flat, np.cumsum([len(site.labels) for site in sites])[:-1])
    for site, part in zip(sites, parts, strict=True):
        if not (part == splits.TRAIN).any():
            raise DataError(
                "no image is in train", where=f"site {site.name}", fix="change the split column", code="too-few-images"
            )
    return tuple(replace(site, split=part) for site, part in zip(sites, parts, strict=True))


def _deal(sites: list[SiteImages], options: DataOptions, seed: int) -> list[int]:
    """Split by group; a group's key is its smallest file hash, which no renaming or reordering changes."""
    key: dict[int, str] = {}
    members: dict[str, list[splits.Stratum]] = defaultdict(list)
    for site in sites:
        for group, digest in zip(site.groups.tolist(), site.digests, strict=True):
            key[group] = min(key.get(group, digest), digest)
    for site in sites:
        for group, label in zip(site.groups.tolist(), site.labels.tolist(), strict=True):
            members[key[group]].append((site.name, label))
    result = splits.assign(members, val=options.val, test=options.test, seed=seed)
    return [result[key[int(group)]] for site in sites for group in site.groups]
