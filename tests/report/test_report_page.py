"""The page and the card: written from a summary alone, complete in themselves, nothing from outside."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_runs as runs
from huggingface_hub import ModelCard

from confrere.errors import MissingExtraError
from confrere.report import card, render, summarize, summarize_comparison, write_report
from confrere.report.charts import reliability
from confrere.report.render import amount, decimal, duration, percent, plain, points, position, size

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects ids and targets, and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.levels: list[int] = []
        self.unlabelled = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if (given.get("href") or "").startswith("#"):
            self.targets.append(str(given["href"])[1:])
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden")):
            self.unlabelled += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    run = runs.make_run(
        folder, sites=runs.LONG_SITES, classes=runs.LONG_CLASSES, rounds=60, failures=True, undefined=True
    )
    return summarize(run)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return summarize(runs.make_run(tmp_path_factory.mktemp("run"), sites=["a", "b"], rounds=3))


@pytest.fixture(scope="module")
def page(full: dict[str, Any]) -> str:
    return render(full)


@pytest.fixture(scope="module")
def other(small: dict[str, Any]) -> str:
    """The page of a method with one adapter, where a temperature made the first site's calibration worse."""
    first, *rest = small["sites"]
    worse = first | {"ece_before": first["models"]["personalised"]["metrics"]["ece"]["value"] - 0.05}
    one, *more = small["verdicts"]["cards"]
    cards = [one | {"shown": ["Below pooled data."]}, *more]
    return render(
        small | {"separation": None, "sites": [worse, *rest], "verdicts": small["verdicts"] | {"cards": cards}}
    )


def test_the_page_is_well_formed_and_accessible(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.targets) <= set(checker.ids)
    assert checker.levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(checker.levels, checker.levels[1:], strict=False))
    assert checker.unlabelled == 0
    assert '<html lang="en">' in page


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"<script|<iframe|<img|@import|url\((?!#)|src=", page)
    assert "http://" not in page
    assert "https://" not in page
    assert len(page.encode()) < 1_000_000


def test_what_users_name_is_escaped(page: str) -> None:
    assert "<unknown>" not in page
    assert "other &lt;unknown&gt; &amp; &#34;odd&#34;" in page


def test_verdicts_come_first_and_synthetic_data_is_said(page: str) -> None:
    names = """verdicts scores learning calibration confusion similarity separation traffic data events
    experiment reading limits"""
    order = [page.index(f'id="{name}"') for name in names.split()]
    assert order == sorted(order)
    assert page.index("Synthetic data.") < order[0]
    assert "Not a medical device" in page


def test_the_same_summary_gives_the_same_bytes_and_is_left_alone(small: dict[str, Any]) -> None:
    before = copy.deepcopy(small)
    first = render(small)
    assert small == before
    assert render(json.loads(json.dumps(small))) == first


def test_sections_without_data_are_left_out_and_said(tmp_path: Path) -> None:
    runs.make_run(tmp_path, sites=["a", "b"], controls=False, general=False, synthetic=False)
    (tmp_path / "events.jsonl").unlink()
    text = render(summarize(tmp_path))
    assert 'id="learning"' not in text
    assert 'id="separation"' not in text
    assert "No verdict: this run trained no controls" in text
    assert "learning curves (the run recorded no validation scores)" in text
    assert "Synthetic data." not in text


def test_a_bare_minimum_still_renders(tmp_path: Path) -> None:
    runs.write(tmp_path / "federation.json", {"classes": ["a", "b"]})
    runs.write(tmp_path / "results.json", {"method": "m", "sites": {"x": {"models": {"personalised": {}}}}})
    write_report(tmp_path)
    assert "x" in (tmp_path / "report.html").read_text()


def test_two_sites_one_round(tmp_path: Path) -> None:
    runs.make_run(tmp_path, sites=["a", "b"], classes=["benign", "malignant"], rounds=1, undefined=True)
    text = render(summarize(tmp_path))
    assert "nan" not in re.sub(r"<[^>]+>", " ", text).lower().split()
    assert "No test images, so no confusions." in text


def test_one_adapter_has_an_averaging_error_and_no_separation(page: str, other: str) -> None:
    for text, there in ((page, True), (other, False)):
        assert ("Separation of the general and the personal adapter" in text) == there
        assert '<h2 id="averaging">Averaging error</h2>' in text


