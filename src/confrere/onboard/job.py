"""The choice: every candidate cross-validated on the few known images, tested on the others, the best one saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from confrere.adapters import head, lora
from confrere.adapters.folder import export
from confrere.errors import ConfigError
from confrere.export import base_name
from confrere.learner import UNSCHEDULED, Learner, TrainSettings, predict
from confrere.metrics import evaluate, fit_temperature, paired_gain, verdict
from confrere.onboard.candidates import ALONE, HEAD, SLOT, Fitted, Offer, Recipe, balanced, nll, open_run, recipes
from confrere.onboard.newcomer import Newcomer, newcomer
from confrere.prefix import cache_dir, tokens
from confrere.record.files import write_bytes, write_files, write_json
from confrere.record.machine import most_threads, threads_kept
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors
from confrere.tokenset import TokenSet


@threads_kept()
def onboard(
    run: Path, data: Path, *, site: str = "", images: int = 20, steps: int = 50, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Return (and write as ``onboard.json``) what each candidate is worth at a new site; save the chosen one.

    Args:
        run: a finished run.
        data: folder of sites, CSV or ``federation.toml`` that holds the new site.
        site: which one of ``data``; may be empty when only one took no part in the run.
        images: labelled images that may be used, drawn as evenly over classes as possible.
        steps: optimiser steps of every candidate that trains.
        seed: of the draw, batches and resamples.
        out: where to write; ``RUN/onboard/<site>`` by default.

    Raises:
        RunError: the run is not finished, or its sites' models are not single adapters.
        ConfigError, DataError: the data do not fit; see :func:`confrere.onboard.newcomer.newcomer`.
    """
    offered = open_run(run)
    torch.set_num_threads(offered.experiment.threads or most_threads())
    new = newcomer(run, offered.experiment, data, site, images, seed, offered.info)
    out = out or run / "onboard" / new.site.name
    if (out / "results.json").exists():
        raise ConfigError(
            "this is the directory of a run", where=str(out), fix="choose another --out", code="onboarding"
        )
    classes = tuple(offered.info["classes"])
    rows = tokens(offered.backbone, new.site, classes, cache_dir())
    settings = TrainSettings(**offered.experiment.train.model_dump() | {"steps": steps, "views": 1} | UNSCHEDULED)

    def learner(split: np.ndarray, number: int) -> Learner:
        part = replace(rows, split=split)
        last = int(new.folds.max()) + 1
        return Learner(offered.backbone, part, settings, seed, site=new.site.name, round=number, rounds=last)

    judged = {name: _judge(recipe, new, learner, steps) for name, recipe in recipes(offered, rows, new, seed).items()}
    found = _compare(judged, new, rows, classes, seed)
    found |= {"method": offered.info["method"]["name"], "steps": steps, "seed": seed}
    _save(out, offered, found, judged[found["chosen"]].fitted.params)
    write_bytes(out / "experiment.toml", (run / "experiment.toml").read_bytes())  # what `confrere predict` reads
    write_json(out / "onboard.json", found)
    return found


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate fitted on all known images, and its logits (known, K) when each image was held out."""

    fitted: Fitted
    held_out: Tensor
    logits: Tensor


def _judge(recipe: Recipe, new: Newcomer, learner: Callable[[np.ndarray, int], Learner], steps: int) -> Judged:
    order, parts = [], []
    for fold in range(int(new.folds.max()) + 1):
        part, inside = learner(new.split(fold), fold + 1), np.flatnonzero(new.folds == fold)
        parts.append(predict(part.backbone, recipe(part, steps).params, part.data, new.known[inside]))
        order.append(inside)
    whole = learner(new.split(None), 0)
    fitted = recipe(whole, steps)
    logits = predict(whole.backbone, fitted.params, whole.data, new.test)
    held_out = torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order)))]
    return Judged(fitted=fitted, held_out=held_out, logits=logits)


def _compare(
    judged: Mapping[str, Judged], new: Newcomer, rows: TokenSet, classes: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return every candidate's loss and test metrics, the one of least loss, and the gain over training alone."""
    known, truth, groups = rows.labels[new.known], rows.labels[new.test], rows.groups[new.test]
    candidates, chances = {}, {}
    for name, one in judged.items():
        temperature = fit_temperature(one.held_out.double().numpy(), known)
        chances[name] = (one.logits.double() / temperature).softmax(1).numpy()
        rng = numpy_generator(seed, "bootstrap", new.site.name)
        candidates[name] = {
            "loss": balanced(nll(one.held_out, known), known),
            "temperature": temperature,
            "steps": one.fitted.steps,
            **one.fitted.note,
            "metrics": evaluate(chances[name], truth, groups, classes=classes, generator=rng),
        }
    ranked = sorted(judged, key=lambda name: candidates[name]["loss"])  # the simplest of equals
    taken = next(name for name in ranked if name != ALONE)
    runs = [[(chances[name], truth, groups)] for name in (taken, ALONE)]
    gain = paired_gain(*runs, generator=numpy_generator(seed, "gain", new.site.name))
    against, subject = f"training alone on {len(known)} images", f"taking over the federation's adapters ({taken})"
    return {
        "site": new.site.name,
        "classes": list(classes),
        "images": {classes[k]: int((known == k).sum()) for k in range(len(classes))},
        "test_images": len(truth),
        "left_out": len(rows.labels) - len(known) - len(truth),
        "candidates": candidates,
        "chosen": ranked[0],
        "gain": {**gain, "of": taken, "over": ALONE},
        "sentence": verdict(new.site.name, gain, against, subject=subject),
    }


def _save(out: Path, offered: Offer, found: Mapping[str, Any], params: Tensors) -> None:
    """Write the chosen model as a run writes a site's: ``confrere predict OUT`` reads it."""
    backbone, folder = offered.backbone, out / "adapters" / found["site"]
    chosen = {name: value for name, value in params.items() if lora.slot_of(name) == SLOT}
    write_files(folder / SLOT, export(chosen, scale=backbone.scale, base_name=base_name(backbone)))
    write_bytes(folder / HEAD, save({n: params[n].contiguous() for n in head.NAMES}))
    temperature = found["candidates"][found["chosen"]]["temperature"]
    changed = {"site": found["site"], "model": "onboarded", "chosen": found["chosen"], "temperature": temperature}
    write_json(folder / "head.json", {**offered.info, **changed})
