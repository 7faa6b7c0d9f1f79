"""Ranks are suggested from training images and memory."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from confrere.errors import ConfigError
from confrere.ranks import suggest

SETTINGS = ["backbone.name=test-vit", "adapter.blocks=2"]


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for site, count in (("north", 200), ("south", 20), ("west", 4)):
        for label in ("benign", "malignant"):
            folder = tmp_path / "data" / site / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


def test_more_images_and_more_memory_give_a_higher_rank(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(hospitals.parent / "cache"))
    line = suggest(hospitals, ["100"], SETTINGS)[-1]
    ranks = tomllib.loads(line)["adapter"]["ranks"]
    assert ranks["north"] > ranks["south"] >= 1
    little = tomllib.loads(suggest(hospitals, ["100", "north=0.05"], SETTINGS)[-1])["adapter"]["ranks"]
    assert little["north"] < ranks["north"]
    assert little["south"] == ranks["south"]


@pytest.mark.parametrize(("method", "lowest"), [("local", 1), ("sdflora", 2), ("hilora", 4)])
def test_every_adapter_of_the_method_gets_a_rank(
    hospitals: Path, method: str, lowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """West has images for no rank at all; an experiment refuses a rank below the method's number of adapters."""
    monkeypatch.setenv("CONFRERE_CACHE", str(hospitals.parent / "cache"))
    ranks = tomllib.loads(suggest(hospitals, ["100"], [*SETTINGS, f"method={method}"])[-1])["adapter"]["ranks"]
    assert ranks["west"] == lowest
    named = suggest(hospitals, ["100"], [*SETTINGS, f"method.name={method}"])[-1]
    assert tomllib.loads(named)["adapter"]["ranks"] == ranks
    with pytest.raises(ConfigError, match=f"rank {lowest}"):
        suggest(hospitals, ["0.001"], [*SETTINGS, f"method={method}"])


@pytest.mark.parametrize(("method", "able"), [("local", True), ("flexlora", True), ("hilora", False)])
def test_a_method_that_cannot_carry_different_ranks_is_told_apart(
    hospitals: Path, method: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites can bear the smallest of the ranks; and the line says which methods it is for."""
    monkeypatch.setenv("CONFRERE_CACHE", str(hospitals.parent / "cache"))
    lines = suggest(hospitals, ["100"], [*SETTINGS, f"method={method}"])
    text = "\n".join(lines)
    assert ("cannot carry different ranks" in text) == (not able)
    if not able:
        ranks = tomllib.loads(lines[-1])["adapter"]["ranks"]
        assert f"{method} cannot carry different ranks. All sites bear adapter.rank = {min(ranks.values())}." in lines
        assert "flexlora" in lines[-2]


@pytest.mark.parametrize(
    ("memory", "said"),
    [(["east=3"], "no site 'east'"), (["much"], "'much' is no number"), (["north=9"], "no memory is given for south")],
)
def test_mistakes_are_named(hospitals: Path, memory: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(hospitals.parent / "cache"))
    with pytest.raises(ConfigError, match=said):
        suggest(hospitals, memory, SETTINGS)
