"""Drawings of a comparison: nothing covers anything, and the front is the front."""

from __future__ import annotations

import re

import numpy as np
import pytest

from confrere.report.comparison import MANY, _axis, _front, _heat, _ranks, _tuning, _without_path
from confrere.report.plots import critical, pareto
from confrere.report.tables import escape


def method(name: str, size: float | None, score: float | None) -> dict[str, object]:
    return {"name": name, "title": name, "bytes": size, "balanced_accuracy": {"value": score}, "sites": {}}


def texts(svg: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', svg)
    return [(float(x), float(y), text) for x, y, text in found]


def test_the_front_holds_what_no_other_method_beats() -> None:
    methods = [method("a", 5, 0.7), method("b", 3, 0.7), method("c", 9, 0.9), method("d", 10, 0.8), method("e", 0, 0.2)]
    assert _front([*methods, method("pooled", None, 0.99)]) == ["e", "b", "c"]
    assert sorted(_front([method("a", 3, 0.7), method("b", 3, 0.7)])) == ["a", "b"]


@pytest.mark.parametrize("seed", range(10))
def test_every_method_has_its_number_and_no_two_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(n, float(rng.choice([0, 1e6, 2e6])), 0.7 + 0.001 * int(rng.integers(20)), False) for n in range(1, 21)]
    found = [t for t in texts(pareto(points, [0.72])) if t[2].isdigit() and 1 <= int(t[2]) <= 20 and t[0] > 42]
    assert sorted(int(t[2]) for t in found if t[1] < 222) == list(range(1, 21))
    for i, (x, y, text) in enumerate(found):
        for x2, y2, other in found[i + 1 :]:
            assert abs(x - x2) >= 3.5 * (len(text) + len(other)) or abs(y - y2) >= 10


def test_of_a_crowd_the_front_has_its_numbers_and_none_lies_on_another() -> None:
    rng = np.random.default_rng(0)
    points = [(n, float(rng.choice([6e6, 7e6, 13e6])), 0.4 + 0.1 * float(rng.random()), n < 4) for n in range(1, 42)]
    svg = pareto([*points[:-1], (41, 9e7, 0.3, False)], [])
    found = [t for t in texts(svg) if t[2].isdigit() and t[1] < 222 and t[0] > 42]
    assert {1, 2, 3, 41} <= {int(t[2]) for t in found}
    assert len(found) < 41
    assert "var(--faint)" not in svg.replace("var(--faint)", "", 3), (
        "only the front's numbers lie far from their points"
    )
    for i, (x, y, text) in enumerate(found):
        for x2, y2, other in found[i + 1 :]:
            assert abs(x - x2) >= 3.5 * (len(text) + len(other)) or abs(y - y2) >= 10


def test_lines_of_many_ranks_meet_where_the_methods_are_not_told_apart() -> None:
    names = [f"m{n}" for n in range(MANY + 1)]
    given = {"ranks": {name: 1.0 + n for n, name in enumerate(names)}, "groups": [names[:3]], "difference": 2.0}
    found = _ranks(given, {})
    assert found is not None
    assert found["many"]
    assert not (_ranks({**given, "ranks": {"a": 1.0, "b": 2.0}, "groups": []}, {}) or {})["many"]
    first, third, fourth = (found["rows"][n]["reach"] for n in (0, 2, 3))
    assert first["high"] == third["low"], "exactly the critical difference apart"
    assert first["high"] < fourth["low"]
    assert found["axis"] == {"low": 0.0, "high": MANY + 2.0}


def test_the_axis_of_means_holds_them_and_little_else() -> None:
    cells = [{"low": 0.42, "value": 0.5, "high": 0.58}, {"low": None, "value": 0.317, "high": None}]
    assert _axis(cells) == {"low": 0.3, "high": pytest.approx(0.6)}
    assert _axis([]) == {"low": 0.0, "high": 1.0}
    for value in (0.0, 0.5, 1.0):
        ends = _axis([{"low": None, "value": value, "high": None}])
        assert 0 <= ends["low"] <= value <= ends["high"] <= 1
        assert ends["high"] - ends["low"] >= 0.049


def test_tuning_is_told_in_the_order_of_the_table_and_where_data_lay_is_not() -> None:
    searches = [{"method": "a"}, {"method": "b"}]
    assert [one["method"] for one in (_tuning({"searches": searches}, ["b", "a"]) or {})["searches"]] == ["b", "a"]
    assert _tuning({}, []) is None
    assert _without_path('path = "/home/x"\nseed = 0\n') == "seed = 0\n"
    assert _without_path(None) is None


@pytest.mark.parametrize("k", [3, 4, 12, 40])
def test_the_critical_difference_diagram_numbers_every_method(k: int) -> None:
    ranks = sorted(np.random.default_rng(k).uniform(1, k, k).tolist())
    svg = critical(ranks, [[ranks[0], ranks[1]]], 2.0)
    left = [t for t in texts(svg) if t[0] < 30 and t[2].isdigit()]
    right = [t for t in texts(svg) if t[0] > 330 and t[2].isdigit()]
    assert sorted(int(t[2]) for t in left + right) == list(range(1, k + 1))
    assert svg.count("var(--accent)") == 1
    height = int(re.findall(r'viewBox="0 0 360 (\d+)"', svg)[0])
    assert all(0 < y < height for _, y, _ in texts(svg))


def test_heat_is_against_training_alone_where_there_is_some() -> None:
    rows = [method("fedit", 1, 0.5), method("local", 0, 0.5)]
    rows[0]["sites"] = {"a": {"value": 0.7}, "b": {"value": 0.5}}
    rows[1]["sites"] = {"a": {"value": 0.5}, "b": {"value": 0.6}}
    found = _heat(rows, ["a", "b"], [{"a": "fedit", "site": "a", "p_holm": 0.01}])
    assert found is not None
    first = found["rows"][0]["cells"]
    assert [round(cell["shade"], 6) for cell in first] == [1.0, -0.5]
    assert [cell["shown"] for cell in first] == [True, False]
    assert all(cell["shade"] == 0 for cell in found["rows"][1]["cells"])
    alone = _heat(rows[:1], ["a", "b"], [])
    assert alone is not None
    assert alone["against"] == "mean"


def test_latex_prints_what_was_written() -> None:
    assert escape("a_b & 5 % {x} \\ ~^#$") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\$"
    )
