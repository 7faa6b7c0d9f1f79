from __future__ import annotations

import pytest

from confrere.errors import DataError
from confrere.metrics import summary


def test_undefined_sites_are_left_out_and_named():
    assert summary({"b": 0.5, "a": None, "c": 0.75}) == {
        "mean": 0.625,
        "worst": 0.5,
        "worst_site": "b",
        "spread": 0.25,
        "undefined": ["a"],
    }


@pytest.mark.parametrize("values", [{}, {"a": None}])
def test_nothing_defined(values):
    out = summary(values)
    assert out.pop("undefined") == list(values)
    assert set(out.values()) == {None}


def test_nan_is_refused():
    with pytest.raises(DataError, match="not finite"):
        summary({"a": float("nan")})
