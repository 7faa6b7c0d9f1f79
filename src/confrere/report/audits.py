"""What the audits of a run found, for its report: strengths beside controls and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from confrere.report.reading import Json, as_dict, as_list, need, number, read_json

LAST = ("historical",)
FINDINGS = {
    "found": "the attack finds something",
    "unclear": "not clearly more than its control",
    "not found": "no better than guessing",
    "cannot be said": "cannot be said",
    "above bound": "more than the guarantee allows",
}


def audits_of(run: Path) -> list[Json]:
    """Return every audit in ``run/audits``, by name, a baseline last; none where there are none.

    Raises:
        RunError: a file is damaged; the message names it.
    """
    files = sorted((run / "audits").glob("*.json"), key=lambda file: (file.stem in LAST, file.stem))
    return [_audit(read_json(run / "audits", file.name), file.name) for file in files]


def _audit(found: Json, name: str) -> Json:
    rows = [_row(as_dict(row), name) for row in as_list(need(found, "rows", name))]
    texts = {key: str(found.get(key, "")) for key in ("title", "question", "means", "control")}
    lists = {key: [str(one) for one in as_list(found.get(key))] for key in ("limits", "warnings")}
    return {
        "name": str(need(found, "audit", name)),
        **texts,
        **lists,
        "main": _grouped([row for row in rows if row["main"]]),
        "others": _grouped([row for row in rows if not row["main"]]),
        "bounded": any(row["bound"] is not None for row in rows),
        "costs": {str(key): value for key, value in as_dict(found.get("costs")).items()},
        "signed": bool(found.get("signature")),
    }


def _grouped(rows: list[Json]) -> list[Json]:
    """Return rows of the same model and place together, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["subject"]), []).append(row)
    return [
        {"model": model, "at": "all hospitals" if subject == "all" else subject, "n": same[0]["n"], "rows": same}
        for (model, subject), same in groups.items()
    ]


def _row(row: Mapping[str, object], where: str) -> Json:
    finding = str(need(row, "finding", where))
    return {
        **{key: str(row.get(key, "")) for key in ("subject", "model", "measure", "n")},
        **{key: _interval(row.get(key)) for key in ("strength", "control")},
        "chance": number(row.get("chance")),
        "bound": number(row.get("bound")),
        "main": bool(row.get("main")),
        "finding": finding,
        "said": FINDINGS.get(finding, finding),
    }


def _interval(value: object) -> Json:
    given = as_dict(value)
    return {key: number(given.get(key)) for key in ("value", "low", "high")}
