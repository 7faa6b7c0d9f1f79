"""Survival: tables of times come in, every method trains on them, and what comes out is what slow loops say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from confrere.config import override, validate
from confrere.data.federation import load_federation
from confrere.data.options import DataOptions
from confrere.errors import ConfigError, DataError
from confrere.job import run_experiment
from confrere.method import METHODS
from confrere.metrics.mean_gain import mean_gain, resample_site
from confrere.metrics.paired import Run, paired_gain
from confrere.seeds import numpy_generator, torch_generator
from confrere.survival import edge_survival, restricted_mean
from confrere.tasks import make_task
from confrere.tasks.survival import Survival
from confrere.tasks.task import Answers

SMALL: dict[str, Any] = {
    "task": {"name": "survival", "horizon": 10.0, "bins": 5},
    "rounds": 3,
    "threads": 1,
    "workers": 1,
    "controls": [],
    "backbone": {"name": "mlp"},
    "adapter": {"blocks": 2, "rank": 8},
    "train": {"steps": 2, "batch_size": 8, "balance": "none"},
}


def make_table(path: Path, patients: int = 40) -> Path:
    """Write three sites whose first feature decides how long patients live, up to chance: synthetic."""
    lines = ["site,patient,time,event,age,size"]
    for site in ("north", "south", "west"):
        rng = numpy_generator(0, "times", site)
        for i in range(patients):
            age, size = rng.normal(size=2)
            time = float(rng.exponential(6.0 * np.exp(-1.5 * age))) + 0.01
            end = float(rng.uniform(1, 14))
            gap = "" if i % 7 == 0 else f"{size:.3f}"
            lines.append(f"{site},{site}{i},{min(time, end):.4f},{int(time <= end)},{age:.3f},{gap}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("survival") / "registry.csv")


def read(path: Path, cache: Path) -> Any:
    return load_federation(path, options=DataOptions(target="time"), image_size=(1, 1), seed=0, cache=cache)


def test_times_and_events_are_targets_and_no_features(table: Path, tmp_path: Path) -> None:
    federation = read(table, tmp_path)
    assert federation.classes == federation.strata == ("censored", "event")
    assert federation.image_size == (1, 4)  # two features, two that say what was missing
    for site in federation.sites:
        assert site.targets is not None
        assert site.targets.shape == (40, 2)
        assert site.labels.tolist() == site.targets[:, 1].tolist()
    changed = table.with_name("changed.csv")
    changed.write_text(table.read_text().replace(",0,", ",1,", 1))
    assert read(changed, tmp_path).digest != federation.digest


@pytest.mark.parametrize(
    "cells", ["0,1", "-1,1", "nan,1", "inf,1", "1e40,1", "x,1", ",1", "3,2", "3,0.5", "3,", "3,yes", "1_0,1"]
)
def test_impossible_times_and_events_are_refused_by_line(tmp_path: Path, cells: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"site,time,event,age\nnorth,5,1,50\nnorth,{cells},60\n")
    with pytest.raises(DataError) as caught:
        read(file, tmp_path)
    assert caught.value.code in ("table-rows", "no-such-path")
    assert "line 3" in caught.value.what
    assert "60" not in str(caught.value)


def test_judged_by_the_order_of_deaths_and_the_likelihood() -> None:
    task = Survival(horizon=10.0, bins=5)
    targets = np.array([[1.0, 1], [3.0, 1], [5.0, 0], [9.0, 1], [30.0, 1]], np.float32)
    right = torch.tensor([[2.0, 1, 0, 0, 0], [-1, 2, 0, 0, 0], [-2, -2, 0, 0, 0], [-3, -3, -3, -3, 1], [-5.0] * 5])
    groups = np.arange(5)
    score, likelihood = task.judge(Answers(outputs=right, targets=targets, groups=groups))
    assert score == 1.0
    hazard = right.double().sigmoid()
    terms = [
        hazard[0, 0].log(),
        (1 - hazard[1, 0]).log() + hazard[1, 1].log(),
        (1 - hazard[2, :2]).log().sum(),  # censored at 5: two bins of two were survived
        (1 - hazard[3, :4]).log().sum() + hazard[3, 4].log(),
        (1 - hazard[4]).log().sum(),  # beyond the horizon
    ]
    assert likelihood == pytest.approx(float(torch.stack(terms).mean().exp()), rel=1e-6)
    assert task.judge(Answers(outputs=-right, targets=targets, groups=groups))[0] == 0.0
    censored = targets * np.array([1, 0], np.float32)
    assert task.judge(Answers(outputs=right, targets=censored, groups=groups))[0] == 0.5


@pytest.mark.parametrize("curve", ["logistic-hazard", "deephit"])
def test_what_is_predicted_are_survival_curves(curve: str) -> None:
    task = make_task({"name": "survival", "horizon": 10.0, "bins": 4, "curve": curve})
    found = task.chances(torch.randn(7, 4, generator=torch_generator(0, "x")), 1.0)
    assert found.shape == (7, 4)
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found, axis=1) <= 1e-12).all()
    assert task.columns(("censored", "event")) == tuple(f"survival at {t:g}" for t in (2.5, 5, 7.5, 10))


def answers(outputs: torch.Tensor, targets: np.ndarray) -> Answers:
    return Answers(outputs=outputs, targets=targets.astype(np.float32), groups=np.arange(len(targets)))


def draw(seed: int, patients: int, outputs: int) -> Answers:
    """Return random outputs, and times of which some share a value and some lie beyond a horizon of 10."""
    rng = numpy_generator(seed, "answers")
    targets = np.stack([rng.integers(1, 15, patients), rng.random(patients) < 0.6], axis=1)
    return answers(torch.from_numpy(rng.normal(size=(patients, outputs))).float(), targets)


@pytest.mark.parametrize("curve", ["logistic-hazard", "deephit", "cox"])
def test_between_rounds_and_at_the_end_concordance_is_the_same_number(curve: str) -> None:
    task = Survival(horizon=10.0, bins=5, curve=curve)  # type: ignore[arg-type]
    known, asked = draw(0, 20, task.outputs(2)), draw(1, 40, task.outputs(2))
    found, kept = task.examine(known, asked, classes=("censored", "event"), generator=numpy_generator(0, "x"))
    assert task.judge(asked)[0] == pytest.approx(found["metrics"]["harrell"]["value"], abs=1e-12)
    if curve != "cox":
        how = {"logistic-hazard": "hazard", "deephit": "density"}[curve]
        area = restricted_mean(edge_survival(curve, asked.outputs.double().numpy()), task.edges, how=how)
        assert kept["risk"].numpy() == pytest.approx(-area, abs=1e-12)
    assert found["temperature"] == 1.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_cox_compares_patients_of_one_site_up_to_the_horizon(seed: int) -> None:
    task, given_ = Survival(horizon=10.0, bins=5, curve="cox"), draw(seed, 12, 1)
    targets = torch.from_numpy(given_.targets).double()
    loss = task.objective("likelihood")(given_.outputs.double(), targets)
    score, time, event = given_.outputs.double()[:, 0], targets[:, 0], (targets[:, 1] > 0) & (targets[:, 0] <= 10)
    total, terms = 0.0, 0
    for when in sorted({float(t) for t, e in zip(time, event, strict=True) if e}):  # Efron, by hand
        tied = torch.tensor([float(t) == when and bool(e) for t, e in zip(time, event, strict=True)])
        for step in range(int(tied.sum())):
            at_risk = score[time >= when].exp().sum() - step / int(tied.sum()) * score[tied].exp().sum()
            total, terms = total + float(at_risk.log()), terms + 1
        total -= float(score[tied].sum())
    assert float(loss) == pytest.approx(total / max(1, terms), abs=1e-9)
    later = targets.clone()
    later[targets[:, 0] > 10, 0] += 7.0
    later[targets[:, 0] > 10, 1] = 1.0
    assert float(task.objective("likelihood")(given_.outputs.double(), later)) == float(loss)


def test_a_cox_round_is_judged_by_what_events_gain() -> None:
    task, asked = Survival(horizon=10.0, bins=5, curve="cox"), draw(3, 30, 1)
    risk = torch.from_numpy(asked.targets[:, 1:] / 2 - asked.targets[:, :1])  # of equal times, events come first
    by_sign = [task.judge(answers(sign * risk, asked.targets)) for sign in (1.0, 0.0, -1.0)]
    assert [score for score, _ in by_sign] == pytest.approx([1.0, 0.5, 0.0])
    better, nothing, worse = (criterion for _, criterion in by_sign)
    assert nothing == pytest.approx(0.5)
    assert 1 > better > nothing > worse > 0
    censored = asked.targets * np.array([1, 0])
    assert task.judge(answers(risk, censored)) == (0.5, 0.5)


def test_a_cox_baseline_is_of_the_known_patients_and_leaves_nothing_behind() -> None:
    task, known, asked = Survival(horizon=10.0, bins=5, curve="cox"), draw(4, 25, 1), draw(5, 30, 1)
    at = np.array([2.0, 5.5, 10.0])
    score, (time, event) = known.outputs.double().numpy()[:, 0], known.targets.T
    hazard = [
        sum(1 / np.exp(score)[time >= t].sum() for t, e in zip(time, event, strict=True) if e and t <= min(end, 10))
        for end in at
    ]
    risk = np.exp(asked.outputs.double().numpy())
    assert task.curves(asked.outputs, known)(at) == pytest.approx(np.exp(-risk * hazard), abs=1e-12)
    options: dict[str, Any] = {"classes": ("censored", "event")}
    found, kept = task.examine(known, asked, generator=numpy_generator(0, "x"), **options)
    other = draw(6, 25, 1)
    again, same = task.examine(other, asked, generator=numpy_generator(0, "x"), **options)
    assert set(kept) == {"risk", "targets", "groups"}
    assert all(torch.equal(kept[key], same[key]) for key in kept)
    assert found["metrics"]["harrell"] == again["metrics"]["harrell"]
    assert found["metrics"]["ibs"] != again["metrics"]["ibs"]
    without = answers(known.outputs, known.targets * np.array([1, 0]))
    told = task.examine(without, asked, generator=numpy_generator(0, "x"), **options)[0]["metrics"]["notes"]
    assert "no baseline" in told[-1]
    assert task.chances(asked.outputs, 1.0).shape == (30, len(task.columns(("censored", "event"))))


def test_what_is_fitted_at_the_end_is_a_cox_baseline_on_all_patients_but_those_that_test(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    whole = Survival.examine

    def spy(self: Survival, known: Answers, asked: Answers, **options: Any) -> Any:
        seen.append(len(known.targets) + len(asked.targets) if self.curve == "cox" else len(known.targets))
        return whole(self, known, asked, **options)

    monkeypatch.setattr(Survival, "examine", spy)
    for curve in ("cox", "logistic-hazard"):
        more = ["method=fedit", "rounds=1", f"task.curve={curve}"]
        run_experiment(validate(override({**SMALL, "path": str(table)}, more)), tmp_path / curve)
    assert set(seen[: len(seen) // 2]) == {40}
    assert max(seen[len(seen) // 2 :]) <= 12
    head = load_file(next((tmp_path / "cox" / "adapters").rglob("head.safetensors")))
    assert {name: tuple(value.shape) for name, value in head.items()} == {"head.weight": (1, 64), "head.bias": (1,)}


TIMES = sorted(name for name, cls in METHODS.items() if "time" in cls.targets and name != "dpfed")  # it has its own


FAST = ("fedopal", "feddpa-t", "fedadam", "apfl", "flora", "local")
WITH_COX = [pytest.param(name, "cox", marks=pytest.mark.slow) for name in (*FAST, "fedacs", "ifca", "pooled", "fedalt")]
LEARN = [pytest.param(name, "logistic-hazard", marks=() if name in FAST else pytest.mark.slow) for name in TIMES]


@pytest.mark.parametrize(("method", "curve"), [*LEARN, *WITH_COX])
def test_every_method_that_can_learns_from_times(table: Path, tmp_path: Path, method: str, curve: str) -> None:
    chosen = override({**SMALL, "path": str(table)}, [f"method={method}", f"task.curve={curve}"])
    run_experiment(validate(chosen), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["headline"] == "harrell"
    models = [m for site in results["sites"].values() for m in site["models"].values() if m]
    assert len(models) >= 3
    assert all(m["harrell"]["value"] is None or 0 <= m["harrell"]["value"] <= 1 for m in models)


def test_learns_and_says_whether_joining_paid(table: Path, tmp_path: Path) -> None:
    more = ["method=fedit", "rounds=6", "train.steps=20", "train.lr=1e-2", 'controls=["local"]']
    run_experiment(validate(override({**SMALL, "path": str(table)}, more)), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["summary"]["personalised"]["mean"] > 0.65
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert "mean change in concordance" in verdicts["headline"]
    assert all(gain["local"]["metric"] == "harrell" for gain in verdicts["sites"].values())


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (["task=survival"], "task.horizon"),
        (["task.horizon=-1.0"], "task.horizon"),
        (["task.bins=1"], "task.bins"),
        (["task.horizont=3.0"], "task.horizont"),
        (["task.curve=weibull"], "task.curve"),
        (["method=fedmosaic"], "method.name"),
        (["train.balance=weights"], "train.balance"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(override({**SMALL, "path": "nowhere"}, changes))
    assert caught.value.where == where


def concordance(risk: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    right = total = 0.0
    for i, (time, event) in enumerate(targets):
        for j, (later, happened) in enumerate(targets):
            if event and (later > time or (later == time and not happened)):
                total += weights[i] * weights[j]
                right += weights[i] * weights[j] * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
    return right / total if total else np.nan


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_gain_in_concordance_is_that_of_a_slow_loop(seed: int) -> None:
    rng = numpy_generator(seed, "paired")
    targets = np.stack([rng.integers(1, 6, 14), rng.integers(0, 2, 14)], axis=1).astype(np.float64)
    targets[0] = (1, 1)
    groups, flat = np.arange(14), np.ones(14)
    a: Run = (rng.integers(0, 5, 14).astype(np.float64), targets, groups)
    b: Run = (rng.integers(0, 5, 14).astype(np.float64), targets, groups)
    found = paired_gain([a], [b], generator=numpy_generator(0, "x"), resamples=60, metric="harrell")
    assert found["gain"] == pytest.approx(concordance(a[0], targets, flat) - concordance(b[0], targets, flat))
    site = resample_site({"a": [a], "b": [b]}, generator=numpy_generator(0, "x"), resamples=60)
    assert site is not None
    assert mean_gain([site], "a", "b")["gain"] == pytest.approx(found["gain"])
    same = paired_gain([a], [a], generator=numpy_generator(0, "x"), resamples=60, metric="harrell")
    assert (same["gain"], same["p"]) == (0.0, 1.0)
