"""Verdicts from stored predictions, and a comparison's tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from confrere import compare
from confrere.config import validate
from confrere.errors import ConfigError, RunError
from confrere.record.files import write_bytes, write_state
from confrere.verdicts import headline, predictions, site_gain, verdicts

N = 60


def store(run: Path, site: str, right: float, *, named: str = "") -> None:
    """Write predictions of which the share ``right`` is right."""
    labels = np.arange(N) % 2
    said = np.where(np.arange(N) < right * N, labels, 1 - labels)
    chances = np.eye(2)[said] * 0.8 + 0.1
    test = {"probabilities": chances, "labels": labels, "groups": np.arange(N)}
    state = {"test": {k: torch.from_numpy(v) for k, v in test.items()}}
    write_state(run / "sites" / site / "test-personalised.safetensors", state, {"site": named or site})


def test_every_site_hears_whether_joining_paid(tmp_path: Path) -> None:
    for site, ours, local in (("up", 0.95, 0.5), ("down", 0.5, 0.95), ("same", 0.7, 0.7)):
        store(tmp_path / "run", site, ours)
        store(tmp_path / "local", site, local)
    found = verdicts(tmp_path / "run", {"local": tmp_path / "local"}, ["up", "down", "same", "absent"])
    by = {site: v.get("local") for site, v in found["sites"].items()}
    assert by["up"]["low"] > 0 > by["down"]["high"]
    assert by["same"]["low"] <= 0 <= by["same"]["high"]
    assert by["absent"] is None
    assert "joining paid at 1 of 3 sites, hurt at 1, and shows no evidence either way at 1" in found["headline"]
    assert verdicts(tmp_path / "run", {"local": tmp_path / "local"}, ["up"]) == verdicts(
        tmp_path / "run", {"local": tmp_path / "local"}, ["up"]
    )


def test_no_control_no_claim(tmp_path: Path) -> None:
    assert headline({"a": {}}) == "No site has a control to compare with."
    assert predictions(tmp_path, "a") is None
    store(tmp_path / "run", "a", 0.5)
    assert site_gain([tmp_path / "run"], [tmp_path / "none"], "a") is None


def test_predictions_of_another_site_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    store(tmp_path, "a", 0.5, named="b")
    with pytest.raises(RunError, match="belong to site 'b'"):
        predictions(tmp_path, "a")
    file = tmp_path / "sites" / "a" / "test-personalised.safetensors"
    write_bytes(file, file.read_bytes()[:-1])
    with pytest.raises(RunError, match="damaged"):
        predictions(tmp_path, "a")


@pytest.mark.parametrize(("methods", "seeds"), [([], [0]), (["fedit"], []), (["fedit"], [0, 0]), (["fedit"] * 2, [0])])
def test_methods_and_seeds_once_each(tmp_path: Path, methods: list[str], seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        compare.compare(validate({"path": "x"}), methods, seeds, tmp_path)


def test_runs_of_another_experiment_are_not_taken_for_this_one(tmp_path: Path) -> None:
    older = validate({"path": "x", "rounds": 3}).for_method("fedit", seed=0)
    write_bytes(compare.folder(tmp_path, "fedit", 0) / "experiment.toml", older.toml().encode())
    with pytest.raises(RunError, match="another experiment"):
        compare.compare(validate({"path": "x", "rounds": 4}), ["fedit"], [0], tmp_path)


def test_an_interval_over_seeds_is_students() -> None:
    found = compare._interval([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6)
    assert found["low"] == pytest.approx(0.6 - 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert compare._interval([0.4]) == {"mean": 0.4, "low": None, "high": None}
    assert compare._interval([])["mean"] is None
    assert compare._interval([0.01, 0.99]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert compare._over_seeds([[0.5], []]) is None
    over = compare._over_seeds([[0.2, 0.6], [0.4, 0.8]])
    assert over is not None
    assert (over["mean"], over["worst"]) == (pytest.approx(0.5), pytest.approx(0.3))


def test_words_follow_the_adjusted_p() -> None:
    found = {"gain": 0.1, "low": 0.02, "high": 0.2, "patients": 50, "seeds": 3, "note": None, "a": "fedopal"}
    pairs = [{**found, "site": s, "b": "local", "p": p} for s, p in (("x", 0.001), ("y", 0.03), ("z", 0.4))]
    x, y, z = compare.adjusted(pairs)
    assert "raised the balanced accuracy" in x["sentence"]
    assert x["low"] == 0.02
    for one in (y, z):
        assert "no evidence" in one["sentence"]
        assert one["p_holm"] >= 0.05
        assert one["low"] == 0.0


def test_labels_become_folders_and_titles() -> None:
    assert compare.folder(Path("o"), "fedopal:head=local:lam=2.0", 3) == Path(
        "o/runs/fedopal+head=local+lam=2.0/seed-3"
    )
    assert compare.title("fedit:x=1").endswith(", x=1")