def test_a_network_that_is_trained_whole_has_no_adapter(tmp_path: Path) -> None:
    runs.make_run(tmp_path, sites=["a", "b"], rounds=3)
    backbone, results = (json.loads((tmp_path / name).read_text()) for name in ("backbone.json", "results.json"))
    runs.write(tmp_path / "results.json", results | {"title": "One shared adapter (FedIT)"})
    runs.write(tmp_path / "backbone.json", backbone | {"adapted_layers": []})  # a head alone, on a frozen network
    assert summarize(tmp_path)["title"] == "One shared adapter (FedIT)"
    runs.write(tmp_path / "backbone.json", backbone | {"depth": 0, "adapted_layers": []})
    summary = summarize(tmp_path) | {"separation": None, "aggregation_error": None}
    text = render(summary)
    assert "One shared network (FedIT)" in text
    assert "Network, trained whole" in text
    for words in (text[text.index("<body") :], card(summary)):
        assert "adapter" not in re.sub(r"separation of the adapters|<pre>.*?</pre>", "", words, flags=re.S).lower()
    assert ModelCard(card(summary)).data.library_name is None


def test_a_temperature_that_made_calibration_worse_is_said(page: str, other: str) -> None:
    assert [text.count("made it worse on these test images") for text in (page, other)] == [0, 1]


def test_dots_at_the_edge_of_a_reliability_diagram_are_whole() -> None:
    drawn = reliability(
        [{"n": 9, "confidence": 0.9, "accuracy": 1.0}, {"n": 9, "confidence": 0.4, "accuracy": 0.0}], "r"
    )
    assert drawn.count("<use") == 2
    assert not re.search(r"<g clip-path=[^>]*>\s*<use", drawn)


def test_every_clear_difference_is_on_the_card_of_a_hospital(page: str, other: str) -> None:
    assert [text.count('<p class="say">Below pooled data.</p>') for text in (page, other)] == [0, 1]


def test_every_time_on_the_page_is_named(other: str) -> None:
    assert "2 min 52 s for rounds and test" in other
    assert "The 2 min 52 s at the top of the page are the rounds, the test and the export." in other
    assert "The rounds took 42.6 s" in other


def test_comparison_page(tmp_path: Path) -> None:
    runs.make_comparison(tmp_path)
    path = write_report(tmp_path)
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert "confrere compare experiment.toml --seeds 3" in text
    assert "<h1>4 methods and 2 controls compared</h1>" in text
    assert not (tmp_path / "card.md").exists()
    assert json.loads((tmp_path / "report.json").read_text()) == summarize_comparison(tmp_path)


def test_write_report_writes_three_files_and_no_more(tmp_path: Path) -> None:
    runs.make_run(tmp_path, sites=["a", "b"], rounds=3)
    before = {path.name for path in tmp_path.iterdir()}
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert {p.name for p in tmp_path.iterdir()} - before == {"report.html", "report.json", "card.md"}
    first = {name: (tmp_path / name).read_bytes() for name in ("report.html", "report.json", "card.md")}
    write_report(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in first.items())


def test_the_card_is_read_by_the_hub_client(full: dict[str, Any]) -> None:
    parsed = ModelCard(card(full))
    assert parsed.data.library_name == "peft"
    assert parsed.data.license == "apache-2.0"
    assert "synthetic-data" in parsed.data.tags
    assert len({result.dataset_config for result in parsed.data.eval_results}) == 7  # the eighth is undefined
    assert "Not a medical device" in parsed.text
    assert "Synthetic data" in parsed.text
    assert "personal adapter" in parsed.text


def test_the_card_names_a_base_model_only_if_it_is_on_the_hub(full: dict[str, Any]) -> None:
    assert ModelCard(card(full)).data.base_model is None
    known = full | {"backbone": full["backbone"] | {"source": "facebook/dinov2-small"}}
    assert ModelCard(card(known)).data.base_model == "facebook/dinov2-small"
    assert ModelCard(card(full | {"backbone": None})).data.license == "other"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_a_missing_extra_is_named(small: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"confrere\[report\]"):
        render(small)


def test_formats() -> None:
    assert [percent(0.7123), percent(None), percent(float("nan"))] == ["71.2", DASH, DASH]
    assert [points(0.062), points(-0.0001), points(-0.05)] == ["+6.2", "0.0", MINUS + "5.0"]
    assert [decimal(-0.123), decimal(0.5, 3)] == [MINUS + "0.12", "0.500"]
    assert [size(12), size(1234567), size(45_600), size(9.995e9)] == ["12 B", "1.23 MB", "45.6 kB", "9.99 GB"]
    assert [duration(12.34), duration(125), duration(7380)] == ["12.3 s", "2 min 05 s", "2 h 03 min"]
    assert [amount(1234567), amount("12 / 9"), amount(None)] == ["1\u202f234\u202f567", "12 / 9", DASH]
    assert [position(0.5, 0, 1), position(9, 0, 1), position(-1, 0, 1)] == ["50.00", "100.00", "0.00"]
    assert [plain([450, 600]), plain({}), plain(True), plain({"a": 0.5})] == [
        f"450{DASH}600",
        DASH,
        "yes",
        "a: 0.5",
    ]
