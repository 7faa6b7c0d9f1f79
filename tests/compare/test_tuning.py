"""Every method gets the same budget, the search is deterministic, resumable and never reads test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from comparisons import Log, experiment

from confrere.compare import compare
from confrere.compare.cells import Cell
from confrere.compare.data import DataSet
from confrere.compare.tuning import LR, Search, criterion, distribution, space, tune, tuning_seed, with_values
from confrere.config import validate
from confrere.errors import ConfigError
from confrere.method import METHODS
from confrere.record.files import write_bytes, write_json
from confrere.record.run import Run

pytest.importorskip("optuna")


def dataset(**changes: Any) -> DataSet:
    return DataSet(name="d", digest="0", experiment=validate({"path": "x", **changes}), facts={})


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        search: ClassVar[dict[str, Any]] = {"lam": ("log", 0.01, 10.0), "head": ("choice", "shared", "local")}

    monkeypatch.setattr(METHODS["fedopal"], "search", Known.search)


def fake(out: Path, cell: Cell) -> None:
    """Leave a journal whose best criterion is a known function of the settings, best near lr = 3e-3, lam = 1."""
    from math import log

    lr, lam = cell.experiment.train.lr, float(cell.experiment.method.get("lam", 1.0))
    value = 1 / (1 + log(lr / 3e-3) ** 2 + log(lam) ** 2)
    path = out / "cells" / cell.digest
    evaluations = [{"event": "evaluation", "round": r, "criterion": value / r, "mean": 0.0} for r in (1, 2)]
    Run(path).append(*evaluations)
    write_json(path / "cell.json", {})
    write_json(path / "results.json", {})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def run(out: Path, cells: list[Cell], **_: Any) -> None:
        for cell in cells:
            if not (out / "cells" / cell.digest / "cell.json").exists():
                done.append(cell.digest)
                fake(out, cell)

    monkeypatch.setattr("confrere.compare.tuning.run_cells", run)
    return done


def search(out: Path, trials: int, labels: tuple[str, ...] = ("fedopal", "fedit", "local")) -> list[dict[str, Any]]:
    return tune(out, [dataset()], labels, [0, 1], trials, jobs=1, notify=Log())


@pytest.mark.usefixtures("knobs")
def test_every_method_gets_the_same_number_of_trials_and_the_best_is_taken(tmp_path: Path, trained: list[str]) -> None:
    found = search(tmp_path, 12)
    assert [len(one["trials"]) for one in found] == [12, 12, 12]
    assert len(trained) == 36
    for one in found:
        assert one["criterion"] == max(trial["criterion"] for trial in one["trials"]) >= one["untuned"]
        assert one["values"] in [trial["values"] for trial in one["trials"]]
        assert all(LR[0] <= trial["values"]["train.lr"] <= LR[1] for trial in one["trials"])
    assert set(found[0]["values"]) == {"train.lr", "method.lam", "method.head"}
    assert set(found[1]["values"]) == {"train.lr"}
    assert found[1]["values"]["train.lr"] == pytest.approx(3e-3, rel=0.5)


@pytest.mark.usefixtures("knobs")
def test_the_first_trial_is_the_experiment_as_it_is(tmp_path: Path, trained: list[str]) -> None:
    found = search(tmp_path, 1)
    assert found[0]["values"] == {"train.lr": 1e-3, "method.lam": 0.5, "method.head": "shared"}
    assert found[0]["criterion"] == found[0]["untuned"]
    assert len(trained) == 3


@pytest.mark.usefixtures("knobs")
def test_a_search_is_deterministic_resumable_and_a_larger_one_keeps_the_trials_of_a_smaller(
    tmp_path: Path, trained: list[str]
) -> None:
    whole = search(tmp_path / "whole", 9)
    search(tmp_path / "cut", 4)  # stopped, or a smaller budget
    del trained[:]
    assert search(tmp_path / "cut", 9) == whole
    assert len(trained) == 3 * 5, "finished trials are not run again"
    assert [one["trials"][:4] for one in whole] == [one["trials"] for one in search(tmp_path / "cut", 4)]


def test_the_search_learns_from_what_it_saw(tmp_path: Path, trained: list[str]) -> None:
    found = search(tmp_path, 25, ("fedit",))[0]
    late = [trial["criterion"] for trial in found["trials"][15:]]
    early = [trial["criterion"] for trial in found["trials"][:5]]
    assert sum(late) / len(late) > sum(early) / len(early)


def test_what_was_set_by_hand_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["fedopal"], "search", {"lam": ("log", 0.01, 10.0)})
    base = validate({"path": "x"})
    assert set(space(base.for_method("fedopal"))) == {"train.lr", "method.lam"}
    assert set(space(base.for_method("fedopal:lam=2.0"))) == {"train.lr"}
    wide = validate({"path": "x", "train": {"lr": 0.05}})
    assert space(wide.for_method("fedopal"))["train.lr"] == ("log", LR[0], 0.05)
    tuned = with_values(base.for_method("fedopal"), {"train.lr": 0.002, "method.lam": 3.0})
    assert (tuned.train.lr, tuned.method["lam"]) == (0.002, 3.0)


def test_the_tuning_seed_is_not_compared() -> None:
    assert tuning_seed([0, 1]) == 1000
    assert tuning_seed([1000, 1002]) == 1001
    assert Search(dataset(), "fedit", 1000).ask(0).experiment.seed == 1000


def test_a_default_outside_the_range_is_tried_but_not_told_to_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["fedopal"], "search", {"lam": ("log", 1.0, 10.0), "warmup": ("linear", 0, 3)})
    one = Search(dataset(), "fedopal", 1000)
    first = one.ask(0)
    assert first.experiment.method["lam"] == 0.5
    one.tell(first, 0.9)
    assert one.study.trials == []
    second = one.ask(1)
    assert type(second.experiment.method["warmup"]) is int
    assert second.experiment.method["lam"] >= 1.0
    one.tell(second, None)
    assert one.result()["values"]["method.lam"] == 0.5


def test_trials_that_diverge_count_and_are_never_chosen(tmp_path: Path) -> None:
    one = Search(dataset(), "fedit", 1000)
    for number, value in enumerate([None, 0.4, None]):
        one.tell(one.ask(number), value)
    assert one.result()["criterion"] == 0.4
    assert one.result()["untuned"] is None
    write_json(tmp_path / "diverged.json", {"reason": "x"})
    assert criterion(tmp_path) is None
    none = Search(dataset(), "fedit", 1000)
    none.tell(none.ask(0), None)
    with pytest.raises(ConfigError, match="every trial diverged"):
        none.result()


def test_values_that_the_method_refuses_here_are_drawn_anew_and_cost_no_trial(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data vectors take a round to tune their coefficients: with one round a trial that draws this ended the search."""
    narrow = {"coefficients": ("choice", "tuned", "mean")}
    monkeypatch.setattr(METHODS["data-vectors"], "search", narrow)
    sets, refused = [dataset(rounds=1)], []
    for name, trials in (("whole", 9), ("cut", 4), ("cut", 9)):
        found = tune(tmp_path / name, sets, ["data-vectors"], [0], trials, jobs=1, notify=Log())
        refused.append(found[0]["trials"])
    assert {trial["values"]["method.coefficients"] for trial in refused[0]} == {"mean"}
    assert len(refused[0]) == 9
    assert refused[0] == refused[2]
    assert refused[0][:4] == refused[1]
    assert len(trained) == 18

    one = Search(sets[0], "data-vectors", 1000)
    one.tell(one.ask(0), 0.5)
    for number in range(1, 9):
        one.tell(one.ask(number), 0.5)
    assert any(trial.state.name == "PRUNED" for trial in one.study.trials), "the test draws what is refused"


