"""Segmentation: its losses and metrics against slow loops, and every method that says it can do it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_files import CLASSES, make_masks, some_fast

from confrere.config import override, validate
from confrere.errors import ConfigError
from confrere.job import run_experiment
from confrere.method import METHODS
from confrere.metrics.masks import evaluate_masks
from confrere.pictures import placed
from confrere.predict import predict_folder
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks.segmentation import SMOOTH, Segmentation, dice_loss, pixel_loss
from confrere.tasks.task import Answers

SMALL: dict[str, Any] = {
    "task": "segmentation",
    "rounds": 3,
    "threads": 1,
    "workers": 1,
    "controls": [],
    "data": {"classes": list(CLASSES)},
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2, "rank": 8},
    "train": {"steps": 2, "batch_size": 4},
}
DENSE = sorted(name for name, cls in METHODS.items() if "mask" in cls.targets and name != "dpfed")  # it has its own


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masks(tmp_path_factory.mktemp("masks") / "hospitals")


def masks(seed: int, images: int, classes: int, side: int = 6) -> np.ndarray:
    rng = numpy_generator(seed, "masks")
    return rng.integers(0, classes, (images, side, side)).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4))
def test_losses_are_those_of_slow_loops(seed: int, images: int, classes: int) -> None:
    truth = masks(seed, images, classes)
    scores = torch.randn(images, classes, 6, 6, generator=torch_generator(seed, "scores"), dtype=torch.float64)
    chances = scores.softmax(1).numpy()
    terms, logs = [], []
    for i, k in itertools.product(range(images), range(1, classes)):
        both = sum(chances[i, k, y, x] for y in range(6) for x in range(6) if truth[i, y, x] == k)
        total = chances[i, k].sum() + (truth[i] == k).sum()
        terms.append(1 - (2 * both + SMOOTH) / (total + SMOOTH))
    for i, y, x in itertools.product(range(images), range(6), range(6)):
        logs.append(-np.log(chances[i, truth[i, y, x], y, x]))
    target = torch.from_numpy(truth)
    assert float(dice_loss(scores, target)) == pytest.approx(np.mean(terms), rel=1e-9)
    assert float(pixel_loss(scores, target)) == pytest.approx(np.mean(logs), rel=1e-9)


def test_losses_are_means_of_images() -> None:
    """So that gradients of single images add up (differential privacy)."""
    truth, scores = torch.from_numpy(masks(0, 5, 3)), torch.randn(5, 3, 6, 6, generator=torch_generator(0, "scores"))
    for name in Segmentation.losses:
        loss = Segmentation().objective(name)
        single = torch.stack([loss(scores[i : i + 1], truth[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(loss(scores, truth), single.mean())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3))
def test_metrics_are_those_of_slow_loops(seed: int, classes: int) -> None:
    truth, guess, groups = masks(seed, 7, classes), masks(seed + 1, 7, classes), np.array([0, 0, 1, 2, 3, 4, 5])
    truth[3] = 0
    found, dice = evaluate_masks(
        guess, truth, groups, classes=[str(k) for k in range(classes)], generator=numpy_generator(0, "x"), resamples=50
    )
    slow: dict[str, list[float]] = {"dice": [], "iou": [], "hd95": [], "box_iou": []}
    for i in range(7):
        values: dict[str, list[float]] = {name: [] for name in slow}
        for k in range(1, classes):
            one = {(y, x) for y in range(6) for x in range(6) if guess[i, y, x] == k}
            two = {(y, x) for y in range(6) for x in range(6) if truth[i, y, x] == k}
            if two:
                values["dice"].append(2 * len(one & two) / (len(one) + len(two)))
                values["iou"].append(len(one & two) / len(one | two))
                values["hd95"].append(reach(one, two) / 72**0.5 if one else 1.0)
                values["box_iou"].append(len(box(one) & box(two)) / len(box(one) | box(two)))
        for name, value in values.items():
            slow[name].append(float(np.mean(value)) if value else np.nan)
    for name, value in slow.items():
        assert found[name]["value"] == pytest.approx(np.nanmean(value), abs=1e-6), name
    np.testing.assert_allclose(dice, slow["dice"])
    assert found["notes"] == ["1 test masks hold background only and are left out."]


def outline(pixels: set[tuple[int, int]]) -> list[tuple[int, int]]:
    around = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return [p for p in pixels if any((p[0] + dy, p[1] + dx) not in pixels for dy, dx in around)]


def reach(one: set[tuple[int, int]], two: set[tuple[int, int]]) -> float:
    sides = []
    for a, b in ((outline(one), outline(two)), (outline(two), outline(one))):
        sides.append(np.percentile([min(np.hypot(p[0] - q[0], p[1] - q[1]) for q in b) for p in a], 95))
    return float(max(sides))


def box(pixels: set[tuple[int, int]]) -> set[tuple[int, int]]:
    if not pixels:
        return set()
    ys, xs = zip(*pixels, strict=True)
    return set(itertools.product(range(min(ys), max(ys) + 1), range(min(xs), max(xs) + 1)))


def test_a_perfect_mask_scores_one_and_none_scores_nothing() -> None:
    truth, task = masks(1, 6, 2), Segmentation()
    right = torch.nn.functional.one_hot(torch.from_numpy(truth).long(), 2).permute(0, 3, 1, 2).float()
    assert task.judge(Answers(outputs=right, targets=truth, groups=np.arange(6))) == (1.0, 1.0)
    score, soft = task.judge(Answers(outputs=1 - right, targets=truth, groups=np.arange(6)))
    assert score == soft < 0.1
    nothing, _ = evaluate_masks(
        np.zeros_like(truth), truth, np.arange(6), classes=CLASSES, generator=numpy_generator(0, "x")
    )
    assert [nothing[name]["value"] for name in ("dice", "hd95", "box_iou")] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("method", some_fast(DENSE, ("fedopal", "fedper", "scaffold", "flexlora", "ifca", "pooled")))
def test_every_method_that_can_trains_and_predicts_masks(place: Path, tmp_path: Path, method: str) -> None:
    run_experiment(validate(override({**SMALL, "path": str(place)}, [f"method={method}"])), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["headline"] == "dice"
    models = [m for site in results["sites"].values() for m in site["models"].values() if m]
    assert len(models) >= 3
    assert all(0 <= model["dice"]["value"] <= 1 for model in models)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (["method=ridge"], "method.name"),
        (["train.loss=focal"], "train.loss"),
        (["train.balance=weights"], "train.balance"),
        (["data.target=label"], "data.target"),
        (["task=classification", "data.target=mask"], "data.target"),
        (["task=segment"], "task"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override({**SMALL, "path": "nowhere"}, changes))
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.slow
def test_learns_from_masks_resumes_and_predicts_files(place: Path, tmp_path: Path) -> None:
    """Bright discs are found far better than by chance; a mask has the size and the place of its image."""
    changes = [
        "rounds=4",
        "train.steps=20",
        "train.batch_size=8",
        "train.lr=3e-3",
        'controls=["local"]',
        "train.views=8",
    ]
    run_experiment(validate(override({**SMALL, "path": str(place)}, changes)), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["summary"]["personalised"]["mean"] > 0.5
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert "mean change in Dice" in verdicts["headline"]
    images = place / "north" / "images"
    count, problems = predict_folder(tmp_path / "run", "north", images, tmp_path / "found.csv", overlays=2)
    assert (count, problems) == (24, [])
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert lines[0] == "file,background,disc"
    made = sorted((tmp_path / "found_masks").iterdir())
    assert len(made) == len(lines) - 1
    assert len(list((tmp_path / "found_overlays").iterdir())) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from([(8, 8), (8, 16), (12, 6)]))
def test_a_mask_returns_to_its_place(height: int, width: int, size: tuple[int, int]) -> None:
    """What the model saw is the centre; outside of it there is background, and nothing is shifted."""
    found = placed(np.ones(size, np.uint8), (height, width))
    assert found.shape == (height, width)
    scale = min(height / size[0], width / size[1])
    rows, columns = found.any(1).sum(), found.any(0).sum()
    assert abs(rows - scale * size[0]) <= 1
    assert abs(columns - scale * size[1]) <= 1
    assert abs(found.any(1).argmax() - (height - rows) / 2) <= 1
