"""A site's rank by memory and images: bounds, powers of two, refusals."""

from __future__ import annotations

import pytest
import torch

from confrere.adapters.ranks import rank_for, rank_of
from confrere.errors import ConfigError

SIZES = {"q": (300, 200), "v": (300, 200)}  # 1000 parameters a unit of rank, 16 kB with AdamW's states
PLENTY = 10**9


@pytest.mark.parametrize(
    ("memory_mb", "rank"), [(0.016, 1), (0.031, 1), (0.032, 2), (0.1, 4), (0.128, 8), (1e6, 64), (float("inf"), 64)]
)
def test_memory_bounds_the_rank(memory_mb: float, rank: int) -> None:
    assert rank_for(PLENTY, memory_mb, sizes=SIZES) == rank


@pytest.mark.parametrize(("images", "rank"), [(0, 1), (20, 1), (39, 1), (40, 2), (100, 4), (320, 16), (PLENTY, 64)])
def test_images_bound_the_rank(images: int, rank: int) -> None:
    """50 parameters an image: 20 images a unit of rank."""
    assert rank_for(images, 1e6, sizes=SIZES) == rank


def test_options_move_the_bounds() -> None:
    assert rank_for(320, 1e6, sizes=SIZES, highest=8) == 8
    assert rank_for(0, 1e6, sizes=SIZES, lowest=4) == 4
    assert rank_for(320, 1e6, sizes=SIZES, parameters_per_image=25.0) == 8
    assert rank_for(320, 0.128, sizes=SIZES, bytes_per_parameter=32) == 4
    assert rank_for(320, 1e6, sizes={**SIZES, "k": (500, 500)}) == 8  # twice the parameters a unit


@pytest.mark.parametrize(
    ("images", "memory_mb", "options", "says"),
    [
        (100, 0.015, {}, r"0\.016 MB"),
        (100, float("nan"), {}, "do not hold"),
        (100, 0.1, {"lowest": 8}, r"0\.128 MB"),
        (100, 1.0, {"highest": 12}, "power of two"),
        (100, 1.0, {"lowest": 0}, "power of two"),
        (100, 1.0, {"lowest": 8, "highest": 4}, "bounds"),
        (-1, 1.0, {}, "bounds"),
        (100, 1.0, {"sizes": {}}, "layers"),
        (100, 1.0, {"parameters_per_image": 0.0}, "bounds"),
    ],
)
def test_what_cannot_be_is_refused(images: int, memory_mb: float, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rank_for(images, memory_mb, **{"sizes": SIZES, **options})  # type: ignore[arg-type]


def test_the_rank_of_tensors_is_their_largest() -> None:
    tensors = {f"{x}.lora_A.general.weight": torch.zeros(r, 5) for x, r in (("q", 2), ("v", 3))}
    tensors |= {"q.lora_B.general.weight": torch.zeros(9, 2), "q.lora_A.personal.weight": torch.zeros(7, 5)}
    assert rank_of(tensors) == 3
    assert rank_of(tensors, "personal") == 7
    assert rank_of(tensors, "residual") == 0
