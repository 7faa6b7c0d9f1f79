"""What is claimed: only what the corrected tests show; and every file a comparison leaves."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import experiment

from confrere.compare import compare
from confrere.compare.evidence import between, corrected, outcome, resamples, sentence
from confrere.compare.recommend import recommend
from confrere.metrics.paired import holm
from confrere.report import write_report

NAMES = ("fedopal", "fedit", "dual", "local", "pooled")


def row(name: str, mean: float, size: float | None = 1e6, seeds: int = 3) -> dict[str, Any]:
    cell = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "worst": mean - 0.1}
    sites = {"a": {"mean": mean - 0.1}}
    found = {"name": name, "balanced_accuracy": cell, "worst_site": "a", "bytes": size, "seeds": list(range(seeds))}
    return {**found, "sites": sites}


def pair(a: str, b: str, gain: float, p: float, half: float = 0.02) -> dict[str, Any]:
    return {"a": a, "b": b, "gain": gain, "low": gain - half, "high": gain + half, "p": p, "note": None}


def text(found: dict[str, Any]) -> str:
    return " ".join(one["text"] for one in found["sentences"])


def test_a_clear_winner_is_named_with_its_evidence() -> None:
    rows = [row("fedopal", 0.8), row("fedit", 0.7), row("local", 0.6, 0.0), row("pooled", 0.82, None)]
    pairs = corrected([
        pair("fedopal", "fedit", 0.1, 0.001), pair("fedopal", "local", 0.2, 0.001), pair("fedit", "local", 0.1, 0.004),
        pair("fedopal", "pooled", -0.02, 0.6, 0.1), pair("fedit", "pooled", -0.12, 0.001),
        pair("pooled", "local", 0.22, 0.001),
    ])  # fmt: skip
    found = recommend(rows, pairs, [])
    assert found["headline"].startswith("Join, with FedOPAL")
    assert (found["winner"], found["within_noise"]) == ("fedopal", [])
    said = text(found)
    assert "beats One shared adapter (FedIT) by +10.0 points of balanced accuracy (95 % interval +8.0 to +12.0" in said
    assert "adjusted p 0.006" in said
    assert "cannot be told apart from pooling" in said
    assert "shown to be better than training alone: One shared adapter (FedIT)" in said
    evidence = [e for one in found["sentences"] for e in one["evidence"]]
    assert {(e["a"], e["b"]) for e in evidence} >= {("fedopal", "fedit"), ("fedopal", "local"), ("fedopal", "pooled")}
    assert all({"gain", "low", "high", "p_holm"} <= set(e) for e in evidence)


def test_within_noise_nothing_is_claimed_and_the_cheapest_is_named() -> None:
    rows = [row("fedopal", 0.71, 9e6), row("fedit", 0.70, 3e6), row("local", 0.69, 0.0)]
    pairs = corrected([
        pair("fedopal", "fedit", 0.01, 0.5), pair("fedopal", "local", 0.02, 0.04), pair("fedit", "local", 0.01, 0.3),
    ])  # fmt: skip
    found = recommend(rows, pairs, [])
    assert found["headline"].startswith("No evidence that joining beats training alone")
    assert found["within_noise"] == ["fedit"]
    assert "does not order them: One shared adapter (FedIT): +1.0" in text(found)
    assert "moves least: 33 % of its bytes" in text(found)
    assert "beats One" not in text(found), "p 0.04 before correction is 0.12 after"


def test_joining_that_hurts_is_said() -> None:
    rows = [row("fedit", 0.5), row("local", 0.7, 0.0)]
    local = [{**one, "site": "riverside"} for one in corrected([pair("fedit", "local", -0.2, 0.001)])]
    found = recommend(rows, corrected([pair("fedit", "local", -0.2, 0.001)]), local)
    assert found["headline"].startswith("Train alone")
    assert "worse at 1 (riverside)" in text(found)


def test_the_best_mean_need_not_be_the_one_that_is_shown_to_pay() -> None:
    rows = [row("fedopal", 0.80), row("fedit", 0.79), row("local", 0.7, 0.0)]
    pairs = corrected([
        pair("fedopal", "fedit", 0.01, 0.9, 0.1), pair("fedopal", "local", 0.10, 0.2, 0.2),
        pair("fedit", "local", 0.09, 0.001),
    ])  # fmt: skip
    headline = recommend(rows, pairs, [])["headline"]
    assert headline.startswith("Join, with One shared adapter (FedIT)")
    assert "has a higher mean, but its difference from training alone is not shown" in headline


def test_without_controls_or_with_one_seed_the_limits_are_said() -> None:
    found = recommend([row("fedit", 0.5, seeds=1)], [], [])
    assert "was not tested" in found["headline"]
    assert "not known" in text(found)
    assert "One seed" in text(found)
    few = {**pair("fedit", "local", 0.1, 0.1), "p": None, "low": None, "high": None, "note": "too few"}
    found = recommend([row("fedit", 0.5), row("local", 0.4)], corrected([few]), [])
    assert "too few test patients" in text(found)
    assert recommend([row("local", 0.4)], [], [])["winner"] is None


def test_the_first_sentence_says_of_how_many_methods_the_best_is_the_best() -> None:
    def said(*names: str) -> str:
        rows = [row(name, 0.7 - 0.1 * place) for place, name in enumerate(names)]
        return str(recommend(rows, [], [])["sentences"][0]["text"])

    three, two = said("ditto", "fedit", "fedper"), said("fedper", "fedit", "local", "pooled")
    assert three.startswith("Of the 3 methods, ")
    assert " has the highest mean balanced accuracy: 70.0 %" in three
    assert three.endswith("The highest of 3 is a little too high by selection.")
    assert two.startswith("Of the 2 methods beside the controls, ")
    assert " has the higher mean balanced accuracy: 70.0 %" in two
    assert two.endswith("The higher of 2 is a little too high by selection.")
    assert said("fedit").startswith(
        "One shared adapter (FedIT), the only method, has a mean balanced accuracy of 70.0 %"
    )
    assert "the only method beside the controls, has" in said("fedit", "local")
    assert "selection" not in said("fedit"), "one was not selected"


@pytest.mark.parametrize("seed", range(40))
def test_no_difference_is_claimed_that_the_corrected_test_does_not_show(seed: int) -> None:
    """Random gains and p-values: every claim in every sentence and headline is held against Holm's p."""
    rng = np.random.default_rng(seed)
    means = {name: float(rng.uniform(0.4, 0.9)) for name in NAMES}
    pairs = []
    for i, a in enumerate(NAMES):
        for b in NAMES[i + 1 :]:
            gain = means[a] - means[b]
            p = float(rng.choice([0.001, 0.01, 0.03, 0.3]))
            half = abs(gain) * (0.5 if p < 0.05 else 2) + 1e-6
            pairs.append(pair(a, b, gain, p, half))
    told = corrected(pairs)
    assert [one["p_holm"] for one in told] == holm([one["p"] for one in pairs])
    found = recommend([row(name, means[name]) for name in NAMES], told, [])
    sure = {(one["a"], one["b"]): one["p_holm"] < 0.05 for one in told}
    for one in found["sentences"]:
        for beaten in re.findall(r" (?:beats|is better than|is below|is worse than) ", one["text"]):
            assert beaten
            if "no evidence" not in one["text"]:
                assert all(e["p_holm"] < 0.05 for e in one["evidence"]), one
    against_local = between(told, found["winner"], "local")
    assert against_local is not None
    if found["headline"].startswith(("Join", "Train alone")):
        assert any(known for (_, b), known in sure.items() if b == "local")
    for one in told:
        claims = any(word in sentence(one) for word in ("is better", "is worse"))
        assert claims == (one["p_holm"] < 0.05) == (outcome(one) != 0)
        if not claims:
            assert one["low"] <= 0 <= one["high"]


