"""The two drawings of a comparison: score against bytes, and mean ranks with their critical difference.

Drawn by hand in SVG, coloured by the page's CSS variables. Methods stand in them as the numbers of the table beside
them: names are HTML, so that nothing can overlap and a phone can show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from confrere.report.reading import Json

Box = tuple[float, float, float, float]
_WIDTH, _HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 348.0, 12.0, 222.0
_DIGIT, _LINE = 7.0, 11.0  # size of a digit at 11 px
_CROWD = 20  # of so many points all have their number; of more, the front and those with room beside them


def drawn(summary: Json) -> dict[str, str]:
    """Return the drawings of a comparison: ``pareto`` and ``ranks``, where there is something to draw."""
    found, headline = {}, summary["task"]["headline"]
    points = [
        (number, m["bytes"], m[headline]["value"], m["name"] in summary["front"])
        for number, m in enumerate(summary["methods"], 1)
        if m["bytes"] is not None and m[headline]["value"] is not None
    ]
    pooled = [m[headline]["value"] for m in summary["methods"] if m["name"] == "pooled"]
    if len(points) > 1:
        found["pareto"] = pareto(points, [value for value in pooled if value is not None])
    if summary["ranks"] and not summary["ranks"]["many"]:
        ranks = summary["ranks"]
        found["ranks"] = critical([row["rank"] for row in ranks["rows"]], ranks["bars"], ranks["difference"])
    return found


def pareto(points: Sequence[tuple[int, float, float, bool]], lines: Sequence[float]) -> str:
    """Return score (upwards) against bytes (to the right, from zero; a crowd's on a square-root scale).

    Args:
        points: (number, bytes, score in 0..1, whether on the front).
        lines: scores drawn as dashed lines: of what moves no bytes that count.
    """
    scores = [*(point[2] for point in points), *lines]
    low, high = min(scores), max(scores)
    margin = max(0.01, 0.15 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    most = max(point[1] for point in points) or 1.0
    power = 0.5 if len(points) > _CROWD else 1.0  # most of a crowd moves little, and a few move much

    def x(size: float) -> float:
        return _LEFT + 10 + math.pow(size / most, power) * (_RIGHT - _LEFT - 30)

    def y(score: float) -> float:
        return _BOTTOM - (score - low) / (high - low) * (_BOTTOM - _TOP)

    parts = []
    for share in (0.0, 0.5, 1.0):
        score = low + share * (high - low)
        parts.append(_line(_LEFT, y(score), _RIGHT, y(score), "rule", 0.6))
        parts.append(
            _text(_LEFT - 6, y(score) + 4, f"{100 * score:.0f}" if high - low > 0.05 else f"{100 * score:.1f}")
        )
    for size in (0.0, 0.5 ** (1 / power) * most, most):
        parts.append(_text(x(size), _BOTTOM + 17, _size(size), "middle"))
    parts.append(_line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "muted", 0.8))
    parts += [_line(_LEFT, y(score), _RIGHT, y(score), "ink", 0.9, "4 3") for score in lines]
    front = sorted((x(size), y(score)) for _, size, score, best in points if best)
    for (x1, y1), (x2, y2) in pairwise(front):
        parts += [_line(x1, y1, x2, y1, "accent", 1.0), _line(x2, y1, x2, y2, "accent", 1.0)]
    at = [(x(size), y(score)) for _, size, score, _ in points]
    for (cx, cy), point in zip(at, points, strict=True):
        colour = "accent" if point[3] else "muted"
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" style="fill:var(--{colour})"/>')
    parts += _labels(at, [str(point[0]) for point in points], [point[3] for point in points])
    return _svg(parts, _HEIGHT)


def critical(ranks: Sequence[float], bars: Sequence[Sequence[float]], difference: float) -> str:
    """Return the critical-difference diagram; methods are numbered by rank, best (left) first.

    Args:
        ranks: mean ranks in ascending order.
        bars: (first, last) mean rank of each group that is not told apart.
        difference: the critical one, drawn as a ruler above the axis.
    """
    k = len(ranks)
    left, right, axis = 34.0, 326.0, 46.0

    def x(rank: float) -> float:
        return left + (rank - 1) / (k - 1) * (right - left)

    parts = [_line(left, axis, right, axis, "ink", 1.2)]
    for mark in range(1, k + 1, -(-k // 10)):
        parts += [_line(x(mark), axis - 4, x(mark), axis, "muted", 0.8), _text(x(mark), axis - 8, str(mark), "middle")]
    end = min(x(1 + difference), right)
    parts += [_line(left, 14, end, 14, "warm", 2), _line(left, 10, left, 18, "warm", 1.5)]
    if 1 + difference <= k:
        parts.append(_line(end, 10, end, 18, "warm", 1.5))
    for level, (first, last) in enumerate(bars):
        bar = axis + 9.0 + 8 * level
        parts.append(_line(x(first) - 3, bar, x(last) + 3, bar, "accent", 3.5))
    below, half = axis + 24 + 8 * len(bars), (k + 1) // 2
    for index, rank in enumerate(ranks):
        on_left = index < half
        height = below + 17 * (index if on_left else k - 1 - index)
        side = left - 12 if on_left else right + 12
        parts += [
            _line(x(rank), axis, x(rank), height, "muted", 0.8),
            _line(x(rank), height, side, height, "muted", 0.8),
        ]
        parts.append(f'<circle cx="{x(rank):.1f}" cy="{axis:.1f}" r="2.6" style="fill:var(--ink)"/>')
        parts.append(_text(side + (-4 if on_left else 4), height + 4, str(index + 1), "end" if on_left else "start"))
    return _svg(parts, int(below + 17 * (half - 1) + 14))


def _labels(at: Sequence[tuple[float, float]], texts: Sequence[str], front: Sequence[bool]) -> list[str]:
    """Return each point's number at the nearest place where it covers no other number and no point.

    Of a crowd only the front's numbers go far to find one.
    """
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    parts = []
    for index in sorted(range(len(at)), key=lambda index: not front[index]):
        (x, y), text = at[index], texts[index]
        wide = _DIGIT * len(text)
        for reach in range(8, 120 if front[index] or len(at) <= _CROWD else 9, 6):
            steps = ((0, -1), (-0.7, -0.7), (0.7, -0.7), (1, 0), (-1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7))
            places = [(x + dx * (reach + wide / 2), y + dy * (reach + 5)) for dx, dy in steps]
            boxes = [(px - wide / 2, py - _LINE / 2, px + wide / 2, py + _LINE / 2) for px, py in places]
            free = [i for i, box in enumerate(boxes) if _inside(box) and not any(_meet(box, other) for other in taken)]
            if free:
                px, py = places[free[0]]
                taken.append(boxes[free[0]])
                if reach > 8:
                    parts.append(_line(x, y, px, py, "faint", 0.7))
                parts.append(_text(px, py + 4, text, "middle"))
                break
    return parts


def _inside(box: Box) -> bool:
    return box[0] >= _LEFT and box[1] >= 2 and box[2] <= _WIDTH - 2 and box[3] <= _BOTTOM - 2


def _meet(a: Box, b: Box) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > -1 and min(a[3], b[3]) - max(a[1], b[1]) > -1


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dashes: str = "") -> str:
    style = f"stroke:var(--{colour});stroke-width:{width}" + (f";stroke-dasharray:{dashes}" if dashes else "")
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _text(x: float, y: float, text: str, anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" style="font-size:11px;text-anchor:{anchor}">{text}</text>'


def _size(value: float) -> str:
    """Return a number of bytes for an axis: "0", "1.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B" if value else "0"


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
