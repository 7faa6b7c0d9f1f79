"""Several findings an image: the loss against slow loops, missing findings, and every method that says it can do it."""

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
from mask_files import some_fast
from PIL import Image

from confrere.config import override, validate
from confrere.errors import ConfigError
from confrere.job import run_experiment
from confrere.predict import predict_folder
from confrere.report import write_report
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks.multilabel import MOST, MultiLabel
from confrere.tasks.task import Answers

FINDINGS = ("red", "green", "blue")
SMALL: dict[str, Any] = {
    "task": "multi-label",
    "rounds": 3,
    "threads": 1,
    "workers": 1,
    "controls": [],
    "data": {"classes": list(FINDINGS)},
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2, "rank": 8},
    "train": {"steps": 1, "batch_size": 4},
}


def make_table(root: Path, images: int = 30) -> Path:
    """Write three sites whose images shine in the colours that they have; west never says anything about blue."""
    lines = ["path,labels,site,patient"]
    (root / "images").mkdir(parents=True)
    for site in ("north", "south", "west"):
        rng = numpy_generator(0, "colours", site)
        for i in range(images):
            there = rng.random(3) < 0.4
            pixels = rng.integers(0, 100, (32, 32, 3)) + 100 * there
            name = f"images/{site}{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
            said = [colour for colour, yes in zip(FINDINGS, there, strict=True) if yes]
            said = [*[c for c in said if c != "blue"], "?blue"] if site == "west" else said
            lines.append(f"{name},{'|'.join(said)},{site},{site}{i // 2}")
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return root / "t.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("findings"))


def some(seed: int, images: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    truth = numpy_generator(seed, "truth").integers(-1, 2, (images, 3)).astype(np.float32)
    return torch.randn(images, 3, generator=torch_generator(seed, "x"), dtype=torch.float64), torch.from_numpy(truth)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_loss_is_that_of_slow_loops_and_a_mean_of_images(seed: int, weighted: bool) -> None:
    logits, truth = some(seed)
    weights = torch.tensor([1.0, 2.5, 7.0], dtype=torch.float64) if weighted else None
    loss, values = MultiLabel().objective("cross-entropy", weights), []
    for i in range(5):
        terms = []
        for k in range(3):
            p = 1 / (1 + np.exp(-float(logits[i, k])))
            if truth[i, k] == 1:
                terms.append(-np.log(p) * (float(weights[k]) if weights is not None else 1))
            elif truth[i, k] == 0:
                terms.append(-np.log(1 - p))
        values.append(np.mean(terms) if terms else 0.0)
    assert float(loss(logits, truth)) == pytest.approx(np.mean(values), rel=1e-9)
    assert [float(loss(logits[i : i + 1], truth[i : i + 1])) for i in range(5)] == pytest.approx(values, rel=1e-9)


def test_rare_findings_weigh_more() -> None:
    truth = np.array([[1, 0, 1, -1]] + [[0, 0, 1, -1]] * 8 + [[-1, 0, 1, 1]], np.float32)
    assert MultiLabel().weights(truth, 4).tolist() == [8.0, 1.0, 1.0, 1.0]
    many = np.zeros((1000, 1), np.float32)
    many[0] = 1
    assert MultiLabel().weights(many, 1).tolist() == [MOST]


def test_judged_by_order_and_by_how_sure() -> None:
    truth = np.array([[1, 0, -1], [0, 0, -1], [1, 0, -1]], np.float32)
    logits = torch.tensor([[2.0, -3, 9], [-1, -2, 9], [1, -4, 9]])
    right = Answers(outputs=logits, targets=truth, groups=np.arange(3))
    score, sure = MultiLabel().judge(right)
    p = logits.double().sigmoid().numpy()
    assert score == 1.0
    first = ((p[0, 0] + p[2, 0]) / 2 + 1 - p[1, 0]) / 2
    assert sure == pytest.approx((first + 1 - p[:, 1].mean()) / 2)
    nothing = Answers(outputs=logits, targets=np.full((3, 3), -1, np.float32), groups=np.arange(3))
    assert MultiLabel().judge(nothing) == (0.5, 0.5)


def test_one_temperature_is_fitted_and_applied() -> None:
    rng = numpy_generator(0, "heat")
    logits = rng.normal(size=(400, 2))
    truth = (rng.random((400, 2)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    answers = Answers(outputs=torch.from_numpy(3 * logits), targets=truth, groups=np.arange(400))
    numbers, kept = MultiLabel().examine(answers, answers, classes=("a", "b"), generator=numpy_generator(0, "x"))
    assert numbers["temperature"] == pytest.approx(3.0, rel=0.2)
    np.testing.assert_allclose(kept["probabilities"], MultiLabel().chances(answers.outputs, numbers["temperature"]))
    empty = Answers(outputs=torch.zeros(0, 2), targets=np.zeros((0, 2), np.float32), groups=np.arange(0))
    numbers, _ = MultiLabel().examine(empty, empty, classes=("a", "b"), generator=numpy_generator(0, "x"))
    assert numbers == {"metrics": None, "temperature": 1.0}


# The head is a linear one, as for classes, with which all methods pass the conformance suite: some of each family here.
SOME = ["fedacs", "fedit", "fedopal", "fedper", "flora", "hilora", "local", "pooled", "scaffold"]


@pytest.mark.parametrize("method", some_fast(SOME, ("fedopal",)))
def test_every_method_that_can_learns_findings(table: Path, tmp_path: Path, method: str) -> None:
    run_experiment(validate(override({**SMALL, "path": str(table)}, [f"method={method}"])), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["headline"] == "auroc"
    west = results["sites"]["west"]["models"]["personalised"]
    assert "blue" in west["absent"]
    assert west["by_class"]["blue"]["value"] is None
    assert all(0 <= west[key]["value"] <= 1 for key in MultiLabel.measures)
    files = table.parent / "images"
    assert predict_folder(tmp_path / "run", "west", files, tmp_path / "f.csv") == (90, [])
    assert (tmp_path / "f.csv").read_text().startswith("file,red,green,blue\n")


@pytest.mark.parametrize(
    ("changes", "where"),
    [(["method=ridge"], "method.name"), (["train.loss=focal"], "train.loss"), (["data.target=label"], "data.target")],
)
def test_what_does_not_go_together_is_refused(changes: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override({**SMALL, "path": "nowhere"}, changes))
    assert (caught.value.where, bool(caught.value.fix)) == (where, True)


@pytest.mark.slow
def test_learns_compares_and_predicts_files(table: Path, tmp_path: Path) -> None:
    changes = [
        "rounds=2",
        "train.steps=15",
        "train.lr=1e-2",
        "train.balance=weights",
        'controls=["local"]',
        "method=fedit",
    ]
    run_experiment(validate(override({**SMALL, "path": str(table)}, changes)), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["summary"]["personalised"]["mean"] > 0.8
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert "mean change in AUROC" in verdicts["headline"]
    count, problems = predict_folder(tmp_path / "run", "west", table.parent / "images", tmp_path / "found.csv")
    assert (count, problems) == (90, [])
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *FINDINGS]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in FINDINGS)
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By finding" in page
    assert "alanced accuracy" not in page
