"""The page in a browser: no errors, no overflow, two schemes, nothing drawn over anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_runs as runs
from pages import CONTRAST, MARKS, show
from PIL import Image
from report_numbers import MASKS

from confrere.report import write_report

pytestmark = MARKS

OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  for (const [i, [name, a]] of boxes.entries()) {
    if (a.left < frame.left - 1 || a.right > frame.right + 1
        || a.bottom > frame.bottom + 1 || a.top < frame.top - 1)
      found.push(name + " leaves its drawing");
    for (const [other, b] of boxes.slice(i + 1))
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5) found.push(name + " over " + other);
  }
}
return found;
"""
EMPTY = """
return [...document.querySelectorAll("svg")].filter(svg => {
  const box = svg.getBoundingClientRect();
  return box.width < 10 || box.height < 8 || !svg.querySelector("path, line, circle, rect");
}).map(svg => svg.outerHTML.slice(0, 120));
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pages")
    runs.make_run(root / "four")
    runs.make_run(
        root / "eight",
        sites=runs.LONG_SITES,
        classes=runs.LONG_CLASSES,
        rounds=60,
        failures=True,
        undefined=True,
    )
    runs.make_run(root / "two", sites=["a", "b"], classes=["benign", "malignant"], rounds=1, undefined=True)
    runs.make_comparison(root / "comparison", sites=runs.LONG_SITES)
    return {folder.name: write_report(folder).as_uri() for folder in sorted(root.iterdir())}


@pytest.mark.parametrize("name", ["four", "eight", "two", "comparison"])
def test_nothing_is_empty_overlaps_or_fails(browser: Any, pages: dict[str, str], name: str) -> None:
    for width in (1200, 360):
        show(browser, pages[name], width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERLAPS) == []
        assert browser.execute_script(EMPTY) == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["four", "comparison"])
def test_light_and_dark_differ_and_both_can_be_read(browser: Any, pages: dict[str, str], name: str) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        show(browser, pages[name], scheme=scheme)
        papers.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        ratio, where = browser.execute_script(CONTRAST)
        assert ratio >= 4.5, where
    assert len(papers) == 2


def test_curves_follow_the_scheme(browser: Any, pages: dict[str, str]) -> None:
    strokes = set()
    for scheme in ("light", "dark"):
        show(browser, pages["four"], scheme=scheme)
        script = "return getComputedStyle(document.querySelector('figure svg path[style*=accent]')).stroke"
        strokes.add(browser.execute_script(script))
    assert len(strokes) == 2


def test_paper_is_white_shows_folded_parts_and_has_no_navigation(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["eight"], scheme="dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    height = "return document.querySelector('details table').getBoundingClientRect().height"
    assert browser.execute_script(height) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_pages_of_another_task_fit_and_can_be_read(browser: Any, tmp_path: Path, kind: str) -> None:
    """Leaves pictures of both in ``tmp_path``: light and dark, wide and on a phone."""
    if kind == "run":
        runs.make_run(tmp_path / kind, sites=runs.LONG_SITES, classes=runs.ORGANS, task=MASKS)
    else:
        runs.make_comparison(tmp_path / kind, sites=runs.LONG_SITES, task=MASKS)
    address, seen = write_report(tmp_path / kind).as_uri(), set()
    for scheme in ("light", "dark"):
        for width in (1200, 360):
            show(browser, address, width=width, scheme=scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script(OVERLAPS) == []
            assert browser.execute_script(EMPTY) == []
            ratio, where = browser.execute_script(CONTRAST)
            assert ratio >= 4.5, where
            text = browser.execute_script("return document.body.innerText")
            assert "balanced accuracy" not in text.lower()
            assert "HD95" in text
            picture = tmp_path / f"{scheme}-{width}.png"
            browser.save_screenshot(str(picture))
            seen.add(Image.open(picture).convert("RGB").resize((1, 1)).getpixel((0, 0)))
    assert len(seen) == 4
    assert browser.get_log("browser") == []
