"""A comparison follows the task of its runs, and refuses runs of several."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import TINY
from mask_files import make_masks

from confrere.compare import compare
from confrere.compare.data import own_choices
from confrere.compare.evidence import corrected, numbers
from confrere.compare.grid import Grid
from confrere.compare.recommend import recommend
from confrere.config import Experiment, validate
from confrere.errors import ConfigError
from confrere.metrics.paired import holm
from confrere.record.files import write_json
from confrere.report import write_report
from confrere.tasks.segmentation import Segmentation

MASKS = Segmentation().describe()
KEYS = list(MASKS["measures"])


def of_masks(path: Path) -> Experiment:
    changes = {"rounds": 2, "train": {"steps": 20, "batch_size": 8, "lr": 3e-3}, "task": "segmentation"}
    data = {"classes": ["background", "disc"], "val": 0.2, "test": 0.6}
    return validate({**TINY, **changes, "path": str(path), "data": data})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_masks(tmp_path_factory.mktemp("masks") / "hospitals", images=28)
    out: Path = tmp_path_factory.mktemp("compared")
    compare(of_masks(place), ["fedit"], [0], out)
    write_report(out)
    return out


@pytest.mark.slow
def test_the_numbers_are_those_of_the_runs(compared: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    assert found["task"] == MASKS
    results = {
        cell["method"]: json.loads((compared / "cells" / cell["cell"] / "results.json").read_text())
        for cell in found["cells"]
    }
    for method in found["methods"]:
        sites = results[method["name"]]["sites"]
        for key in KEYS:
            mean = np.mean([site["models"]["personalised"][key]["value"] for site in sites.values()])
            assert method[key]["mean"] == pytest.approx(mean)
            by_hand = [one[key] for one in found["scores"] if one["method"] == method["name"]]
            assert np.mean(by_hand) == pytest.approx(mean)
        assert method["dice"]["low"] <= method["dice"]["mean"] <= method["dice"]["high"], "over patients"
        assert "balanced_accuracy" not in method
    assert max(method["dice"]["mean"] for method in found["methods"]) > 0, "they learnt something"
    gains = {(pair["a"], pair["b"]): pair for pair in found["overall"]}
    means = {method["name"]: method["dice"]["mean"] for method in found["methods"]}
    for (a, b), pair in gains.items():
        assert pair["metric"] == "dice"
        assert pair["gain"] == pytest.approx(means[a] - means[b])
        assert "points of Dice" in pair["sentence"]
    assert [pair["p_holm"] for pair in gains.values()] == holm([pair["p"] for pair in gains.values()])
    assert found["ranks"]["blocks"] == 3
    assert all(pair["metric"] == "dice" and "Dice" in pair["sentence"] for pair in found["pairs"])
    assert "the only method beside the controls, has a mean Dice of" in found["recommendation"]["sentences"][0]["text"]


@pytest.mark.slow
def test_what_is_written_speaks_of_dice(compared: Path) -> None:
    for name in ("comparison.json", "comparison.html", "comparison.csv", "comparison_scores.csv", "comparison.tex"):
        text = (compared / name).read_text()
        assert "alanced accuracy" not in text, name
        assert "balanced_accuracy" not in text, name
        assert "dice" in text.lower(), name
    with (compared / "comparison_scores.csv").open() as file:
        assert list(next(csv.DictReader(file))) == ["method", "data", "site", "seed", *KEYS]
    page = (compared / "comparison.html").read_text()
    assert "points of Dice" in page
    assert ">HD95, % of diagonal, less is better<" in page


def test_words_and_the_best_follow_the_headline() -> None:
    def row(name: str, mean: float) -> dict[str, Any]:
        cell = {"mean": mean, "low": None, "high": None}
        return {"name": name, "dice": cell, "worst_site": None, "bytes": 1.0, "seeds": [0, 1]}

    pair = {"a": "fedit", "b": "local", "gain": 0.1, "low": 0.05, "high": 0.15, "p": 0.001, "note": None}
    told = corrected([{**pair, "metric": "dice"}])
    found = recommend([row("fedit", 0.6), row("fedopal", 0.5), row("local", 0.5)], told, [], metric="dice")
    assert found["winner"] == "fedit"
    assert numbers(told[0]).startswith("+10.0 points of Dice (95 %")
    assert numbers(corrected([pair])[0]).startswith("+10.0 points of balanced accuracy (95 %")


def test_runs_of_several_tasks_are_refused(tmp_path: Path) -> None:
    where = {}
    for label, task in (("fedit", {}), ("local", {"task": MASKS})):
        where[label, "d", 0] = tmp_path / label
        (tmp_path / label).mkdir()
        write_json(tmp_path / label / "results.json", {"sites": {}, **task})
    one = Grid(labels=["fedit"], sets=["d"], seeds=[0], where=where)
    assert one.headline == "balanced_accuracy", "an older run is of classification"
    assert list(one.task["measures"]) == ["balanced_accuracy", "auroc", "f1", "ece"]
    assert Grid(labels=["local"], sets=["d"], seeds=[0], where=where).task == MASKS
    with pytest.raises(ConfigError, match="different tasks: classification, segmentation") as caught:
        _ = Grid(labels=["fedit", "local"], sets=["d"], seeds=[0], where=where).headline
    assert caught.value.code == "comparison"
    plain = validate({**TINY, "path": str(tmp_path / "x")})
    with pytest.raises(ConfigError, match="cannot differ") as caught:
        own_choices([plain, of_masks(tmp_path / "y")])
    assert caught.value.code == "comparison"
    assert caught.value.where.startswith("task")
