"""The dict behind the report, without any HTML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_runs as runs

from confrere.errors import RunError
from confrere.metrics.classification import evaluate
from confrere.metrics.paired import paired_gain
from confrere.report import card, summarize, summarize_comparison
from confrere.report.sheet import arrange
from confrere.report.summarize import DRAWN, _drawn, gain_limit, model_scores, outcome


def test_a_full_run_has_every_section(tmp_path: Path) -> None:
    summary = summarize(runs.make_run(tmp_path, failures=True))
    assert summary["omitted"] == []
    assert [model["key"] for model in summary["models"]] == ["personalised", "general", "local", "pooled"]
    assert [card["outcome"] for card in summary["verdicts"]["cards"]] == [
        "helped",
        "unclear",
        "unclear",
        "lowered",
    ]
    assert summary["curves"]["chosen"] == 10
    assert len(summary["curves"]["sites"]["rosendahl"]) == 14
    assert set(summary["separation"]) == {"A", "B", "product", "outputs"}
    assert summary["similarity"]["round"] == 14
    assert summary["failures"][0]["site"] == "vienna_dias"
    assert summary["traffic"]["total"]["sent_bytes"] == 4 * 14 * 594_432
    json.dumps(summary, allow_nan=False)


def test_audits_are_shown_as_they_were_written(tmp_path: Path) -> None:
    lira, rmia = summarize(runs.make_run(tmp_path))["audits"]
    assert (lira["name"], rmia["name"]) == ("lira", "rmia")
    assert (lira["bounded"], rmia["bounded"]) == (False, True)
    assert [(group["model"], group["at"]) for group in lira["main"]] == [
        (model, "all hospitals") for model in ("general", "update", "personalised")
    ]
    assert [group["rows"][0]["finding"] for group in lira["main"]] == ["not found", "unclear", "found"]
    assert rmia["main"][2]["rows"][0]["said"] == "more than the guarantee allows"
    assert len(lira["others"]) == 3 * 4
    shutil.rmtree(tmp_path / "audits")
    summary = summarize(tmp_path)
    assert summary["audits"] == []
    assert [item["section"] for item in summary["omitted"]] == ["What attacks learn of patients"]


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    summary = summarize(runs.make_run(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())
    site = summary["sites"][0]
    given = written["sites"]["rosendahl"]["models"]["personalised"]
    assert site["models"]["personalised"]["metrics"]["auroc"] == given["auroc"]
    assert site["models"]["personalised"]["chance"] == 1 / 4  # five classes, one absent
    assert summary["across"][0]["worst"] == written["summary"]["personalised"]["worst"]
    local = [s["models"]["local"]["metrics"]["balanced_accuracy"]["value"] for s in summary["sites"]]
    assert summary["across"][2]["mean"] == pytest.approx(sum(local) / 4)


def test_a_model_that_is_the_same_for_all_is_shown_once(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    first, *others = written["sites"].values()
    for site in others:
        site["models"]["general"] = site["models"]["personalised"]
    for last, expected in ((None, ["personalised", "general"]), ("personalised", ["general"])):
        first["models"]["general"] = first["models"][last] if last else first["models"]["general"]
        runs.write(tmp_path / "results.json", written)
        summary = summarize(tmp_path)
        assert [model["key"] for model in summary["models"]] == [*expected, "local", "pooled"]
        assert {site["main"] for site in summary["sites"]} == {expected[0]}
    assert summary["sites"][0]["models"]["general"]["n"] == first["models"]["personalised"]["n"]


def test_a_clear_difference_from_pooled_data_is_said_beside_an_unclear_one_from_training_alone(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    given = json.loads((tmp_path / "verdicts.json").read_text())
    pooled = given["sites"]["vidir_modern"]["pooled"]
    pooled |= {"gain": -0.253, "low": -0.424, "high": -0.086, "sentence": "At vidir_modern, it lowered the score."}
    runs.write(tmp_path / "verdicts.json", given)
    summary = summarize(tmp_path)
    cards = {one["site"]: one for one in summary["verdicts"]["cards"]}
    assert cards["vidir_modern"]["outcome"] == "unclear"
    assert {site: one["shown"] for site, one in cards.items() if one["shown"]} == {"vidir_modern": [pooled["sentence"]]}
    assert card(summary).count(pooled["sentence"]) == 1


def test_only_results_and_federation_are_required(tmp_path: Path) -> None:
    runs.make_run(tmp_path, controls=False)
    for name in ("events.jsonl", "backbone.json", "experiment.toml"):
        (tmp_path / name).unlink()
    summary = summarize(tmp_path)
    assert {item["section"] for item in summary["omitted"]} == {
        "Verdicts", "Learning curves", "Similarity of the sites", "Separation of the adapters", "Experiment",
    }  # fmt: skip
    assert summary["verdicts"] is None


@pytest.mark.parametrize("name", ["results.json", "federation.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    runs.make_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match=name):
        summarize(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    runs.make_run(tmp_path)
    (tmp_path / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"results\.json"):
        summarize(tmp_path)


@pytest.mark.parametrize("key", ["sites", "method"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    runs.make_run(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    runs.write(tmp_path / "results.json", {k: v for k, v in written.items() if k not in (key, "title")})
    with pytest.raises(RunError, match=f"'{key}' is missing"):
        summarize(tmp_path)


def test_an_event_cut_off_at_the_end_is_left_out_but_a_damaged_one_is_refused(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    log = tmp_path / "events.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"event": "roun')
    assert len(summarize(tmp_path)["curves"]["mean"]) == 14
    log.write_text("{oops\n" + whole)
    with pytest.raises(RunError, match=r"events\.jsonl, line 1"):
        summarize(tmp_path)


def test_undefined_scores_stay_undefined(tmp_path: Path) -> None:
    summary = summarize(runs.make_run(tmp_path, undefined=True))
    last = summary["sites"][-1]
    assert last["models"]["personalised"]["metrics"]["auroc"] == {"value": None, "low": None, "high": None}
    assert last["models"]["personalised"]["chance"] is None
    assert summary["verdicts"]["cards"][-1]["outcome"] == "undefined"


def test_a_held_out_site_has_the_general_model_only(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    written["held_out"] = "vienna_dias"
    written["sites"]["vienna_dias"]["held_out"] = True
    written["sites"]["vienna_dias"]["models"]["personalised"] = None
    runs.write(tmp_path / "results.json", written)
    site = summarize(tmp_path)["sites"][-1]
    assert (site["held_out"], site["main"]) == (True, "general")


def test_only_training_alone_decides_whether_joining_paid(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    written = json.loads((tmp_path / "verdicts.json").read_text())
    del written["sites"]["rosendahl"]["local"]
    runs.write(tmp_path / "verdicts.json", written)
    card = summarize(tmp_path)["verdicts"]["cards"][0]
    assert card["outcome"] == "undefined"
    assert [gain["other"] for gain in card["gains"]] == ["pooled"]


def test_nan_in_a_file_is_read_as_undefined(tmp_path: Path) -> None:
    runs.make_run(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    written["sites"]["rosendahl"]["models"]["personalised"]["ece"]["value"] = float("nan")
    runs.write(tmp_path / "results.json", written)
    assert summarize(tmp_path)["sites"][0]["models"]["personalised"]["metrics"]["ece"]["value"] is None


def test_of_many_hospitals_those_with_the_lowest_scores_are_drawn_and_unscored_ones_last() -> None:
    def site(name: str, value: float | None) -> dict[str, Any]:
        scores = {"metrics": {"balanced_accuracy": {"value": value}}}
        return {"name": name, "main": "personalised" if value != 0.99 else None, "models": {"personalised": scores}}

    many = [site(f"s{k:02d}", 0.9 - k / 100) for k in range(30)] + [site("u1", None), site("u2", 0.99)]
    assert _drawn(many) == sorted(f"s{k:02d}" for k in range(30 - DRAWN, 30))
    assert _drawn(many[-3:]) == ["s29", "u1", "u2"]


def test_outcome_needs_an_interval_that_excludes_zero() -> None:
    def gain(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
        return {"gain": value, "low": low, "high": high}

    assert outcome(gain(0.1, 0.01, 0.2)) == "helped"
    assert outcome(gain(-0.1, -0.2, -0.01)) == "lowered"
    assert outcome(gain(0.1, 0.0, 0.2)) == "unclear"
    assert outcome(gain(0.1, None, None)) == "undefined"


def test_what_the_metrics_package_writes_is_understood() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=40)
    labels, groups = rng.integers(0, 2, 40), np.arange(40) // 2
    scores = evaluate(probabilities, labels, groups, classes=["a", "b", "c"], generator=rng, resamples=50)
    read = model_scores(scores, ["a", "b", "c"])
    assert read["metrics"]["balanced_accuracy"] == scores["balanced_accuracy"]
    assert read["chance"] == 1 / 2
    assert read["recall"]["c"] == {"value": None, "low": None, "high": None}
    ours, theirs = (probabilities, labels, groups), ((1 - probabilities) / 2, labels, groups)
    gain = paired_gain([ours], [theirs], generator=rng, resamples=50)
    assert outcome(gain) in {"helped", "lowered", "unclear"}


def test_the_axis_of_gains_holds_every_interval() -> None:
    assert gain_limit([]) == 0.05
    assert gain_limit([{"gain": 0.0, "low": -0.101, "high": 0.02}]) == 0.15
    assert gain_limit([{"gain": 0.1, "low": 0.1, "high": 0.1}]) == 0.1


def test_the_sheet_is_arranged_in_tables_and_keeps_unknown_keys() -> None:
    counts = {
        "nv": {"train": 3, "val": 1, "test": "?", "total": 9},
        "mel": {"train": 0, "val": 0, "test": 0, "total": 0},
    }
    sheet = arrange(
        {
            "sites": {
                "a": {
                    "images": 9,
                    "splits": {"train": {"images": 3, "patients": 2}},
                    "classes": counts,
                    "odd": [1, 2, 3],
                }
            },
            "warnings": ["w"],
            "shared_pictures": 0,
        },
        ["nv", "mel"],
    )
    assert sheet is not None
    assert sheet["columns"] == ["Images", "Train images / patients"]
    assert sheet["rows"][0]["cells"] == [9, "3 / 2"]
    assert sheet["classes"]["parts"] == ["train", "val", "test"]
    assert sheet["classes"]["rows"][1]["cells"][0]["total"] == 0
    assert sheet["rest"]["columns"] == ["Odd"]
    assert sheet["extra"] == [["Shared pictures", 0]]
    assert arrange({}, ["nv"]) is None


def test_a_comparison(tmp_path: Path) -> None:
    summary = summarize_comparison(runs.make_comparison(tmp_path))
    assert len(summary["methods"]) == 6
    assert summary["methods"][0]["general"]["value"] is None
    assert {pair["outcome"] for pair in summary["pairs"]} == {"helped", "unclear"}
    json.dumps(summary, allow_nan=False)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(RunError, match="'methods' is missing"):
        summarize_comparison(tmp_path)
