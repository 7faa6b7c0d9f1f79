"""Reports: compute a dict from a run directory, then show it as a page and a model card."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from confrere.report.card import card
from confrere.report.comparison import summarize_comparison
from confrere.report.render import render
from confrere.report.summarize import summarize
from confrere.report.tables import tables

__all__ = ["card", "render", "summarize", "summarize_comparison", "write_report"]


def write_report(run: Path) -> Path:
    """Write the report of a run or of a comparison; return the path of the page.

    A run gets ``report.html``, ``report.json`` and ``card.md``; a comparison ``comparison.html``, ``report.json``,
    ``comparison.csv``, ``comparison_scores.csv`` and ``comparison.tex``.

    Args:
        run: the directory of a run or of a comparison.

    Raises:
        RunError: a required file is missing or damaged.
        MissingExtraError: the extra "report" is not installed.
    """
    compared = (run / "comparison.json").is_file()
    summary = summarize_comparison(run) if compared else summarize(run)
    page = render(summary)
    _write(run / "report.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    others = tables(summary) if compared else {"card.md": card(summary)}
    for name, text in others.items():
        _write(run / name, text)
    path = run / ("comparison.html" if compared else "report.html")
    _write(path, page)
    return path


def _write(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
