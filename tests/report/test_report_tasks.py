"""A report follows the task of its run: other scores, other words, and no number that is not in the JSON."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs
from huggingface_hub import ModelCard
from report_numbers import MASKS

from confrere.errors import RunError
from confrere.report import render, summarize, summarize_comparison, write_report
from confrere.report.render import _axis, amount, decimal, duration, percent, points, size
from confrere.report.task import METRICS, task_of
from confrere.tasks.multilabel import MultiLabel

OF_CLASSES = re.compile(r"balanced|accura|auroc|\bF1\b|\bECE\b|calibrat|confusion|chance between|is chance", re.I)
OF_THE_WORDS = {"95", "100", "0", "1", "70", "76", "6"}
"""Numbers of the page's own sentences."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = runs.make_run(tmp_path_factory.mktemp("masks"), classes=runs.ORGANS, task=MASKS)
    write_report(made)
    return made


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = runs.make_comparison(tmp_path_factory.mktemp("compared"), task=MASKS)
    write_report(made)
    return made


def shown(page: str) -> str:
    """Return the text that a reader sees and one who listens hears, without that of drawings."""
    told = " ".join(re.findall(r'aria-label="([^"]*)"', page))
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.S)
    return re.sub(r"<[^>]+>", " ", page) + told


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        yield len(value)
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def tokens(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace("\u202f", "")))


