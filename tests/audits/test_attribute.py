"""Attribute inference: on tables learnt by heart it beats its placebo, on what everybody shares it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from confrere.audits import attribute as audit
from confrere.audits import attribute_questions as asks
from confrere.audits.audit import Choice, Interval, find
from confrere.audits.job import audit as attack
from confrere.audits.tapped import AuditedRun, Guarantee, open_run
from confrere.cli import app
from confrere.config import validate
from confrere.data.splits import TRAIN
from confrere.errors import ConfigError
from confrere.job import run_experiment

COLUMNS = ("age", "sex", "pain_1", "pain_2", "pain_3", "x1", "x2")


def write_table(path: Path, rows: int = 60, sites: int = 2, seed: int = 0) -> Path:
    """Write a table of noise whose labels are drawn by lot: whatever is right of it is known by heart."""
    rng = np.random.default_rng(seed)
    lines = ["site,label," + ",".join(COLUMNS)]
    for number in range(sites * rows):
        pain = rng.integers(3)
        cells: list[Any] = [f"s{number % sites}", rng.choice(["ill", "well"]), f"{rng.normal(50, 9):.3f}"]
        cells += [rng.integers(2) if number % 9 else "", *(int(pain == k) for k in range(3))]
        lines.append(",".join(map(str, [*cells, f"{rng.normal():.3f}", f"{rng.normal():.3f}"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def trained(path: Path, out: Path, **changes: Any) -> Path:
    values = {
        "path": str(path),
        "backbone": {"name": "mlp"},
        "adapter": {"rank": 64, "dropout": 0.0},
        "rounds": 1,
        "threads": 1,
        "workers": 1,
        "train": {"steps": 2, "batch_size": 8},
        "controls": [],
        "method": "fedopal",
    }
    run_experiment(validate({**values, **changes}), out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("attribute")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(made / "cache"))
        trained(write_table(made / "table.csv"), made / "run")
        yield made


@pytest.fixture(scope="module")
def opened(folder: Path) -> AuditedRun:
    return open_run(folder / "run")


def test_columns_of_few_values_can_be_guessed_and_those_of_one_category_are_one() -> None:
    table = np.array([[50.0 + k, k % 2, k % 3 == 0, k % 3 == 1, k % 3 == 2, 1.0, k % 4] for k in range(24)])
    table[0, 2:5] = np.nan
    columns = ("age", "sex", "pain_1", "pain_2", "pain_3", "same", "vessels")
    assert asks.attributes(columns, table) == {"sex": [1], "pain": [2, 3, 4], "vessels": [6]}
    table[3, 2:5] = 1.0  # of three at once: no category
    assert list(asks.attributes(columns, table)) == ["sex", "pain_1", "pain_2", "pain_3", "vessels"]


def test_every_value_is_tried_in_rows_that_are_otherwise_the_patients_own(opened: AuditedRun) -> None:
    asked = asks.questions(opened, Choice())
    assert list(asked) == ["sex", "pain", "site"]
    for question in (*asked["sex"], *asked["pain"]):
        data, table = opened.data[question.site], opened.federation.site(question.site).images
        assert len(question.guesses) == {"sex": 2, "pain": 3}[question.name]
        for row, truth in enumerate(question.truth):  # the true value gives the patient's own tokens, others do not
            tokens = [guess.tokens[np.array([row])] for guess in question.guesses]
            same = [np.allclose(one, data.tokens[question.rows[row : row + 1]], atol=1e-5) for one in tokens]
            assert same == [value == truth for value in range(len(tokens))]
        missing = np.asarray(table[:])[question.rows, 0, len(COLUMNS) + COLUMNS.index("sex")]
        assert question.name == "pain" or not missing.any()
        known = np.asarray(table[:])[:, 0, len(COLUMNS) + 1] == 0 if question.name == "sex" else slice(None)
        held = np.asarray(table[:])[known][(data.split != TRAIN)[known]]
        column = COLUMNS.index("sex")
        if question.name == "sex":
            values, counts = np.unique(held[:, 0, column], return_counts=True)
            first = np.asarray(table[:])[question.rows[question.truth == 0], 0, column]
            assert (first == values[counts.argmax()]).all() or counts[0] == counts[1]


def test_a_patient_counts_once_and_advantage_is_the_difference_of_accuracies() -> None:
    patients, right = np.array([1, 1, 1, 2, 3, 4]), np.array([1, 1, 0, 0, 1, 0], bool)
    inside = np.array([1, 1, 1, 1, 0, 0], bool)
    assert audit.counted([(patients, right, inside), (patients, right, inside)]) == (2, 4, 2, 4)
    assert audit.gap((2, 4, 2, 4)).value == 0.0
    assert audit.gap((0, 0, 2, 4)) == Interval()


def told(leak: float, seed: int = 0, members: int = 300) -> audit.Answers:
    """Return answers that are right of half of all and of ``leak`` more of whoever was trained on."""
    rng, n = np.random.default_rng(seed), 2 * members
    inside, half = np.arange(n) < members, [rng.permutation(n) % 2 == 0 for _ in range(2)]
    known = np.stack([half[0], ~half[0], half[1], ~half[1]])
    return audit.Answers(
        patients=np.arange(n),
        inside=inside,
        trained=known,
        common=rng.random(n) < 0.5,
        right=rng.random(n) < 0.5 + leak * inside,
        rights=rng.random((4, n)) < 0.5 + leak * known,
    )


def test_a_planted_leak_is_found_with_power_and_bounded_by_the_guarantee() -> None:
    small = Guarantee(unit="record", epsilon=0.1, delta=1e-6)
    (advantage, accuracy), power = audit.rows("all", "general", "sex", [told(0.3, 1)], small)
    assert (advantage.finding, accuracy.finding) == ("above bound", "found")
    assert advantage.strength.value == pytest.approx(0.3, abs=0.08)
    assert advantage.bound == pytest.approx(1 - np.exp(-0.1), abs=0.001)
    assert abs(advantage.control.value or 1) < 0.06
    assert accuracy.control.value == pytest.approx(0.5, abs=0.06)  # not that of references who know them, too
    assert (power.low or 0) > 0.15
    (free, _), _ = audit.rows("all", "personalised", "sex", [told(0.3, 1)], small)
    assert (free.bound, free.finding) == (None, "found")
    quiet = [audit.rows("all", "general", "sex", [told(0.0, seed)], None) for seed in range(20)]
    assert sum(row.finding != "not found" for (row, _), _ in quiet) <= 2
    assert sum((power.low or 0) > 0 for _, power in quiet) <= 1


def test_the_audit_writes_what_it_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confrere.report.write_report", lambda run: run / "report.html")
    options = ["--only", "attribute", "--attribute", "Sex", "--patients", "10", "--json"]
    done = CliRunner().invoke(app, ["audit", str(folder / "run"), *options])
    assert done.exit_code == 0, done.output
    found = find("attribute")
    assert found.question.endswith("?")
    rows = attack(folder / "run", only=["attribute"], choice=Choice(attribute="site", patients=10))[0]["rows"]
    assert {row["model"] for row in rows} == {"update", "personalised"}  # the general one is the same everywhere
    assert {row["measure"] for row in rows} == {"advantage, site", "accuracy, site"}
    assert {row["subject"] for row in rows} == {"all", "s0", "s1"}


@pytest.mark.parametrize("name", ["age", "pain_1", "sexx", "label"])
def test_what_cannot_be_guessed_is_refused(opened: AuditedRun, name: str) -> None:
    with pytest.raises(ConfigError, match="no column of 2 to 8 values") as caught:
        asks.questions(opened, Choice(attribute=name))
    assert (caught.value.code, caught.value.where) == ("audit", "--attribute")


def test_of_images_the_hospital_alone_can_be_asked(opened: AuditedRun) -> None:
    pictures = SimpleNamespace(tabular=False)
    run = SimpleNamespace(
        federation=pictures, experiment=opened.experiment, sites=opened.sites, data=opened.data, path=opened.path
    )
    (asked,) = asks.questions(run, Choice()).values()  # type: ignore[arg-type]
    assert {(one.name, one.site, one.guesses) for one in asked} == {("site", site, ()) for site in opened.sites}
    assert {int(one.truth[0]) for one in asked} == {0, 1}
    with pytest.raises(ConfigError, match="of which images have none") as caught:
        asks.questions(run, Choice(attribute="sex"))  # type: ignore[arg-type]
    assert caught.value.code == "audit"
    run.sites = opened.sites[:1]
    with pytest.raises(ConfigError, match="there is one site") as caught:
        asks.questions(run, Choice())  # type: ignore[arg-type]
    assert caught.value.code == "audit"


@pytest.mark.slow
def test_what_was_learnt_by_heart_is_told_and_the_placebo_stays_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    train = {"steps": 80, "batch_size": 32, "lr": 5e-3, "balance": "none"}
    table = write_table(tmp_path / "table.csv", rows=240)
    run = trained(table, tmp_path / "run", rounds=2, train=train, data={"test": 0.4}, method="local")
    found = attack(run, only=["attribute"], choice=Choice(attribute="sex"))[0]
    rows = {r["measure"]: r for r in found["rows"] if r["subject"] == "all" and r["model"] == "personalised"}
    advantage = rows["advantage, sex"]
    assert advantage["finding"] == "found", advantage
    assert advantage["control"]["low"] < 0 < advantage["control"]["high"], advantage
    assert rows["accuracy, sex"]["finding"] == "found"
    assert not found["warnings"]
