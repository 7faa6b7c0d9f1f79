"""What ``confrere onboard`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADER = ("model", "loss", "balanced accuracy", "AUROC", "")


def table(found: Mapping[str, Any]) -> str:
    """Return the candidates as lines of text: loss on the known images, then test metrics with 95 % intervals, in %."""
    rows = [_HEADER]
    for name, entry in found["candidates"].items():
        chosen = "chosen" if name == found["chosen"] else ""
        scores = (_score(entry["metrics"][key]) for key in ("balanced_accuracy", "auroc"))
        rows.append((name, f"{entry['loss']:.3f}", *scores, chosen))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    used = sum(found["images"].values())
    left = f", {found['left_out']} more of known patients left out" if found["left_out"] else ""
    lines += [f"Chosen by cross-validated loss on {used} images; tested on {found['test_images']} others{left}."]
    return "\n".join([*lines, found["sentence"]])


def _score(entry: Mapping[str, float | None]) -> str:
    value, low, high = (entry[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (
        f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    )
