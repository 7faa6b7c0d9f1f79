"""Compute everything a run's report shows, as one JSON-able dict; rendering adds nothing to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from confrere.metrics import across_sites
from confrere.report import progress
from confrere.report.audits import audits_of
from confrere.report.omitted import omitted
from confrere.report.reading import (
    Json,
    as_dict,
    as_list,
    need,
    number,
    read_events,
    read_json,
    read_optional,
    read_text,
)
from confrere.report.sheet import arrange
from confrere.report.task import METRICS, of_whole, task_of

MODEL_TITLES = {
    "personalised": "Personalised",
    "general": "General",
    "local": "Trained alone",
    "pooled": "Pooled data",
}
DRAWN = 24
"""Curves, reliability and confusions of at most so many hospitals are on the page: no reader looks at hundreds."""
OTHER_TITLES = {"local": "training alone", "pooled": "pooling all data"}


def summarize(run: Path) -> Json:
    """Return what the report of one run shows.

    Args:
        run: a run directory with at least ``results.json`` and ``federation.json``.

    Raises:
        RunError: a required file or key is missing or damaged; the message names it.
    """
    results, federation = read_json(run, "results.json"), read_json(run, "federation.json")
    events = read_events(run)
    classes = [str(name) for name in need(federation, "classes", "federation.json")]
    strata = [str(name) for name in as_list(federation.get("strata"))] or classes
    task = task_of(results, "results.json")
    controls, backbone = _controls(run), read_optional(run, "backbone.json")
    sites = _sites(results, controls, classes, [measure["key"] for measure in task["measures"]])
    _leave_out_copies(sites)
    whole = backbone is not None and (backbone.get("depth"), backbone.get("adapted_layers")) == (0, [])
    models = [key for key in _model_order(controls) if any(key in site["models"] for site in sites)]
    verdicts = _verdicts(read_optional(run, "verdicts.json"), sites)
    summary: Json = {
        "kind": "run",
        "format": 1,
        "title": of_whole(str(results.get("title") or need(results, "method", "results.json")), whole),
        "method": need(results, "method", "results.json"),
        "method_info": _method_info(as_dict(results.get("method_info")), whole),
        "whole": whole,
        "task": task,
        **{key: results.get(key) for key in ("seed", "round", "rounds", "seconds", "held_out")},
        "federation": _federation(federation, sites),
        "backbone": backbone,
        "verdicts": verdicts,
        "models": [{"key": key, "title": title_of(key)} for key in models],
        "sites": sites,
        "drawn": _drawn(sites, task["headline"]),
        "notes": _notes(sites),
        "by_class": _scored_classes(sites, classes),
        "confusions": any(_main(site).get("confusion") for site in sites),
        "across": [_across(key, sites, as_dict(results.get("summary")), task["headline"]) for key in models],
        **progress.sections(events or [], results),
        "sheet": arrange(as_dict(federation.get("sheet")), strata, "class" if strata == classes else "stratum"),
        "experiment": _without_path(read_text(run, "experiment.toml")),
        "machine": as_dict(results.get("machine")),
        "privacy": as_dict(results.get("privacy")),
        "audits": audits_of(run),
    }
    summary["omitted"] = omitted(summary)
    return summary


def title_of(model: str) -> str:
    """Return the name of a model or control as the page shows it."""
    return MODEL_TITLES.get(model, model.replace("_", " ").capitalize())


def interval(value: object) -> Json:
    """Return ``{"value", "low", "high"}`` with None for what is undefined, from a dict, a number or None."""
    if isinstance(value, dict):
        centre = value.get("value", value.get("mean"))
        return {"value": number(centre), "low": number(value.get("low")), "high": number(value.get("high"))}
    return {"value": number(value), "low": None, "high": None}


def outcome(gain: Json) -> str:
    """Return "helped", "lowered", "unclear" or "undefined": what an interval of a gain is evidence for."""
    low, high = number(gain.get("low")), number(gain.get("high"))
    if low is None or high is None or number(gain.get("gain")) is None:
        return "undefined"
    return "helped" if low > 0 else "lowered" if high < 0 else "unclear"


def gain_limit(gains: Iterable[Json]) -> float:
    """Return the half-width of a symmetric axis that holds all intervals: a multiple of 0.05."""
    ends = [abs(end) for gain in gains for key in ("gain", "low", "high") if (end := number(gain.get(key))) is not None]
    return max(0.05, math.ceil(round(max(ends, default=0.0) * 20, 6)) / 20)


def _drawn(sites: list[Json], headline: str = METRICS[0]) -> list[str]:
    """Return the hospitals that have panels: all, or those whose model scores lowest, unscored ones last."""

    def order(site: Json) -> tuple[bool, float, str]:
        scores = site["models"][site["main"]]["metrics"] if site["main"] else {}
        value = number(as_dict(scores.get(headline)).get("value"))
        return value is None, value or 0.0, site["name"]

    lowest = sorted(sites, key=order)[:DRAWN]
    return sorted(site["name"] for site in lowest)


def _controls(run: Path) -> dict[str, Json]:
    folders = sorted(path for path in (run / "controls").glob("*") if path.is_dir())
    found = {folder.name: read_json(folder, "results.json") for folder in folders}
    first = [name for name in ("local", "pooled") if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def _model_order(controls: dict[str, Json]) -> list[str]:
    return ["personalised", "general", *controls]


def _sites(results: Json, controls: dict[str, Json], classes: list[str], keys: Sequence[str]) -> list[Json]:
    sites = []
    for name, site in need(results, "sites", "results.json").items():
        where = f"results.json, sites.{name}"
        given = {key: value for key, value in need(site, "models", where).items() if value}
        models = {key: model_scores(value, classes, keys) for key, value in given.items()}
        for control, other in controls.items():
            theirs = as_dict(as_dict(as_dict(other.get("sites")).get(name)).get("models"))
            value = theirs.get("personalised") or theirs.get("general")
            if value:
                models[control] = model_scores(value, classes, keys)
        numbers = ("temperature", "ece_before", "sent_bytes", "received_bytes")
        sites.append(
            {
                "name": name,
                "held_out": bool(site.get("held_out", False)),
                "models": models,
                "main": next(iter(models), None),
                "reliability": as_list(site.get("reliability")),
                "survival": as_list(as_dict(next(iter(given.values()), None)).get("curves")),
                **{key: number(site.get(key)) for key in numbers},
            }
        )
    return sites


def _leave_out_copies(sites: list[Json]) -> None:
    """Leave the personalised model out where it is the general one at every site: then there is one model, not two."""
    both = [(site["models"].get("personalised"), site["models"].get("general")) for site in sites]
    if any(own for own, _ in both) and all(own is None or own == shared for own, shared in both):
        for site in sites:
            site["models"].pop("personalised", None)
            site["main"] = next(iter(site["models"]), None)


def _method_info(given: Json, whole: bool) -> Json:
    """Return what the run says of its method, with the names of what is sent and kept as :func:`of_whole` has them."""
    return given | {key: [of_whole(str(x), whole) for x in as_list(given.get(key))] for key in ("sends", "keeps")}


def model_scores(scores: Json, classes: list[str], keys: Sequence[str] = METRICS) -> Json:
    """Return one model's test scores at one site, every metric an interval; balanced accuracy has a ``chance``."""
    absent = [str(name) for name in as_list(scores.get("absent"))]
    present, of_classes = len(classes) - len(absent), keys[0] == METRICS[0]
    by_class = as_dict(scores.get("by_class"))
    return {
        "n": scores.get("n"),
        "patients": scores.get("patients"),
        "metrics": {key: interval(scores.get(key)) for key in keys},
        "chance": 1 / present if present and of_classes else None,
        "recall": {name: interval(as_dict(scores.get("recall")).get(name)) for name in classes if of_classes},
        "by_class": {name: interval(by_class[name]) for name in classes if name in by_class},
        "confusion": scores.get("confusion"),
        "absent": absent,
        "notes": [str(note) for note in as_list(scores.get("notes"))],
    }


