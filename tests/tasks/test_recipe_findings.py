"""The recipe of several findings: what is written of an image, and which lesions are drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def recipe() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        return importlib.import_module("findings")


def row(lesion: int, dx: str, how: str = "histo", where: str = "face", site: str = "a") -> dict[str, str]:
    return {
        "lesion_id": f"l{lesion:03d}",
        "image_id": f"i{lesion:03d}",
        "dx": dx,
        "dx_type": how,
        "localization": where,
        "site": site,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("mel", "histo", "back"), ["malignant", "melanocytic", "trunk"]),
        (("bcc", "confocal", "face"), ["malignant"]),
        (("nv", "follow_up", "unknown"), ["melanocytic", "?trunk"]),
        (("bkl", "consensus", "chest"), ["?malignant", "trunk"]),
        (("df", "histo", "foot"), []),
    ],
)
def test_what_nobody_said_is_not_known(recipe: Any, given: tuple[str, str, str], expected: list[str]) -> None:
    assert list(recipe.said(row(0, *given))) == expected


def test_quarters_of_a_site_and_each_lesion_once(recipe: Any) -> None:
    kinds = ["nv"] * 60 + ["mel"] * 20 + ["bkl"] * 3
    rows = [row(number, dx) for number, dx in enumerate(kinds)] + [row(5, "nv"), row(200, "mel", site="b")]
    found = recipe.drawn(rows, "a", 40)
    assert len({one["lesion_id"] for one in found}) == len(found) == 40
    assert [sum(one["dx"] == dx for one in found) for dx in ("mel", "bkl", "nv")] == [10, 3, 27]
    assert found == recipe.drawn(rows, "a", 40)
    assert len(recipe.drawn(rows, "b", 40)) == 1
