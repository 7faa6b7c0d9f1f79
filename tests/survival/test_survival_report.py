"""The report of a run on times: curves of groups that are large enough, and nothing where no group is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pages import CONTRAST, MARKS, show

from confrere.config import validate
from confrere.job import run_experiment
from confrere.report import write_report
from confrere.report.render import render
from confrere.seeds import numpy_generator

FEWEST = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run at three hospitals, one with few patients; the first feature decides how long they live."""
    root = tmp_path_factory.mktemp("survival-report")
    with (root / "registry.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "split", "time", "event", "age"])
        for site, tested in (("few", 9), ("some", 25), ("whole", 150)):
            rng = numpy_generator(0, "report", site)
            for index in range(tested + 24):
                age, end = rng.normal(), rng.uniform(4, 14)
                time = float(rng.exponential(8 * 2.0**-age)) + 0.01
                split = "test" if index < tested else "val" if index % 4 == 0 else "train"
                writer.writerow([site, split, f"{min(time, end):.3f}", int(time <= end), f"{age:.3f}"])
    chosen = {
        "path": str(root / "registry.csv"),
        "task": {"name": "survival", "horizon": 10.0, "bins": 10, "curve": "cox"},
        "rounds": 3,
        "threads": 1,
        "workers": 1,
        "controls": [],
        "method": {"name": "fedit"},
        "backbone": {"name": "mlp"},
        "adapter": {"blocks": 2, "rank": 8},
        "train": {"steps": 5, "batch_size": 18, "lr": 1e-2, "balance": "none"},
    }
    run_experiment(validate(chosen), root / "run")
    write_report(root / "run")
    return root / "run"


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_curves_are_of_groups_and_not_of_patients(run: Path) -> None:
    told, written = summary(run), json.loads((run / "results.json").read_text())["sites"]
    groups = {site["name"]: site["survival"] for site in told["sites"]}
    assert [len(groups[name]) for name in ("few", "some", "whole")] == [0, 2, 3]
    for name, found in groups.items():
        assert found == written[name]["models"]["personalised"]["curves"]
        assert all(group["patients"] >= FEWEST and len(group["times"]) <= 5 for group in found)
    assert [group["observed"][0] for group in groups["whole"]] == sorted(g["observed"][0] for g in groups["whole"])
    few = written["few"]["models"]["personalised"]
    assert few["curves"] == few["calibration"] == few["kaplan_meier"]["times"] == few["by_time"]["times"] == []
    assert [site["models"]["personalised"]["n"] for site in written.values()] == [9, 25, 150]


def test_the_page_draws_them_and_says_what_they_are(run: Path) -> None:
    page, told = (run / "report.html").read_text(), summary(run)
    section = page[page.index('id="survival"') :].partition("</section>")[0]
    assert section.count("<svg viewBox") == 3 + 2, "three keys, two hospitals"
    assert "<b>few</b>" not in section
    assert "12 + 13 patients" in section or "13 + 12 patients" in section
    assert "None" not in section
    assert "ten test patients or more" in section
    assert '<a href="#survival">' in page
    assert "Survival curves" not in [item["section"] for item in told["omitted"]]
    for site in told["sites"]:
        site["survival"] = []
    assert 'id="survival"' not in render(told)


def test_older_results_have_no_curves(run: Path, tmp_path: Path) -> None:
    for name in ("results.json", "federation.json", "events.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    results = json.loads((run / "results.json").read_text())
    for site in results["sites"].values():
        for model in site["models"].values():
            del model["curves"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    assert "Survival curves" in [item["section"] for item in summary(tmp_path)["omitted"]]


@pytest.mark.slow
@MARKS[0]
@MARKS[1]
def test_curves_fit_and_can_be_read_in_both_schemes(browser: Any, run: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        for width in (1200, 360):
            show(browser, (run / "report.html").as_uri(), width=width, scheme=scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            ratio, where = browser.execute_script(CONTRAST)
            assert ratio >= 4.5, where
        line = "document.querySelector('section[aria-labelledby=survival] figure svg path[style*=warm]')"
        colours.add(browser.execute_script(f"return getComputedStyle({line}).stroke"))
        outside = """return [...document.querySelectorAll('section[aria-labelledby=survival] figure svg')].filter(s => {
          const f = s.getBoundingClientRect();
          return [...s.querySelectorAll('text')].some(t => { const b = t.getBoundingClientRect();
            return b.left < f.left - 1 || b.right > f.right + 1 || b.bottom > f.bottom + 1; }); }).length"""
        assert browser.execute_script(outside) == 0
    assert len(colours) == 2
    assert browser.get_log("browser") == []
