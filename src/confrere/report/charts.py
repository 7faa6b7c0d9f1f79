"""Small line charts: matplotlib draws, the page's CSS variables colour, no name is ever inside a drawing.

Every chart is one panel of a grid that the page lays out; names, values and legends are HTML beside it, so
nothing can overlap and a phone gets one panel a row.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from confrere.errors import MissingExtraError
from confrere.report.reading import Json

Points = Sequence[Sequence[float]]

# matplotlib knows no CSS: each variable is drawn in a colour of its own that is replaced afterwards.
_INK = {
    "ink": "#010101",
    "muted": "#020202",
    "faint": "#060606",
    "rule": "#030303",
    "accent": "#040404",
    "warm": "#050505",
}
_RISKS = {1: ("accent",), 2: ("warm", "accent"), 3: ("warm", "muted", "accent")}  # the highest risk first
_WIDTH, _HEIGHT = 228, 136  # CSS pixels of one panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 8, 22


def learning(lines: Mapping[str, Points], site: str, chosen: float | None, name: str) -> str:
    """Return the validation curve of ``site`` in front of the other sites', chosen round marked.

    Args:
        lines: per site, pairs (round, score in [0, 1]).
        site: whose curve stands out.
        chosen: the round whose model was kept.
        name: unique on the page; prefixes the ids inside the SVG.
    """
    figure, axes = _panel()
    _score_axis(axes, lines.values())
    for other, points in lines.items():
        if other != site:
            _line(axes, points, "faint", 0.9)
    if chosen is not None:
        axes.axvline(chosen, color=_INK["muted"], linewidth=0.8, dashes=(2, 2))
    _line(axes, lines[site], "accent", 1.8)
    mark = [point for point in lines[site] if point[0] == chosen]
    axes.plot(*_columns(mark), "o", color=_INK["accent"], markersize=5, markeredgewidth=0, clip_on=False)
    _round_axis(axes, [point[0] for points in lines.values() for point in points], chosen)
    return _svg(figure, name)


def reliability(bins: Sequence[Json], name: str) -> str:
    """Return a reliability diagram: accuracy against confidence, area of a dot by its number of images."""
    figure, axes = _panel(height=200, bottom=26)
    axes.plot([0, 1], [0, 1], color=_INK["muted"], linewidth=0.8, dashes=(2, 2))
    used = [part for part in bins if part.get("n") and part.get("confidence") is not None]
    most = max((part["n"] for part in used), default=1)
    x, y = [part["confidence"] for part in used], [part["accuracy"] for part in used]
    _line(axes, list(zip(x, y, strict=True)), "accent", 1.0)
    for part in used:
        size = 3 + 8 * (part["n"] / most) ** 0.5
        axes.plot(
            part["confidence"],
            part["accuracy"],
            "o",
            color=_INK["accent"],
            markersize=size,
            markeredgewidth=0,
            clip_on=False,  # at 0 and 100 per cent, too, the area of a dot is read
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _ticks(axes.set_yticks, [0, 0.5, 1], ["0", "50", "100"])
    _ticks(axes.set_xticks, [0, 0.5, 1], ["0", "50", "100"])
    _align(axes)
    return _svg(figure, name)


def survival(groups: Sequence[Json], name: str) -> str:
    """Return survival by time of groups of risk, the highest first: predicted (lines), observed (dots, intervals).

    Every point stands for ten patients or more, see :mod:`confrere.metrics.kaplan_meier`.
    """
    figure, axes = _panel(height=200, bottom=26)
    for group, colour in zip(groups, _RISKS[len(groups)], strict=True):
        _line(axes, [(0.0, 1.0), *zip(group["times"], group["predicted"], strict=True)], colour, 1.8)
        for at, seen, low, high in zip(*(group[key] for key in ("times", "observed", "low", "high")), strict=True):
            if low is not None and high is not None:
                axes.plot([at, at], [low, high], color=_INK[colour], linewidth=0.9)
            if seen is not None:
                axes.plot(at, seen, "o", color=_INK[colour], markersize=5, markeredgewidth=0)
    last = max(group["times"][-1] for group in groups)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.set_ylim(0, 1.02)
    _ticks(axes.set_yticks, [0, 0.5, 1], ["0", "50", "100"])
    _ticks(axes.set_xticks, [0, last / 2, last], ["0", f"{last / 2:.3g}", f"{last:.3g}"])
    _align(axes)
    return _svg(figure, name)


def separation(before: Mapping[str, Points], after: Mapping[str, Points], name: str) -> str:
    """Return overlap by round: thin lines are sites, strong ones their mean, dashed before averaging."""
    return _curves([(before, "warm", (3, 2)), (after, "accent", None)], name)


def single(points: Points, name: str) -> str:
    """Return one curve over rounds, from zero."""
    return _curves([({"": points}, "accent", None)], name)


def _curves(groups: Sequence[tuple[Mapping[str, Points], str, tuple[int, int] | None]], name: str) -> str:
    figure, axes = _panel()
    every = [point for lines, _, _ in groups for points in lines.values() for point in points]
    top = _nice(max((point[1] for point in every), default=1.0))
    axes.set_ylim(0, top * 1.02)
    _ticks(axes.set_yticks, [0, top / 2, top], ["0", f"{top / 2:.3g}", f"{top:.3g}"])
    for lines, colour, dashes in groups:
        style = {"dashes": dashes} if dashes else {}
        for points in lines.values():
            _line(axes, points, colour, 0.7, alpha=0.35, **style)
        _line(axes, _mean(lines), colour, 1.8, **style)
    _round_axis(axes, [point[0] for point in every], None)
    return _svg(figure, name)


def _mean(lines: Mapping[str, Points]) -> Points:
    at: dict[float, list[float]] = {}
    for points in lines.values():
        for x, y in points:
            at.setdefault(x, []).append(y)
    return [(x, sum(values) / len(values)) for x, values in sorted(at.items())]


def _nice(value: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten, at least 0.001."""
    power = 0.001
    while True:
        for step in (1, 2, 5):
            if value <= step * power * (1 + 1e-9):
                return step * power
        power *= 10