def test_a_search_in_which_all_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["data-vectors"], "search", {"coefficients": ("choice", "tuned")})
    one = Search(dataset(rounds=1), "data-vectors", 1000)
    one.tell(one.ask(0), 0.5)
    with pytest.raises(ConfigError, match="tuning takes a round after training") as told:
        one.ask(1)
    assert told.value.fix == "use rounds=2"


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no search range"):
        distribution("method.lam", ("between", 0, 1), float)


def test_real_trials_never_read_test_data(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job examines test data at the end of every training; what it found there changes no choice."""
    one, out = experiment(sets[0]), tmp_path / "out"
    first = compare(one, ["fedit"], [0], out, controls=False, trials=2)
    for trial in first["tuning"]["searches"][0]["trials"]:
        path = out / "cells" / trial["cell"]
        for file in [path / "results.json", *path.rglob("test-*.safetensors")]:
            write_bytes(file, b"unreadable")
    assert compare(one, ["fedit"], [0], out, controls=False, trials=2)["tuning"] == first["tuning"]


def test_a_tuned_comparison_prints_and_stores_budget_and_choice(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from confrere.progress import progress

    with progress(quiet=False) as notify:
        found = compare(experiment(sets[0]), ["fedit"], [0], tmp_path, trials=2, notify=notify)
    text = capsys.readouterr().err
    assert "tuned     north, fedit: 2 trials" in text
    assert "train.lr=" in text
    assert [len(one["trials"]) for one in found["tuning"]["searches"]] == [2, 2, 2], "controls are tuned as well"
    lr = {one["method"]: one["values"]["train.lr"] for one in found["tuning"]["searches"]}
    for cell in found["cells"]:
        stored = (tmp_path / "cells" / cell["cell"] / "experiment.toml").read_text()
        assert f"lr = {lr[cell['method']]!r}".replace("e-0", "e-") in stored.replace("e-0", "e-")
