"""Trackers get numbers by method, site and round; what is not installed says how to install it."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_federation import SITES, tiny_run

from confrere import track
from confrere.errors import MissingExtraError
from confrere.method import make
from confrere.record.run import Run

ROUND = {
    "event": "round",
    "round": 2,
    "seconds": 1.5,
    "sites": {"a": {"loss": 0.5, "examples": 9, "sent_bytes": 10, "received_bytes": 20, "seconds": 1.0}},
    "diagnostics": {
        "aggregation_error": 0.1,
        "overlap_before": {"a": {"A": 0.2, "outputs": None}},
        "overlap_after": None,
        "similarity": None,
    },
}
JUDGED = {"event": "evaluation", "round": 2, "sites": {"a": 0.7, "b": None}, "mean": 0.7, "criterion": 0.6}


def test_events_become_numbers() -> None:
    found = dict(track.scalars(ROUND)) | dict(track.scalars(JUDGED))
    assert found == {
        "seconds": 1.5,
        "loss/a": 0.5,
        "sent_bytes/a": 10.0,
        "received_bytes/a": 20.0,
        "aggregation_error": 0.1,
        "overlap_before_A/a": 0.2,
        "validation/a": 0.7,
        "validation/mean": 0.7,
    }


def test_tags_carry_the_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []

    @contextmanager
    def fake(_: Path):  # type: ignore[no-untyped-def]
        yield lambda tag, value, step: written.append((tag, value, step))

    monkeypatch.setitem(track._OPEN, "tensorboard", fake)
    with track.trackers(["tensorboard"], tmp_path) as notify:
        notify({"event": "method", "name": "local", "rounds": 3})
        notify(JUDGED)
        notify({"event": "prefix", "site": "a", "done": 1, "total": 1})
    assert written == [("local/validation/a", 0.7, 2), ("local/validation/mean", 0.7, 2)]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_tracker_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'confrere\[track\]'"), track.trackers([name], tmp_path):
        pass


def test_a_real_journal_becomes_finite_numbers(tmp_path: Path) -> None:
    tiny_run(make("fedopal"), tmp_path, rounds=2)
    found = [pair for event in Run(tmp_path).events() for pair in track.scalars(event)]
    assert all(isinstance(v, float) and math.isfinite(v) for _, v in found)
    tags = {tag for tag, _ in found}
    assert {f"{kind}/{site}" for kind in ("loss", "validation", "sent_bytes") for site in SITES} <= tags
    assert {"seconds", "aggregation_error", "validation/mean", "overlap_before_A/a", "overlap_after_B/c"} <= tags


def test_other_events_and_unknown_numbers_are_left_out() -> None:
    for kind in ("failure", "stop", "drift", "prefix"):
        assert list(track.scalars({"event": kind, "round": 1})) == []
    assert list(track.scalars({**JUDGED, "sites": {"a": None}, "mean": None})) == []
    quiet = {**ROUND["sites"]["a"], "loss": None}  # type: ignore[index]
    tags = [tag for tag, _ in track.scalars({**ROUND, "sites": {"a": quiet}})]
    assert "loss/a" not in tags
    assert "sent_bytes/a" in tags


def test_no_tracker_is_no_trouble(tmp_path: Path) -> None:
    with track.trackers([], tmp_path) as notify:
        notify({"event": "method", "name": "local", "rounds": 3})
        notify(ROUND)
    assert list(tmp_path.iterdir()) == []
