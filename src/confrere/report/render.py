"""Turn a summary into one self-contained HTML page: no script, no network, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confrere.errors import MissingExtraError
from confrere.report import charts, plots
from confrere.report.reading import Json, number

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
_DASH = "\N{EN DASH}"
_MISSING = _DASH


def render(summary: Json) -> str:
    """Return the page for what :func:`summarize` or :func:`summarize_comparison` returned.

    The same dict gives the same bytes.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    page = environment(html=True).get_template(f"{summary['kind']}.html.j2")
    from markupsafe import Markup

    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    drawn = {key: Markup(svg) for key, svg in _charts(summary).items()}
    return page.render(s=summary, style=style, charts=drawn, axis=_axis(summary))


def environment(*, html: bool) -> Environment:
    """Return a Jinja environment with the filters below; ``html`` escapes whatever is shown.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", needed_for="the report") from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({function.__name__: function for function in _FILTERS})
    return made


def percent(value: object) -> str:
    """Return a share as per cent without the sign: 0.7123 is "71.2"."""
    known = number(value)
    return _MISSING if known is None else f"{100 * known:.1f}"


def decimal(value: object, digits: int = 2) -> str:
    """Return a number with a fixed number of decimals."""
    known = number(value)
    return _MISSING if known is None else _minus(f"{known:.{digits}f}")


def points(value: object) -> str:
    """Return a difference of shares in signed points: 0.062 is "+6.2"."""
    known = number(value)
    return _MISSING if known is None else _minus(f"{100 * known:+.1f}")


def percent_range(value: Json) -> str:
    """Return an interval of shares in per cent, or nothing when it is undefined."""
    return _range(value, percent)


def decimal_range(value: Json) -> str:
    """Return an interval of numbers, or nothing when it is undefined."""
    return _range(value, decimal)


def points_range(value: Json) -> str:
    """Return an interval of a gain in points, or nothing when it is undefined."""
    return _range(value, points, " to ")


def _range(value: Json, show: Any, between: str = _DASH) -> str:
    if number(value.get("low")) is None or number(value.get("high")) is None:
        return ""
    return f"{show(value['low'])}{between}{show(value['high'])}"


def _minus(text: str) -> str:
    unsigned = text.lstrip("+-")
    if not unsigned.strip("0."):
        return unsigned
    return text.replace("-", "\N{MINUS SIGN}")


def size(value: object) -> str:
    """Return a number of bytes in decimal units, three figures: 1234567 is "1.23 MB"."""
    known = number(value)
    if known is None:
        return _MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if known >= scale:
            scaled = known / scale
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{known:.0f} B"


def duration(value: object) -> str:
    """Return seconds as "12.3 s", "4 min 05 s" or "2 h 03 min"."""
    known = number(value)
    if known is None:
        return _MISSING
    if known < 60:
        return f"{known:.1f} s"
    minutes, seconds = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: object) -> str:
    """Return a whole number with thin spaces between thousands; text such as "12 / 9" stays as it is."""
    if isinstance(value, str):
        return value
    known = number(value)
    return _MISSING if known is None else f"{known:,.0f}".replace(",", "\u202f")


def position(value: object, low: float, high: float) -> str:
    """Return where ``value`` lies between ``low`` and ``high`` in per cent, kept inside."""
    known = number(value)
    share = 0.0 if known is None else (known - low) / (high - low)
    return f"{100 * min(1.0, max(0.0, share)):.2f}"


def spaced(text: object) -> str:
    """Return ``text`` with the gap before each "%" unbreakable."""
    return "" if text is None else str(text).replace(" %", "\u00a0%")


def plain(value: object) -> str:
    """Return any JSON value as readable text: rounded numbers, lists with commas, keys with spaces."""
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _minus(f"{value:.4g}")
    if isinstance(value, int):
        return amount(value)
    ends = _range_ends(value)
    if ends:
        return _DASH.join(amount(end) for end in ends)
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or _MISSING
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or _MISSING
    return str(value)


def _range_ends(value: object) -> list[int]:
    """Return the two ends of a list that is a range of whole numbers, else nothing."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
    return value if whole and isinstance(value, list) and value[0] < value[1] else []


def cell(text: object) -> str:
    """Return ``text`` fit for a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


_FILTERS: tuple[Callable[..., str], ...] = (
    percent,
    decimal,
    points,
    percent_range,
    decimal_range,
    points_range,
)
_FILTERS += (size, duration, amount, position, spaced, plain, cell)


def _charts(summary: Json) -> dict[str, str]:
    if summary["kind"] != "run":
        return plots.drawn(summary)
    drawn = {}
    curves, shown = summary["curves"], set(summary["drawn"])
    lines = {site: points for site, points in curves["sites"].items() if site in shown} if curves else {}
    for index, site in enumerate(lines):
        drawn[f"learning/{site}"] = charts.learning(lines, site, curves["chosen"], f"l{index}")
    for index, site in enumerate(summary["sites"]):
        if site["reliability"] and site["name"] in shown:
            drawn[f"reliability/{site['name']}"] = charts.reliability(site["reliability"], f"r{index}")
        if site["survival"] and site["name"] in shown:
            drawn[f"survival/{site['name']}"] = charts.survival(site["survival"], f"s{index}")
    for measure, lines in (summary["separation"] or {}).items():
        drawn[f"separation/{measure}"] = charts.separation(lines["before"], lines["after"], f"o{measure}")
    if summary["aggregation_error"]:
        drawn["aggregation"] = charts.single(summary["aggregation_error"], "aggregation")
    return drawn


def _axis(summary: Json) -> Json:
    """Return the range of the axis of the headline metric that all strips of the page share, tenths."""
    headline = summary["task"]["headline"]
    if summary["kind"] == "run":
        models = [scores for site in summary["sites"] for scores in site["models"].values()]
        cells = [scores["metrics"][headline] for scores in models]
        cells += [{"low": None, "value": scores["chance"], "high": None} for scores in models]
    else:
        cells = [cell for method in summary["methods"] for cell in (method[headline], *method["sites"].values())]
    ends = [cell[key] for cell in cells for key in ("low", "value", "high") if cell[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    low, high = math.floor(low * 10 + 1e-9) / 10, min(1.0, math.ceil(high * 10 - 1e-9) / 10)
    return {"low": low, "high": max(high, low + 0.1)}