def from_json(summary: dict[str, Any]) -> set[str]:
    found = set(OF_THE_WORDS)
    ways = (percent, decimal, lambda v: decimal(v, 3), points, size, duration, amount, lambda v: f"{v:.4g}")
    axes = [_axis(summary), summary.get("axis", {}), summary.get("verdicts"), *([summary.get("ranks")])]
    ends = [end for axis in axes for end in leaves(axis) if isinstance(end, float)]
    ends += [summary[key] for key in ("limit", "overall_limit") if key in summary]
    for leaf in leaves(summary):
        if isinstance(leaf, str):
            found |= tokens(leaf)
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            found |= {token for way in ways for token in tokens(way(leaf))} | tokens(str(leaf))
    return found | {f"{100 * end:.0f}" for end in ends} | {str(n) for n in range(len(summary.get("methods", [])) + 1)}


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_the_page_speaks_of_its_own_scores_only(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    texts = {
        path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".html", ".md", ".csv", ".tex")
    }
    assert len(texts) == (2 if kind == "run" else 4)
    for name, text in texts.items():
        visible = shown(text) if name.endswith("html") else text
        assert not OF_CLASSES.search(visible.replace("chance between trainings", "")), name
        assert "dice" in visible.lower(), name
    page = texts["report.html" if kind == "run" else "comparison.html"]
    for column in ("Dice, %", "IoU, %", "HD95, % of diagonal, less is better", "Box IoU, %"):
        assert f">{column}<" in page
    assert "segmentation into 5 classes" in page
    assert "None" not in shown(page)


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_an_image_with_several_findings_is_of_no_class(kind: str, tmp_path: Path) -> None:
    make: Any = runs.make_run if kind == "run" else runs.make_comparison
    findings = MultiLabel().describe()
    for path in make(tmp_path, task=MASKS).rglob("*.json"):  # the same numbers, of another task
        text = path.read_text()
        for old, new in zip(MASKS["measures"], findings["measures"], strict=True):
            text = text.replace(f'"{old}"', f'"{new}"')
        told = json.loads(text)
        path.write_text(json.dumps(told | {"task": findings} if "task" in told else told))
    write_report(tmp_path)
    page = shown((tmp_path / ("report.html" if kind == "run" else "comparison.html")).read_text())
    assert re.search(r"multi-label classification, \d findings", page)
    assert "AUROC, %" in page  # shown as a share, as the headline of any task
    assert not re.search(r"(?i)(by|over|every|of the|[0-9]) class", page)
    if kind == "run":
        assert "By finding" in page
        assert "without it; 50 is guessing" in page
        assert "AUROC of the personalised model for every finding" in page
        assert re.search(r"with \d findings", (tmp_path / "card.md").read_text())


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_every_number_of_the_page_is_in_the_json(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    page = (folder / ("report.html" if kind == "run" else "comparison.html")).read_text()
    summary = json.loads((folder / "report.json").read_text())
    assert tokens(shown(page)) <= from_json(summary)
    assert render(summary) == page
    summary["task"]["measures"][0]["column"] = "Dice, 47.11 %"
    assert "47.11" in tokens(shown(render(summary))) - from_json(json.loads((folder / "report.json").read_text()))


def test_the_numbers_of_the_json_are_those_of_the_files(run: Path, comparison: Path) -> None:
    summary, written = summarize(run), json.loads((run / "results.json").read_text())
    for site in summary["sites"]:
        given = written["sites"][site["name"]]["models"]["personalised"]
        assert site["models"]["personalised"]["metrics"] == {key: given[key] for key in MASKS["measures"]}
        assert site["models"]["personalised"]["by_class"] == given["by_class"]
        assert site["models"]["personalised"]["chance"] is None
    assert summary["across"][0]["mean"] == written["summary"]["personalised"]["mean"]
    local = [site["models"]["local"]["metrics"]["dice"]["value"] for site in summary["sites"]]
    assert summary["across"][2]["mean"] == pytest.approx(sum(local) / 4)
    given = {one["name"]: one for one in json.loads((comparison / "comparison.json").read_text())["methods"]}
    told = summarize_comparison(comparison)
    assert [one["dice"]["value"] for one in told["methods"]] == sorted(
        (one["dice"]["mean"] for one in given.values()), reverse=True
    )
    with (comparison / "comparison.csv").open() as file:
        for line in csv.DictReader(file):
            method = given[line["method"]]
            assert [float(line[key]) for key in MASKS["measures"]] == [method[k]["mean"] for k in MASKS["measures"]]
    assert "& Dice &" in (comparison / "comparison.tex").read_text()


def test_classes_have_a_dice_and_strata_their_images(run: Path, tmp_path: Path) -> None:
    page, summary = (run / "report.html").read_text(), summarize(run)
    assert summary["by_class"] == runs.ORGANS[1:]
    assert summary["omitted"] == []
    part = page[page.index('id="classes"') :].partition("</section>")[0]
    cell = summary["sites"][0]["models"]["personalised"]["by_class"]["spleen"]
    assert ">spleen</th>" in part
    assert f"<td>{percent(cell['value'])} <" in part
    assert "background" not in part
    assert "Images per stratum" in page
    assert [row["name"] for row in summary["sheet"]["classes"]["rows"]] == runs.STRATA
    two = summarize(runs.make_run(tmp_path, classes=["background", "disc"], task=MASKS))
    assert two["by_class"] == [], "one class is the whole score"
    assert 'id="classes"' not in render(two)


def test_the_card_is_one_of_segmentation(run: Path) -> None:
    parsed = ModelCard((run / "card.md").read_text())
    assert parsed.data.pipeline_tag == "image-segmentation"
    assert {result.metric_type for result in parsed.data.eval_results} == set(MASKS["measures"])
    assert {result.task_type for result in parsed.data.eval_results} == {"image-segmentation"}
    assert "LoRA adapters for image segmentation with 5 classes" in parsed.text
    assert "| Dice, % | IoU, % |" in parsed.text


def test_older_files_are_of_classification(tmp_path: Path) -> None:
    summary = summarize(runs.make_run(tmp_path))
    assert [measure["key"] for measure in summary["task"]["measures"]] == list(METRICS)
    page = render(summary)
    for words in (
        "The dotted line is chance",
        ">Balanced accuracy, %<",
        ">ECE</th>",
        'id="confusion"',
        "Images per class",
    ):
        assert words in page
    assert 'id="classes"' not in page
    given = summarize_comparison(runs.make_comparison(tmp_path / "compared"))["task"]
    assert [measure["key"] for measure in given["measures"]] == ["balanced_accuracy", "auroc", "f1", "ece"]


def test_a_task_of_a_later_version_is_shown_as_it_names_itself(tmp_path: Path) -> None:
    run = runs.make_run(tmp_path, classes=runs.ORGANS, task=MASKS)
    results = json.loads((run / "results.json").read_text())
    results["task"]["measures"] |= {"later": "Something <new>"}
    runs.write(run / "results.json", results)
    assert '<th scope="col">Something &lt;new&gt;, %</th>' in render(summarize(run))


@pytest.mark.parametrize(
    "task",
    ["segmentation", None, {}, {"name": "x", "measures": {"a": "A"}}, {"name": "x", "measures": [], "headline": "a"},
     {"name": "x", "measures": {"a": "A"}, "headline": "b"}],
)  # fmt: skip
def test_a_damaged_task_is_told(task: Any) -> None:
    with pytest.raises(RunError, match=r"results\.json, task") as caught:
        task_of({"task": task}, "results.json")
    assert caught.value.code == "run-file"
