"""Detection: head, assignment, losses and suppression against slow loops, and every method that says it can do it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_files import CLASSES, make_masks, some_fast
from PIL import Image

from confrere.config import override, validate
from confrere.data.boxes import around
from confrere.errors import ConfigError
from confrere.job import run_experiment
from confrere.pictures import framed
from confrere.predict import predict_folder
from confrere.report import summarize, write_report
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks.detection import (
    FOUND,
    LEAST,
    OVERLAP,
    RADIUS,
    SIDES,
    Detection,
    assign,
    best_temperature,
    centres,
    decode,
    giou,
    heated,
    suppressed,
)
from confrere.tasks.task import Answers

SMALL: dict[str, Any] = {
    "task": "detection",
    "rounds": 3,
    "threads": 1,
    "workers": 1,
    "controls": [],
    "data": {"classes": list(CLASSES)},
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2, "rank": 8},
    "train": {"steps": 1, "batch_size": 4},
}
# All methods but those that look at heads themselves learn masks, too (test_segmentation): some of each family here.
SOME = ["fedacs", "fedit", "fedopal", "fedper", "flora", "hilora", "local", "pooled", "scaffold"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masks(tmp_path_factory.mktemp("boxes") / "hospitals", images=12)


def truths(seed: int, images: int, most: int = 3, classes: int = 3) -> torch.Tensor:
    rng = numpy_generator(seed, "truth")
    out = np.full((images, most, 5), -1.0, np.float32)
    for i in range(images):
        for m in range(rng.integers(0, most + 1)):
            low, size = rng.random(2) * 0.7, 0.02 + rng.random(2) * 0.28
            out[i, m] = [*low, *(low + size), rng.integers(1, classes)]
    return torch.from_numpy(out)


def maps(seed: int, images: int, size: tuple[int, int] = (4, 6), classes: int = 3) -> torch.Tensor:
    return torch.randn(images, classes - 1 + SIDES, *size, generator=torch_generator(seed, "maps"), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_cells_answer_for_boxes_as_the_rule_says(seed: int) -> None:
    truth, (h, w) = truths(seed, 3), (5, 7)
    found, points = assign(truth, (h, w)), centres((h, w))
    for i in range(3):
        owners: list[list[tuple[float, int]]] = [[] for _ in range(h * w)]
        for m, (x0, y0, x1, y1, k) in enumerate(truth[i].tolist()):
            if k < 0:
                continue
            away = [max(abs(x - (x0 + x1) / 2) * w, abs(y - (y0 + y1) / 2) * h) for x, y in points.tolist()]
            for c, (x, y) in enumerate(points.tolist()):
                inside = x0 < x < x1 and y0 < y < y1
                if (inside and away[c] <= RADIUS) or c == int(np.argmin(np.float32(away))):
                    owners[c].append(((x1 - x0) * (y1 - y0), m))
        assert found[i].tolist() == [min(one)[1] if one else -1 for one in owners]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(Detection.losses))
def test_the_loss_is_that_of_slow_loops_and_a_mean_of_images(seed: int, name: str) -> None:
    truth, raw = truths(seed, 3).double(), maps(seed, 3)
    owner, points = assign(truth, (4, 6)), centres((4, 6)).double()
    values = []
    for i in range(3):
        total, number = 0.0, 0
        for c in range(24):
            y, x = divmod(c, 6)
            m = int(owner[i, c])
            number += m >= 0
            for k in (1, 2):
                p = 1 / (1 + np.exp(-float(raw[i, k - 1, y, x])))
                true = m >= 0 and truth[i, m, 4] == k
                total += -0.25 * (1 - p) ** 2 * np.log(p) if true else -0.75 * p**2 * np.log(1 - p)
            if m < 0:
                continue
            (px, py), (x0, y0, x1, y1, _) = points[c].tolist(), truth[i, m].tolist()
            ways = [0.2 * np.exp(np.clip(float(raw[i, 2 + side, y, x]), -8, 2)) for side in range(4)]
            box = np.array([px - ways[0], py - ways[1], px + ways[2], py + ways[3]])
            if name == "focal-l1":
                total += float(np.abs(box - [x0, y0, x1, y1]).sum())
            else:
                total += 1 - slow_giou(box, np.array([x0, y0, x1, y1]))
            sides = [max(v, 0.0) for v in (px - x0, x1 - px, py - y0, y1 - py)]
            wanted = min(sides[:2]) / max(*sides[:2], 1e-9) * min(sides[2:]) / max(*sides[2:], 1e-9)
            near, q = np.sqrt(wanted), 1 / (1 + np.exp(-float(raw[i, -1, y, x])))
            total -= near * np.log(q) + (1 - near) * np.log(1 - q)
        values.append(total / max(number, 1))
    loss = Detection().objective(name)
    assert float(loss(raw, truth)) == pytest.approx(np.mean(values), rel=1e-6)
    single = [float(loss(raw[i : i + 1], truth[i : i + 1])) for i in range(3)]
    assert single == pytest.approx(values, rel=1e-6)


def slow_giou(a: np.ndarray, b: np.ndarray) -> float:
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(inner / either - (hull - either) / hull)


def test_giou_by_hand() -> None:
    one = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    two = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1], [2, 0, 3, 1]])
    torch.testing.assert_close(giou(one, two), torch.tensor([1, 0.5, -1 / 3]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_of_boxes_that_overlap_the_best_stays(seed: int) -> None:
    rng = numpy_generator(seed, "nms")
    low = rng.random((2, 12, 2)) * 0.4
    kind = rng.integers(1, 3, (2, 12, 1))
    boxes = np.concatenate([low, low + 0.3, -np.sort(-rng.random((2, 12, 1)), axis=1), kind], axis=2)
    keep = suppressed(torch.from_numpy(boxes))
    for i in range(2):
        stays: list[int] = []
        for d in range(12):
            if all(boxes[i, d, 5] != boxes[i, s, 5] or overlap(boxes[i, d], boxes[i, s]) <= OVERLAP for s in stays):
                stays.append(d)
        assert np.flatnonzero(keep[i].numpy()).tolist() == stays


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return float(inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 1), (4, 6), (9, 9)]))
def test_what_is_found_are_boxes_by_falling_score(seed: int, size: tuple[int, int]) -> None:
    found = decode(maps(seed, 2, size).float() * 2).numpy()
    assert found.shape == (2, FOUND, 6)
    for one in found:
        there = one[one[:, 5] > 0]
        assert (one[len(there) :] == -1).all(), "what is there comes first"
        assert (np.diff(there[:, 4]) <= 0).all()
        assert ((there[:, :4] >= 0) & (there[:, :4] <= 1)).all()
        assert (there[:, 4] >= LEAST).all()
        assert set(there[:, 5]) <= {1, 2}


def test_a_perfect_map_scores_one() -> None:
    truth, raw = truths(3, 6, most=1), torch.full((6, 2 + SIDES, 8, 8), -9.0)
    owner, points = assign(truth, (8, 8)), centres((8, 8))
    for i in range(6):
        for c in np.flatnonzero(owner[i].numpy() >= 0)[:1]:
            y, x = divmod(int(c), 8)
            x0, y0, x1, y1, k = truth[i, 0].tolist()
            sides = torch.tensor([points[c, 0] - x0, points[c, 1] - y0, x1 - points[c, 0], y1 - points[c, 1]])
            raw[i, int(k) - 1, y, x] = raw[i, -1, y, x] = 9.0
            raw[i, 2:6, y, x] = (sides.clamp(min=1e-3) / 0.2).log()
    task = Detection()
    right = Answers(outputs=task.pack(raw), targets=truth.numpy(), groups=np.arange(6))
    assert task.judge(right) == pytest.approx((1.0, 1.0), abs=0.1)
    wrong = Answers(outputs=task.pack(raw - 5), targets=truth.numpy(), groups=np.arange(6))
    assert task.judge(wrong)[1] < task.judge(right)[1]
    numbers, kept = task.examine(right, right, classes=("background", "a", "b"), generator=numpy_generator(0, "x"))
    assert numbers["metrics"]["box_f1"]["value"] == pytest.approx(float(kept["values"].mean()))
    empty = Answers(outputs=torch.zeros(0, 7, 4, 4), targets=truth.numpy()[:0], groups=np.arange(0))
    numbers, kept = task.examine(empty, empty, classes=("background", "a"), generator=numpy_generator(0, "x"))
    assert (numbers["metrics"], numbers["temperature"], len(kept["values"])) == (None, 1.0, 0)


def test_scores_are_calibrated_to_their_best_threshold() -> None:
    """Right boxes score 0.3, wrong ones 0.2: the best threshold lies between, and is put at 0.5."""
    truth = np.tile(np.array([[[0.1, 0.1, 0.4, 0.4, 1]]]), (8, 1, 1))
    found = np.tile(np.array([[[0.1, 0.1, 0.4, 0.4, 0.31, 1], [0.6, 0.6, 0.9, 0.9, 0.21, 1]]]), (8, 1, 1))
    heat = best_temperature(found, truth)
    scores = heated(found, heat)[0, :, 4]
    assert scores[0] >= 0.5 > scores[1]
    assert (heated(found, 1.0) == found).all()
    assert heated(np.full((1, 2, 6), -1.0), heat).tolist() == [[[-1.0] * 6] * 2]


@pytest.mark.parametrize("method", some_fast(SOME, ("fedopal",)))
def test_every_method_that_can_trains_and_predicts_boxes(place: Path, tmp_path: Path, method: str) -> None:
    run_experiment(validate(override({**SMALL, "path": str(place)}, [f"method={method}"])), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["headline"] == "box_f1"
    models = [m for site in results["sites"].values() for m in site["models"].values() if m]
    assert len(models) >= 3
    assert all(0 <= model[key]["value"] <= 1 for model in models for key in Detection.measures)
    files = place / "north" / "images"
    assert predict_folder(tmp_path / "run", "north", files, tmp_path / "f.csv", overlays=1) == (12, [])
    assert (tmp_path / "f.csv").read_text().startswith("file,class,score,x0,y0,x1,y1\n")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (["method=ridge"], "method.name"),
        (["method=feddpa-f"], "method.name"),
        (["train.loss=focal"], "train.loss"),
        (["train.balance=weights"], "train.balance"),
        (["data.target=mask"], "data.target"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override({**SMALL, "path": "nowhere"}, changes))
    assert (caught.value.where, bool(caught.value.fix)) == (where, True)


@pytest.mark.slow
def test_learns_boxes_and_predicts_files(tmp_path: Path) -> None:
    """Bright discs are found; boxes lie in the pixels of the file, whatever its size and the model's."""
    place = make_masks(tmp_path / "hospitals")
    changes = ["rounds=4", "train.steps=25", "train.batch_size=8", "train.lr=3e-3", 'controls=["local"]']
    run_experiment(validate(override({**SMALL, "path": str(place)}, [*changes, "train.views=8"])), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["summary"]["personalised"]["mean"] > 0.3
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert "mean change in F1 of boxes" in verdicts["headline"]
    images = place / "north" / "images"
    count, problems = predict_folder(tmp_path / "run", "north", images, tmp_path / "found.csv", overlays=2)
    assert (count, problems) == (24, [])
    with (tmp_path / "found.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["file", "class", "score", "x0", "y0", "x1", "y1"]
    assert len({line["file"] for line in lines}) == 24
    best = []
    for file in sorted(images.iterdir()):
        truth = around(np.asarray(Image.open(place / "north" / "masks" / file.name)).astype(np.uint8))[0]
        mine = [line for line in lines if line["file"] == file.name and line["class"]]
        boxes = [np.array([float(line[side]) for side in ("x0", "y0", "x1", "y1")]) for line in mine[:1]]
        assert all((box >= [-0.1] * 4).all() and (box <= [48.1, 40.1] * 2).all() for box in boxes)
        best.append(max([overlap(box, truth) for box in boxes], default=0.0))
    assert np.mean(best) > 0.4
    with Image.open(tmp_path / "found_overlays" / "0001.png") as shown:
        assert shown.width == 2 * shown.height
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "AP50" in page
    assert "alanced accuracy" not in page
    summary = summarize(tmp_path / "run")
    assert [measure["key"] for measure in summary["task"]["measures"]] == list(Detection.measures)


def test_boxes_are_framed_where_they_are() -> None:
    shown = framed(
        np.zeros((10, 20, 3), np.uint8), np.array([[0.1, 0.2, 0.5, 0.8, 0.9, 1], [0.0, 0.0, 1.0, 1.0, 1, 1]])
    )
    assert shown.shape == (10, 40, 3)
    lit = np.argwhere(shown[1:-1, 21:-1].any(-1)) + np.array([1, 21])
    assert (lit.min(0).tolist(), lit.max(0).tolist()) == ([2, 22], [7, 29])
    assert shown[[0, -1], 20:].any(-1).all()
    assert not shown[:, :20].any()
