"""The data sheet: what is known of each site without naming a file or a patient."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data.cache import Fact
from confrere.data.dicom import note_warnings
from confrere.data.dicom_checks import in_short
from confrere.data.register import CONFLICT, DUPLICATE
from confrere.data.sources import Problem
from confrere.data.splits import NAMES

_OUTLIER_SD = 3.0
# Of a few sites that happen to agree, the sd says little; 3 x 5 of 255 levels is a difference one sees.
_LEAST_SD = 5.0


def site_sheet(
    facts: Sequence[Fact],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    split: NDArray[np.int8],
    classes: Sequence[str],
    problems: Iterable[Problem],
) -> dict[str, Any]:
    """Return one site's part of the sheet; all values are JSON-able, sizes in pixels, colours in 0..255."""
    table = np.zeros((len(classes), 3), dtype=int)
    np.add.at(table, (labels, split), 1)
    mean = np.mean([fact.mean for fact in facts], axis=0)
    variance = np.mean([fact.square for fact in facts], axis=0) - mean**2
    reasons = Counter(in_short(problem.reason) for problem in problems)
    duplicates, conflicts = reasons.pop(DUPLICATE, 0), reasons.pop(CONFLICT, 0)
    return {
        "images": len(facts),
        "patients": len(set(groups.tolist())),
        "splits": {
            name: {
                "images": int((split == i).sum()),
                "patients": len(set(groups[split == i].tolist())),
            }
            for i, name in enumerate(NAMES)
        },
        "classes": {
            name: dict(zip(NAMES, map(int, row), strict=True)) | {"total": int(row.sum())}
            for name, row in zip(classes, table, strict=True)
        },
        "original_width": [min(fact.width for fact in facts), max(fact.width for fact in facts)],
        "original_height": [min(fact.height for fact in facts), max(fact.height for fact in facts)],
        "channel_mean": [round(float(v) * 255, 2) for v in mean],
        "channel_std": [round(float(v) * 255, 2) for v in np.sqrt(np.maximum(variance, 0))],
        "formats": dict(sorted(Counter(fact.format for fact in facts).items())),
        "bad_files": dict(sorted(reasons.items())),
        "notes": dict(sorted(Counter(note for fact in facts for note in fact.notes).items())),
        "duplicates": duplicates,
        "conflicts": conflicts,
        "outlier": False,
    }


def findings_sheet(truth: NDArray[np.float32], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return of each finding on how many images it is present, absent or unknown; ``truth`` (N, K) is 1, 0 or -1."""
    kinds = {"present": 1, "absent": 0, "unknown": -1}
    return {
        name: {kind: int((column == value).sum()) for kind, value in kinds.items()}
        for name, column in zip(classes, truth.T, strict=True)
    }


def boxes_sheet(boxes: NDArray[np.float32], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the boxes of each class but the background, and the images with at least one; ``boxes`` (N, most, 5)."""
    found = {name: boxes[..., 4] == k for k, name in enumerate(classes) if k}
    return {name: {"boxes": int(one.sum()), "images": int(one.any(1).sum())} for name, one in found.items()}


def mark_outliers(sites: Mapping[str, dict[str, Any]]) -> list[str]:
    """Set ``outlier`` where a site's mean intensity is over 3 sd from the others'; needs 3 others."""
    means = {name: float(np.mean(sheet["channel_mean"])) for name, sheet in sites.items()}
    marked = []
    for name, value in means.items():
        others = [other for key, other in means.items() if key != name]
        if len(others) < 3:
            continue
        far = abs(value - np.mean(others)) > _OUTLIER_SD * max(float(np.std(others, ddof=1)), _LEAST_SD)
        sites[name]["outlier"] = bool(far)
        marked += [name] if far else []
    return marked


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Return the sets of class names that differ only by case, spaces, hyphens or underscores."""
    alike: dict[str, set[str]] = defaultdict(set)
    for name in names:
        alike[re.sub(r"[\s_-]+", "", name).casefold()].add(name)
    return [sorted(group) for _, group in sorted(alike.items()) if len(group) > 1]


def class_warnings(sites: Mapping[str, dict[str, Any]], classes: Sequence[str], minimum: int) -> list[str]:
    """Return sentences on classes that are rare, absent, at one site only, or spelt in two ways."""
    warnings = []
    for group in similar_names(classes):
        others = ", ".join(f'"{name}" = "{group[0]}"' for name in group[1:])
        warnings.append(
            f"The classes {' and '.join(repr(name) for name in group)} differ only in spelling and are kept "
            f"apart; if they are one class, give 'data.class_map={{{others}}}'."
        )
    if "masks" in classes:
        warnings.append("A class is called 'masks': if these are masks of the images, give task=segmentation.")
    for name in classes:
        totals = {site: sheet["classes"][name]["total"] for site, sheet in sites.items()}
        holders = [site for site, total in totals.items() if total]
        if not holders:
            warnings.append(f"No site has an image of class {name!r}.")
        elif len(holders) == 1 and len(sites) > 1:
            warnings.append(f"Only {holders[0]} has images of class {name!r}; the others cannot be tested on it.")
        if holders and sum(totals.values()) < minimum:
            warnings.append(f"Class {name!r} has fewer than {minimum} images over all sites.")
    return warnings


def site_warnings(sites: Mapping[str, dict[str, Any]], *, classes: bool = True) -> list[str]:
    """Return sentences on sites that cannot be tested, look different, or lost files; ``classes``: those are learnt."""
    warnings = []
    for name, sheet in sites.items():
        for split in ("val", "test"):
            if sheet["splits"][split]["images"] == 0:
                warnings.append(f"{name} has no image for {'validation' if split == 'val' else 'test'}.")
        if classes and sum(count["total"] > 0 for count in sheet["classes"].values()) == 1:
            warnings.append(f"{name} has images of one class only; measures that need two stay undefined there.")
        if bad := sum(sheet["bad_files"].values()):
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sheet["bad_files"].items())
            warnings.append(f"{name}: {bad} files are left out ({reasons}).")
        warnings += note_warnings(name, sheet["notes"])
        if sheet["conflicts"]:
            warnings.append(f"{name}: {sheet['conflicts']} files are left out because a copy has another label.")
    for name in mark_outliers(sites):
        warnings.append(f"The images of {name} are much brighter or darker than those of the other sites.")
    return warnings
