"""Trainings are kept by their content, and a comparison goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from comparisons import Log, experiment, stamps

from confrere.compare import compare
from confrere.compare.cells import Cell, folder, run_cells, state
from confrere.config import override, validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, DataError, RunError


def cell(label: str = "fedopal", data_digest: str = "d", trial: bool = False, **changes: Any) -> Cell:
    one = validate({"path": "x", **changes}).for_method(label, seed=0)
    return Cell(experiment=one, data="x", data_digest=data_digest, label=label, trial=trial)


def test_the_digest_is_of_what_decides_the_result() -> None:
    base = cell().digest
    assert cell(path="elsewhere").digest == base, "where the data lie"
    assert cell(workers=7, track=["tensorboard"]).digest == base, "how many work, and who watches"
    assert cell("fedopal:lam=0.5:head=shared").digest == base, "defaults that are written out"
    assert cell(trial=True).digest == base, "what it is for"
    others = {
        cell(data_digest="e").digest, cell("fedopal:lam=0.6").digest, cell("fedit").digest, cell(rounds=11).digest,
        cell(train={"lr": 2e-3}).digest, cell(split_seed=1).digest, cell(hold_out="a").digest, base,
    }  # fmt: skip
    assert len(others) == 8


def test_versions_and_the_methods_own_file_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell()
    assert before.content["versions"]["torch"]
    assert not {"cores", "threads"} & set(before.content["versions"])
    monkeypatch.setattr("confrere.compare.cells.machine", lambda: {"torch": "0", "cores": 1})
    assert cell().digest != before.digest
    assert cell("fedit").content["source"] != cell("local").content["source"]


def test_another_list_of_methods_or_seeds_trains_only_what_is_new(sets: tuple[Path, Path], tmp_path: Path) -> None:
    first, second, third = Log(), Log(), Log()
    one = experiment(sets[0])
    compare(one, ["fedit"], [0], tmp_path, controls=False, notify=first)
    kept = stamps(tmp_path)
    found = compare(one, ["fedopal", "fedit"], [0, 1], tmp_path, controls=False, notify=second)
    assert first.trained() == ["north, fedit, seed 0"]
    assert sorted(second.trained()) == [
        "north, fedit, seed 1", "north, fedopal, seed 0", "north, fedopal, seed 1",
    ]  # fmt: skip
    assert kept.items() <= stamps(tmp_path).items()
    shutil.copytree(tmp_path, tmp_path.parent / "moved")  # where the results lie decides nothing
    again = compare(one, ["fedopal", "fedit"], [0, 1], tmp_path.parent / "moved", controls=False, notify=third)
    assert third.trained() == []
    assert again["methods"] == found["methods"]
    index = json.loads((tmp_path / "index.json").read_text())["cells"]
    assert {entry["method"] for entry in index.values()} == {"fedit", "fedopal"}
    assert all(entry["state"] == "finished" for entry in index.values())
    assert {path.name for path in (tmp_path / "cells").iterdir()} == set(index)


def test_the_same_images_elsewhere_are_the_same_data_and_changed_ones_are_not(
    sets: tuple[Path, Path], tmp_path: Path
) -> None:
    copied = tmp_path / "copy" / "north"
    shutil.copytree(sets[0], copied)
    compare(experiment(sets[0]), ["fedit"], [0], tmp_path / "out", controls=False)
    same, other = Log(), Log()
    compare(experiment(copied), ["fedit"], [0], tmp_path / "out", controls=False, notify=same)
    assert same.trained() == []
    next(iter(sorted(copied.rglob("*.png")))).unlink()
    compare(experiment(copied), ["fedit"], [0], tmp_path / "out", controls=False, notify=other)
    assert len(other.trained()) == 1


def test_a_stopped_comparison_goes_on_within_the_cell_to_the_same_bytes(
    sets: tuple[Path, Path], tmp_path: Path
) -> None:
    methods, one = ["fedit", "fedopal"], experiment(sets[0], rounds=3)
    whole = compare(one, methods, [0], tmp_path / "whole", controls=False)
    rounds = 0

    def stop(event: dict[str, Any]) -> None:
        nonlocal rounds
        rounds += event["event"] == "round"
        if rounds == 5:  # the second round of the second cell
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(one, methods, [0], tmp_path / "cut", controls=False, notify=stop)
    assert not (tmp_path / "cut" / "comparison.json").exists()
    log = Log()
    resumed = compare(one, methods, [0], tmp_path / "cut", controls=False, notify=log)
    assert log.trained() == ["north, fedopal, seed 0"]
    assert [e["round"] for e in log.events if e["event"] == "round"] == [3]
    assert without_time(resumed["methods"]) == without_time(whole["methods"])
    assert resumed["pairs"] == whole["pairs"]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "target")} for row in rows]


def test_data_that_change_while_they_are_trained_on_seal_nothing(sets: tuple[Path, Path], tmp_path: Path) -> None:
    one = Cell(experiment=experiment(sets[0]).for_method("fedit"), data="north", data_digest="other", label="fedit")
    with pytest.raises(RunError, match="the data changed"):
        run_cells(tmp_path, [one], jobs=1, notify=Log())
    assert state(tmp_path, one) == "waiting"


def test_two_cells_of_one_content_are_trained_once(sets: tuple[Path, Path], tmp_path: Path) -> None:
    log = Log()
    found = compare(experiment(sets[0]), ["fedopal", "fedopal:lam=0.5"], [0], tmp_path, controls=False, notify=log)
    assert len(log.trained()) == 1
    assert len({c["cell"] for c in found["cells"]}) == 1
    assert found["overall"][0]["gain"] == 0.0


@pytest.mark.parametrize(("methods", "seeds"), [([], [0]), (["fedit"], []), (["fedit"], [0, 0]), (["fedit"] * 2, [0])])
def test_methods_and_seeds_once_each(tmp_path: Path, methods: list[str], seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        compare(validate({"path": "x"}), methods, seeds, tmp_path)


def test_a_wrong_name_is_told_before_anything_is_trained(sets: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        compare(experiment(sets[0]), ["fedit", "fedopall"], [0], tmp_path)
    with pytest.raises(DataError, match="the sites are"):
        compare(experiment(sets[0], hold_out="nobody", controls=[]), ["fedit"], [0], tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_failure_names_its_cell_and_a_trial_that_diverges_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise RunError("0 of 2 sites answered: a: the loss is not finite", where="round 1", fix="lower train.lr")

    monkeypatch.setattr("confrere.compare.cells.run_experiment", diverge)
    with pytest.raises(RunError, match=r"x, fedopal, seed 0: .*cells"):
        run_cells(tmp_path, [cell()], jobs=1, notify=Log())
    run_cells(tmp_path, [cell(trial=True)], jobs=1, notify=Log())
    assert state(tmp_path, cell(trial=True)) == "diverged"
    assert state(tmp_path, cell()) == "waiting", "a trial's divergence is no result"

    def full(*_: object, **__: object) -> None:
        raise RunError("cannot write 9 bytes: No space left on device", where="x")

    monkeypatch.setattr("confrere.compare.cells.run_experiment", full)
    with pytest.raises(RunError, match="No space"):
        run_cells(tmp_path, [cell("fedit", trial=True)], jobs=1, notify=Log())
    assert not (folder(tmp_path, cell("fedit")) / "diverged.json").exists()


@pytest.mark.slow
def test_sigkill_then_the_same_command_gives_the_same_numbers(tmp_path: Path) -> None:
    make_microscopy(tmp_path / "data", seed=3, sites=2, images=(24, 30), size=32)
    options = ["backbone.name=test-vit", "adapter.blocks=2", "rounds=3", "train.steps=3", "threads=1"]
    asked = validate(override({"path": str(tmp_path / "data")}, options))
    compare(asked, ["fedit"], [0], tmp_path / "whole", trials=2, controls=False)
    env = {**os.environ, "CONFRERE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    cut_short = tmp_path / "cut"

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "confrere", "compare", tmp_path / "data", *options, "--methods", "fedit",
                   "--seeds", "0", "--tune", "2", "--jobs", "2", "--no-controls", "--out", cut_short]  # fmt: skip
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    cut = start()
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("cut/cells/*/cell.json")) and cut.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    time.sleep(8)  # its two trainings notice within a second and end as by Ctrl-C
    again = start()
    output, _ = again.communicate(timeout=280)
    assert again.returncode == 0, output.decode()
    one, other = (json.loads((tmp_path / n / "comparison.json").read_text()) for n in ("whole", "cut"))
    assert without_time(one["methods"]) == without_time(other["methods"])
    assert one["tuning"] == other["tuning"]
