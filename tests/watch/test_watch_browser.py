"""The live page in a browser: it moves by itself, fits a phone, can be read in both schemes, and runs no foreign text.

With ``CONFRERE_SCREENSHOTS=DIR`` it leaves pictures there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import watch_runs as runs
from pages import CONTRAST, MARKS, show

from confrere.record.run import Run
from confrere.watch.serve import Served, start

pytestmark = [pytest.mark.slow, *MARKS]
SITES = ("centre-hospitalier-universitaire-de-quebec", "north", "royal-infirmary-of-edinburgh", "south", "west")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Five sites, of which one is offline, one refused and one awaited; eight rounds, some answers refused."""
    run, now = runs.begin(tmp_path / "run", controls=("local", "pooled")), time.time()
    for round_ in range(1, 9):
        failures = [runs.failed(round_, "west", reason=f"lora.A holds NaN; {HOSTILE}")] if round_ in (3, 7) else []
        runs.one_round(run, round_, SITES[:4] if failures else SITES, *failures)
    told = {site: {"online": True, "seen": now, "waiting": False, "refused": ""} for site in SITES}
    told["north"] |= {"waiting": True}
    told["south"] |= {"online": False, "seen": now - 190}
    told["west"] |= {"online": False, "refused": "kit-expired"}
    runs.status(run, updated=now, sites=told, consortium="dermatology-north")
    return run


@pytest.fixture
def served(run: Path) -> Iterator[Served]:
    made = start(run, port=0)
    yield made
    made.stop()


def wait(browser: Any, found: Callable[[str], bool], seconds: float = 30) -> str:
    """Return the text of the page once ``found`` says yes to it."""
    until = time.monotonic() + seconds
    while True:
        text = str(browser.execute_script("return document.body.innerText"))
        if found(text) or time.monotonic() > until:
            return text
        time.sleep(0.2)


def opened(browser: Any, served: Served, **how: Any) -> str:
    show(browser, served.address, **how)
    return wait(browser, lambda text: "of 20" in text)


def picture(browser: Any, name: str) -> None:
    if folder := os.environ.get("CONFRERE_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        width = browser.execute_script("return innerWidth")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_the_round_advances_without_reload(browser: Any, served: Served, run: Path) -> None:
    assert "8 of 20" in opened(browser, served)
    assert "token" not in browser.current_url
    browser.execute_script("window.mine = true")
    runs.one_round(run, 9, SITES)
    assert "9 of 20" in wait(browser, lambda text: "9 of 20" in text)
    assert browser.execute_script("return window.mine && document.title").startswith("9/20")
    Run(run).append({"event": "end", "round": 9, "files": {}})
    runs.status(run, "failed", updated=time.time(), error="0 of 5 sites answered")
    assert "Failed: 0 of 5 sites answered" in wait(browser, lambda text: "Failed:" in text)
    assert browser.get_log("browser") == []


def test_it_says_who_is_offline_refused_or_awaited(browser: Any, served: Served) -> None:
    text = opened(browser, served)
    for words in ("dermatology-north", "refused: kit-expired", "offline, seen 3 min ago", "waited for", "3 of 5"):
        assert words in text
    assert HOSTILE in text, "as text"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_fits_and_can_be_read(browser: Any, served: Served, width: int, scheme: str) -> None:
    opened(browser, served, width=width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ratio, where = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, where
    inside = "const b = document.querySelector('.line.strong').getBoundingClientRect(); return b.width > 50"
    assert browser.execute_script(inside)
    assert browser.get_log("browser") == []
    picture(browser, f"{scheme}-{width}")


def test_it_says_that_nobody_answers_any_more(browser: Any, run: Path) -> None:
    gone = start(run, port=0)
    opened(browser, gone)
    gone.stop()
    assert "No answer" in wait(browser, lambda text: "No answer" in text)
    assert "8 of 20" in wait(browser, lambda text: True), "the last that is known stays"
    browser.get_log("browser")


def test_a_run_that_has_not_begun_is_shown(browser: Any, tmp_path: Path) -> None:
    fresh = start(runs.begin(tmp_path / "fresh", controls=("local",)), port=0)
    try:
        text = opened(browser, fresh, width=360)
        assert "Waiting for sites or data" in text
        assert "No round was judged yet" in text
        assert browser.get_log("browser") == []
        picture(browser, "fresh-360")
    finally:
        fresh.stop()