def test_a_pair_turned_round_is_the_same_evidence() -> None:
    (one,) = corrected([pair("fedit", "local", 0.1, 0.001)])
    back = between([one], "local", "fedit")
    assert back is not None
    assert (back["gain"], back["low"], back["high"], back["p_holm"]) == (-0.1, -one["high"], -one["low"], 0.001)
    assert "is worse than" in back["sentence"]
    assert between([one], "fedit", "pooled") is None


def test_many_tests_get_resamples_enough_to_show_anything() -> None:
    for tests in (1, 40, 190):
        floor = 2 / (resamples(tests) + 1)
        assert floor * tests < 0.05
    assert resamples(10**6) == 20_000


@pytest.fixture(scope="module")
def compared(sets: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    both = [experiment(path) for path in sets]
    compare(both, ["fedit", "fedopal:head=local"], [0, 1], out, trials=1)
    write_report(out)
    return out


@pytest.mark.slow
def test_two_data_sets_controls_and_tests(compared: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    assert [m["name"] for m in found["methods"]] == ["fedit", "fedopal:head=local", "local", "pooled"]
    assert len(found["cells"]) == 4 * 2 * 2
    sites = set(found["methods"][0]["sites"])
    assert len(sites) == 4
    assert all(name.split("/")[0] in ("north", "south") for name in sites)
    assert len(found["overall"]) == 6, "every pair"
    ps = [one["p_holm"] for one in found["overall"]]
    assert ps == holm([one["p"] for one in found["overall"]])
    assert {(p["a"], p["b"]) for p in found["pairs"]} == {
        ("fedit", other) for other in ("fedopal:head=local", "local", "pooled")
    }
    assert {p["a"] for p in found["local_pairs"]} == {"fedit", "fedopal:head=local", "pooled"}
    family = {(p["a"], p["b"], p["site"]): p for p in found["pairs"] + found["local_pairs"]}
    adjusted = dict(zip(family, holm([p["p"] for p in family.values()]), strict=True))
    assert all(p["p_holm"] == pytest.approx(adjusted[key]) for key, p in family.items())
    assert found["ranks"]["blocks"] == 8
    for method in found["methods"]:
        by_hand = [s["balanced_accuracy"] for s in found["scores"] if s["method"] == method["name"]]
        assert method["balanced_accuracy"]["mean"] == pytest.approx(np.mean(by_hand))
        gain = method["gains"].get("local")
        assert (gain is None) == (method["name"] == "local")
        if gain is not None:
            alone = [s["balanced_accuracy"] for s in found["scores"] if s["method"] == "local"]
            assert gain["sites"] == 4
            assert gain["gain"] == pytest.approx(np.mean(by_hand) - np.mean(alone))
    assert found["methods"][2]["bytes"] == 0
    assert found["methods"][3]["bytes"] is None
    assert found["command"] == ("confrere compare DATA DATA2 --methods fedit,fedopal:head=local --seeds 0,1 --tune 1")


@pytest.mark.slow
def test_tables_for_programs_and_papers(compared: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    with (compared / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    ordered = sorted(found["methods"], key=lambda m: -m["balanced_accuracy"]["mean"])
    assert [r["method"] for r in rows] == [m["name"] for m in ordered], "the highest mean first"
    for line, method in zip(rows, ordered, strict=True):
        assert float(line["balanced_accuracy"]) == method["balanced_accuracy"]["mean"]
        assert float(line["mean_rank"]) == found["ranks"]["ranks"][method["name"]]
        assert line["bytes"] == ("" if method["bytes"] is None else str(method["bytes"]))
    with (compared / "comparison_scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 4 * 2
    tex = (compared / "comparison.tex").read_text()
    body = [line for line in tex.splitlines() if line.endswith(r"\\") and "&" in line]
    assert len(body) == 5
    assert all(line.count("&") == 5 for line in body)
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(body)), "special characters are escaped"
    assert r"\begin{tabular}" in tex
    assert r"\bottomrule" in tex


@pytest.mark.slow
def test_the_page_shows_all_of_it(compared: Path) -> None:
    page = (compared / "comparison.html").read_text()
    found = json.loads((compared / "comparison.json").read_text())
    for heading in ("Against training alone", "Cost", "Ranks", "By hospital", "Differences at single", "Tuning"):
        assert f">{heading}" in page, heading
    assert "Score against bytes" in page
    assert "Critical difference" in page
    for one in found["recommendation"]["sentences"]:
        assert one["text"].split(":")[0].replace(" %", "\u00a0%") in page
    assert "rounds = 2" in page, "the experiment stands there"
    assert "path = " not in page
    assert "://" not in page, "self-contained"
    assert "<script" not in page
    before = page
    write_report(compared)
    assert (compared / "comparison.html").read_text() == before


def test_one_seed_has_an_interval_over_patients(sets: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(experiment(sets[0]), ["fedit"], [0], tmp_path, controls=False, target=0.0)
    assert found["intervals"] == "patients"
    cell = found["methods"][0]["balanced_accuracy"]
    assert cell["low"] < cell["mean"] < cell["high"]
    assert found["ranks"] is None
    assert found["methods"][0]["target"]["reached"] == 1
    write_report(tmp_path)