def _notes(sites: list[Json]) -> list[Json]:
    """Return each remark on the first model's scores once, with the sites it holds for."""
    found: dict[str, list[str]] = {}
    for site in sites:
        for text in as_list(_main(site).get("notes")):
            found.setdefault(text, []).append(site["name"])
    return [{"text": text, "sites": names} for text, names in found.items()]


def _scored_classes(sites: list[Json], classes: list[str]) -> list[str]:
    """Return the classes that have a score of their own; none where it is the only one, and so the whole score."""
    known = {name for site in sites for name in _main(site).get("by_class", {})}
    return [name for name in classes if name in known] if len(known) > 1 else []


def _main(site: Json) -> Json:
    """Return the scores of the site's first model, or nothing without one."""
    return as_dict(site["models"].get(site["main"]))


def _across(model: str, sites: list[Json], given: Json, headline: str) -> Json:
    """Return mean, worst site and spread: as the run wrote them, or over the sites for a control."""
    row: Json = {"model": model, "title": title_of(model)}
    written = as_dict(given.get(model))
    if written:
        keys = ("mean", "worst", "spread")
        return row | {key: number(written.get(key)) for key in keys} | {"worst_site": written.get("worst_site")}
    cells = {site["name"]: site["models"].get(model) for site in sites}
    values = {name: cell["metrics"][headline]["value"] for name, cell in cells.items() if cell}
    return row | {key: value for key, value in across_sites.summary(values).items() if key != "undefined"}


