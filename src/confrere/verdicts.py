"""Did joining pay? Paired comparisons of a run with its controls at every site, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from confrere.errors import RunError
from confrere.metrics.paired import Run as Predictions
from confrere.metrics.paired import paired_gain, signed, spoken, verdict
from confrere.record.files import file_digest, read_state, write_json
from confrere.record.run import Run
from confrere.seeds import numpy_generator


def predictions(run: Path, site: str, model: str = "personalised") -> Predictions | None:
    """Return what a model said of a site's test images; None if the site was not examined.

    Images without a value, such as masks without foreground, are left out.
    """
    path = run / "sites" / site / f"test-{model}.safetensors"
    if not path.exists():
        return None
    state, meta = read_state(path)
    if meta["site"] != site:
        raise RunError(f"these predictions belong to site {meta['site']!r}", where=str(path), code="state-misplaced")
    test = state["test"]
    if "risk" in test:
        return test["risk"].numpy(), test["targets"].numpy(), test["groups"].numpy()
    if "values" not in test:
        return test["probabilities"].numpy(), test["labels"].numpy(), test["groups"].numpy()
    values, groups = test["values"].numpy(), test["groups"].numpy()
    known = ~np.isnan(values)
    return values[known], np.zeros(int(known.sum()), np.int64), groups[known]


def site_gain(
    ours: Sequence[Path],
    theirs: Sequence[Path],
    site: str,
    *,
    seed: int = 0,
    resamples: int = 2000,
    metric: str = "balanced_accuracy",
) -> dict[str, Any] | None:
    """Return the paired gain in the headline ``metric`` at ``site`` over runs of equal seeds; None if not examined."""
    left, right = ([predictions(run, site) for run in runs] for runs in (ours, theirs))
    if any(p is None or not len(p[1]) for p in (*left, *right)):
        return None
    rng = numpy_generator(seed, "gain", site)
    runs = [p for p in left if p], [p for p in right if p]
    return paired_gain(*runs, generator=rng, resamples=resamples, metric=metric)


def verdicts(
    run: Path, controls: Mapping[str, Path], sites: Sequence[str], *, seed: int = 0, metric: str = "balanced_accuracy"
) -> dict[str, Any]:
    """Return verdicts.json: for every site its gain in ``metric`` over every control, and one headline."""
    found: dict[str, Any] = {}
    for site in sites:
        found[site] = {}
        for name, path in controls.items():
            gain = site_gain([run], [path], site, seed=seed, metric=metric)
            if gain is not None:
                found[site][name] = {**gain, "sentence": verdict(site, gain, name)}
    return {"sites": found, "headline": headline(found), "note": note(metric)}


def keep_verdicts(run: Run, found: Mapping[str, Any]) -> None:
    """Write verdicts.json, and its digest into the journal unless it is the last one there."""
    file = run.path / "verdicts.json"
    write_json(file, found)
    said = {"event": "verdicts", "files": {file.name: file_digest(file)}}
    if [e for e in run.events() if e["event"] == "verdicts"][-1:] != [said]:
        run.append(said)


def note(metric: str) -> str:
    """Return how to read the gains."""
    return (
        f"Gains are differences in {spoken(metric)} on the same test patients, with 95 % bootstrap intervals over "
        "patients. One training run (one seed): confrere compare adds the variation between seeds."
    )


def headline(found: Mapping[str, Mapping[str, Any]], control: str = "local") -> str:
    """Return one sentence over all sites: for how many joining paid, hurt, or showed no evidence."""
    gains = [by[control] for by in found.values() if control in by and by[control].get("gain") is not None]
    if not gains:
        return "No site has a control to compare with."
    paid = sum(1 for g in gains if g["low"] is not None and g["low"] > 0)
    hurt = sum(1 for g in gains if g["high"] is not None and g["high"] < 0)
    mean = 100 * float(np.mean([g["gain"] for g in gains]))
    measure = spoken(gains[0].get("metric", "balanced_accuracy"))
    return (
        f"Against training alone, joining paid at {paid} of {len(gains)} sites, hurt at {hurt}, and shows no "
        f"evidence either way at {len(gains) - paid - hurt}; the mean change in {measure} is "
        f"{signed(mean)} points."
    )
