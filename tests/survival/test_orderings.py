"""What the experiment with client-level privacy says again and again, and that its shortcut is an ordinary run."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confrere.job import initial, train
from confrere.record.run import Run

pytestmark = pytest.mark.slow
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def recipe() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        return importlib.import_module("private_survival")


@pytest.mark.parametrize("arm", ["FedAvg", "DPFed-post, sigma 2"])
def test_training_side_by_side_is_an_ordinary_run(recipe: Any, tmp_path: Path, arm: str) -> None:
    few = ["rounds=3", "train.batch_size=61"]  # 549 patients at nine sites: a batch is a whole site
    task, options = recipe.open_study("gbsg2", 9, 0, tmp_path, few), recipe.arms(1674, 9)[arm]
    server = recipe.simulate(task, {arm: recipe.built(options, 0)})[arm]["shared"]
    chosen = {**options, **({"noise_seed": 1, "cohort": 4.5} if options["name"] == "dpfed" else {})}
    ordinary = recipe.open_study("gbsg2", 9, 0, tmp_path, [*few, "privacy.delta=1e-3", *overrides(chosen)])
    train(ordinary, tmp_path / "run")
    run = Run(tmp_path / "run")
    start, found = initial(task, ""), run.server(3)["shared"]
    assert sorted(found) == sorted(server)
    for name, value in found.items():
        assert torch.allclose(value, server[name], rtol=1e-3, atol=2e-5), name
        assert not torch.allclose(value, start[name], atol=1e-3), name
    scores = recipe.examined(task, server)
    assert scores["harrell"] == pytest.approx(recipe.examined(task, found)["harrell"], abs=5e-3)


def overrides(method: dict[str, object]) -> list[str]:
    return [f"method.{key}={value}" for key, value in method.items()]


def test_the_second_clip_is_a_smaller_step_and_noise_costs_more_than_it_gives_back(recipe: Any, tmp_path: Path) -> None:
    wanted = ["FedAvg", "DPFed, sigma 2", "DPFed-post, sigma 2", "equal step, sigma 2"]
    study = functools.partial(recipe.open_study, "gbsg2", 10, tables=tmp_path)
    found = recipe.study_arms(study, SEEDS, tmp_path / "gbsg2", wanted)
    average, plain, post, equal = (np.array([one["harrell"] for one in found[arm]]) for arm in wanted)
    assert np.abs(post - equal).max() <= 0.01
    assert (average - post).mean() >= 0.02
    assert (average - plain).mean() >= 0.05
    brier = {arm: float(np.mean([one["ibs"] for one in seeds])) for arm, seeds in found.items()}
    assert brier["FedAvg"] < brier["DPFed-post, sigma 2"] < brier["DPFed, sigma 2"] - 0.05


def test_the_step_follows_from_noise_and_size(recipe: Any) -> None:
    chosen = recipe.arms(1674, 10)
    assert chosen["equal step, sigma 2"]["server_lr"] == pytest.approx(3 * 5 / (2 * 1674**0.5))
    assert chosen["equal step, sigma 3"]["server_lr"] == pytest.approx(3 * 5 / (3 * 1674**0.5))
    assert recipe.spent("DPFed, sigma 2") == ("16.46", "6.98")
    assert recipe.spent("equal step, sigma 3") == recipe.spent("DPFed, sigma 3")
    assert recipe.spent("FedAvg") == ("-", "-")