def _panel(height: int = _HEIGHT, bottom: int = _BOTTOM) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", needed_for="the report") from error
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    width, tall = _WIDTH - _LEFT - _RIGHT, height - _TOP - bottom
    axes = figure.add_axes((_LEFT / _WIDTH, bottom / height, width / _WIDTH, tall / height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=_INK["muted"], linewidth=0.8)
    axes.tick_params(length=0, pad=5, labelsize=11, labelcolor=_INK["muted"])
    axes.yaxis.grid(True, color=_INK["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _line(axes: Any, points: Points, colour: str, width: float, **style: Any) -> None:
    caps = {"solid_capstyle": "round", "solid_joinstyle": "round"}
    # A single point draws no line; a dot keeps it visible.
    marker = "o" if len(points) == 1 else "None"
    axes.plot(*_columns(points), marker=marker, markersize=4, color=_INK[colour], linewidth=width, **caps, **style)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _score_axis(axes: Any, lines: Any) -> None:
    values = [point[1] for points in lines for point in points]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    low, high = min(low, 0.8), min(1.0, max(high, low + 0.2))
    axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    marks = [low, (low + high) / 2, high]
    _ticks(axes.set_yticks, marks, [f"{100 * mark:.0f}" for mark in marks])


def _round_axis(axes: Any, rounds: Sequence[float], chosen: float | None) -> None:
    first, last = min(rounds), max(rounds)
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    marks = [first] if first == last else [first, last]
    # A mark nearer to an end would run into that end's label; the first one is longer.
    span = last - first
    if chosen is not None and chosen - first > 0.4 * span and last - chosen > 0.15 * span:
        marks.insert(1, chosen)
    _ticks(
        axes.set_xticks,
        marks,
        [f"{mark:.0f}" if index else f"round {mark:.0f}" for index, mark in enumerate(marks)],
    )
    _align(axes)


def _align(axes: Any) -> None:
    for label, side in zip(
        axes.get_xticklabels()[:: max(1, len(axes.get_xticks()) - 1)], ("left", "right"), strict=False
    ):
        label.set_horizontalalignment(side if len(axes.get_xticks()) > 1 else "center")


def _ticks(setter: Any, positions: Sequence[float], labels: Sequence[str]) -> None:
    setter(list(positions), labels=list(labels))


def _svg(figure: Any, name: str) -> str:
    """Return the figure as a bare ``<svg>``: same figure, same bytes; colours and fonts from the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": "confrere", "svg.id": None}
    with rc_context(options):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _clean(buffer.getvalue(), name)


def _clean(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    size = re.search(r'viewBox="([^"]+)"', svg)
    box = size.group(1) if size else f"0 0 {_WIDTH} {_HEIGHT}"
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" aria-hidden="true" focusable="false">', svg, count=1)
    # The style element inside would apply to the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    # Hundredths of a pixel are enough; what stands between tags is text and stays.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    for variable, colour in _INK.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
