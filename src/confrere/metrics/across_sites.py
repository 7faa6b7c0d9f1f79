"""One number per hospital in, the picture over hospitals out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from confrere.errors import DataError


def summary(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the unweighted mean, the worst (lowest) value and site, and the spread (highest minus lowest).

    Every hospital counts the same, however large. Sites whose value is None are left out and listed under
    ``undefined``; without any defined value the rest is None.

    Raises:
        DataError: a value is NaN or infinite.

    >>> summary({"a": 0.5, "b": 0.75, "c": None})
    {'mean': 0.625, 'worst': 0.5, 'worst_site': 'a', 'spread': 0.25, 'undefined': ['c']}
    """
    defined = {site: float(value) for site, value in values.items() if value is not None}
    for site, value in defined.items():
        if not math.isfinite(value):
            raise DataError(
                f"the value {value} is not finite",
                where=f"site {site}",
                fix="give None if undefined",
                code="metric-input",
            )
    undefined = [site for site in values if site not in defined]
    if not defined:
        return {"mean": None, "worst": None, "worst_site": None, "spread": None, "undefined": undefined}
    worst = min(defined, key=lambda site: defined[site])
    return {
        "mean": sum(defined.values()) / len(defined),
        "worst": defined[worst],
        "worst_site": worst,
        "spread": max(defined.values()) - defined[worst],
        "undefined": undefined,
    }
