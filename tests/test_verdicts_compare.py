"""Verdicts from stored predictions, and a comparison's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confrere.compare.evidence import adjusted, corrected
from confrere.compare.grid import Grid, title
from confrere.compare.table import interval, over_seeds, targets, way_to
from confrere.errors import RunError
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


def test_an_interval_over_seeds_is_students() -> None:
    found = interval([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6)
    assert found["low"] == pytest.approx(0.6 - 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert interval([0.4]) == {"mean": 0.4, "low": None, "high": None}
    assert interval([])["mean"] is None
    assert interval([0.01, 0.99]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert over_seeds([[0.5], []]) is None
    over = over_seeds([[0.2, 0.6], [0.4, 0.8]])
    assert over is not None
    assert (over["mean"], over["worst"]) == (pytest.approx(0.5), pytest.approx(0.3))


def test_words_follow_the_adjusted_p() -> None:
    found = {"gain": 0.1, "low": 0.02, "high": 0.2, "patients": 50, "seeds": 3, "note": None, "a": "fedopal"}
    pairs = [{**found, "site": s, "b": "local", "p": p} for s, p in (("x", 0.001), ("y", 0.03), ("z", 0.4))]
    x, y, z = adjusted(pairs)
    assert "raised the balanced accuracy" in x["sentence"]
    assert x["low"] == 0.02
    for one in (y, z):
        assert "no evidence" in one["sentence"]
        assert one["p_holm"] >= 0.05
        assert one["low"] == 0.0


def test_no_interval_of_a_difference_leaves_what_a_difference_can_be() -> None:
    (one,) = corrected([{"gain": 0.1, "low": -1.5, "high": 1.7, "p": 0.9}])
    assert (one["low"], one["high"]) == (-1.0, 1.0)


def test_labels_become_titles() -> None:
    assert title("fedit:x=1").endswith(", x=1")


class Fake(Grid):
    """A grid whose files are given."""

    def __init__(self, results: dict[str, list[Any]], events: dict[str, list[Any]]) -> None:
        super().__init__(labels=list(results), sets=["d"], seeds=range(len(next(iter(results.values())))), where={})
        object.__setattr__(self, "given", (results, events))

    def results(self, label: str, data: str) -> list[Any]:
        return self.given[0][label]  # type: ignore[attr-defined, no-any-return]

    def events(self, label: str, data: str) -> list[Any]:
        return self.given[1][label]  # type: ignore[attr-defined, no-any-return]


def journal(*scores: float | None) -> list[dict[str, Any]]:
    """Return events of rounds in which site a moves 10 bytes, b 20, a stranger 1000, and which take 2 s each."""
    events: list[dict[str, Any]] = []
    for number, score in enumerate(scores, 1):
        sites = {name: {"sent_bytes": size, "received_bytes": 0} for name, size in (("a", 10), ("b", 20), ("c", 1000))}
        events.append({"event": "round", "round": number, "seconds": 2.0, "sites": sites})
        if score is not None:
            events.append({"event": "evaluation", "round": number, "mean": score, "criterion": score})
    return events


def test_the_way_to_a_target_counts_bytes_and_seconds_of_the_hospitals() -> None:
    assert way_to(journal(0.3, None, 0.6, 0.9), 0.5, ["a", "b"]) == {"round": 3, "bytes": 90.0, "seconds": 6.0}
    assert way_to(journal(0.3, 0.5), 0.5, ["a"]) == {"round": 2, "bytes": 20.0, "seconds": 4.0}
    assert way_to(journal(0.3, 0.4), 0.5, ["a"]) is None
    assert way_to([], 0.0, ["a"]) is None


def test_the_target_is_what_local_only_reached_in_the_rounds_it_kept() -> None:
    results: dict[str, list[Any]] = {"fedit": [{}, {}], "local": [{"round": 2}, {"round": 1}]}
    grid = Fake(results, {"fedit": [[], []], "local": [journal(0.1, 0.6), journal(0.4, 0.9)]})
    assert targets(grid, None) == {"d": pytest.approx((0.6 + 0.4) / 2)}
    assert targets(grid, 0.8) == {"d": 0.8}
    assert targets(Fake({"fedit": [{}]}, {"fedit": [[]]}), None) == {"d": None}
