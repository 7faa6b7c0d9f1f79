"""The data as a run would read them, and what their data sheet warns of."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.data.federation import Federation
from confrere.doctor.finding import Finding, attempt
from confrere.initial import slot_ranks
from confrere.opening import open_data


def opened(experiment: Experiment, run: Path | None, found: list[Finding]) -> Federation | None:
    """Return the federation, with the split of ``run`` where one is given; None where a run could not begin with it."""
    with tempfile.TemporaryDirectory(prefix="confrere-doctor-") as folder:  # for the split, which only a run writes
        if run is not None and (run / "splits.csv").is_file():
            shutil.copy(run / "splits.csv", folder)
        return attempt("data", lambda: open_data(experiment, Path(folder)), found)


def data_findings(experiment: Experiment, federation: Federation) -> Iterator[Finding]:
    """Yield what there is, and what may not be as it was meant."""
    sites = federation.sheet["sites"]
    total, classes = sum(site["images"] for site in sites.values()), len(federation.classes)
    yield Finding("ok", "data", f"{len(sites)} sites, {classes} classes, {total} images", federation.name)
    fix = "`confrere data check PATH` shows all counts and names the files"
    for sentence in federation.sheet["warnings"]:
        yield Finding("warning", "data", sentence, federation.name, fix)
    yield from _typing_errors(federation)
    for name, site in sites.items():
        train, batch = site["splits"]["train"]["images"], experiment.train.batch_size
        if name != experiment.hold_out and train < batch:
            what = f"{train} training images are fewer than a batch of {batch}: a step sees some of them repeatedly"
            yield Finding("warning", "data", what, f"site {name}", f"use train.batch_size={max(1, train)} or less")
    yield from _choices(experiment)


def _typing_errors(federation: Federation) -> Iterator[Finding]:
    """Yield classes of one site that are spelt nearly like a class of the others."""
    sites: dict[str, Any] = federation.sheet["sites"]
    holders = {c: [s for s, site in sites.items() if site["classes"][c]["total"]] for c in federation.strata}
    for name, at in holders.items():
        others = [c for c, elsewhere in holders.items() if c != name and elsewhere and not set(at) & set(elsewhere)]
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
        twins = bool(near) and len(holders[near[0]]) == 1  # each is near the other: one finding
        if len(at) == 1 and near and not (twins and name < near[0]):
            what = f"class {name!r} is spelt nearly like {near[0]!r}, which only other sites have"
            fix = f"if they are one class, give \"data.class_map={{'{name}' = '{near[0]}'}}\""
            yield Finding("warning", "classes", what, f"site {at[0]}", fix)


def _choices(experiment: Experiment) -> Iterator[Finding]:
    """Yield what is allowed, but seldom meant."""
    method = experiment.build_method()
    if experiment.hold_out and not method.has_general():
        what = f"{method.name} makes no general model: {experiment.hold_out} will not be scored"
        yield Finding("warning", "hold-out", what, "hold_out", "use a method that shares its head, or leave it out")
    parts = slot_ranks(method, experiment.adapter.rank)
    if len(set(parts.values())) > 1:
        what = f"rank {experiment.adapter.rank} is divided unequally: {', '.join(f'{s} {r}' for s, r in parts.items())}"
        yield Finding("warning", "rank", what, "adapter.rank", f"use a multiple of {len(parts)}")