def _federation(federation: Json, sites: list[Json]) -> Json:
    keys = ("name", "synthetic", "classes", "image_size", "digest")
    return {key: federation.get(key) for key in keys} | {"n_sites": sum(not site["held_out"] for site in sites)}


def _verdicts(given: Json | None, sites: list[Json]) -> Json | None:
    if given is None:
        return None
    judged = as_dict(given.get("sites"))
    cards = [_card(site, as_dict(judged.get(site["name"]))) for site in sites]
    gains = [gain for card in cards for gain in card["gains"]]
    return {
        "headline": given.get("headline"),
        "note": given.get("note"),
        "limit": gain_limit(gains),
        "cards": cards,
    }


def _card(site: Json, judged: Json) -> Json:
    order = [key for key in ("local", "pooled") if key in judged] + [k for k in judged if k not in OTHER_TITLES]
    gains: list[Json] = []
    for other in order:
        gain = as_dict(judged[other])
        numbers = {key: number(gain.get(key)) for key in ("gain", "low", "high", "p")}
        texts = {
            "other": other,
            "title": OTHER_TITLES.get(other, title_of(other)),
            "sentence": gain.get("sentence"),
        }
        texts |= {"note": gain.get("note")}
        gains.append(texts | numbers | {"outcome": outcome(gain), "patients": gain.get("patients")})
    # Whether joining paid is judged against training alone and nothing else.
    main: Json = next((gain for gain in gains if gain["other"] == "local"), {})
    scores = _main(site)
    return {
        "site": site["name"],
        "held_out": site["held_out"],
        "outcome": main.get("outcome", "undefined"),
        "sentence": main.get("sentence"),
        "shown": [
            gain["sentence"]
            for gain in gains
            if gain is not main and gain["outcome"] in ("helped", "lowered") and gain["sentence"]
        ],
        "gains": gains,
        "n": scores.get("n"),
        "patients": scores.get("patients"),
    }


def _without_path(experiment: str | None) -> str | None:
    """Return the experiment without where the data lie: folder names may name people or places."""
    if experiment is None:
        return None
    lines = experiment.splitlines()
    return "\n".join('path = "..."' if line.startswith("path = ") else line for line in lines)
