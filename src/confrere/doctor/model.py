"""The frozen model: known, on this machine, the expected one; and the room that a run with it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from confrere.backbones import REGISTRY, Backbone
from confrere.config import Experiment
from confrere.data.federation import Federation
from confrere.doctor.finding import Finding, attempt
from confrere.doctor.machine import LEAST_MEMORY, free_memory
from confrere.doctor.noise import noise_findings
from confrere.doctor.places import room
from confrere.errors import BackboneError, DataError, RunError
from confrere.job import Prepared, initial
from confrere.opening import depth_of, load_backbone
from confrere.prefix import cache_dir
from confrere.record.machine import cores
from confrere.tensors import n_bytes
from confrere.tokenset import as_numpy

KEPT_OF_A_BLOCK = 40
"""Numbers of the width that training keeps for a token in one adapted block, attention included: a rule of thumb."""


def model_findings(experiment: Experiment, federation: Federation, out: Path | None) -> Iterator[Finding]:
    """Yield what stands about the weights, then about room for activations and states."""
    found: list[Finding] = []
    backbone = attempt("backbone", lambda: _loaded(experiment, federation), found)
    yield from found
    if backbone is None:
        return
    pinned = experiment.backbone.sha256 or backbone.entry.sha256
    hashed = f"SHA-256 {backbone.digest[:16]}, {'as expected' if pinned else 'not pinned'}"
    yield Finding("ok", "backbone", f"{backbone.depth} blocks, {hashed}", backbone.name)
    part = federation.sites[0].images[np.arange(1)]
    if not backbone.anatomy.trained:
        with torch.no_grad():
            part = as_numpy(backbone.prefix(part))
    yield _memory(experiment, backbone, part)
    yield from noise_findings(experiment, federation, backbone)
    if not (federation.tabular or backbone.anatomy.trained):  # these keep no activations
        kept = sum(file.stat().st_size for file in cache_dir().glob("tokens-*.npy"))
        need = cache_bytes(experiment, federation, part.nbytes)
        yield room("cache room", cache_dir(), need, DataError.exit_code, there=kept)
    if out is not None and not (out / "experiment.toml").exists():
        need = run_bytes(experiment, federation, backbone)
        yield room("run room", out, need, RunError.exit_code)


def _loaded(experiment: Experiment, federation: Federation) -> Backbone:
    """Load the backbone as a run does, but fetch nothing."""
    with offline():
        try:
            return load_backbone(experiment, federation, depth_of(experiment, federation))
        except BackboneError as error:
            if type(error.__cause__).__name__ not in ("OfflineModeIsEnabled", "LocalEntryNotFoundError"):
                raise
            name = experiment.backbone.name
            known = REGISTRY.get(name)
            source = known.source if known else name.partition(":")[2]
            expected = experiment.backbone.sha256 or (known.sha256 if known else None)
            raise BackboneError(
                f"the weights are not on this machine, expected SHA-256: {expected or 'none is pinned'}",
                where=name,
                fix=f"`hf download {source}` fetches them (so would a run); without a network {error.fix}",
                code=error.code,
            ) from None


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's client answer from its cache only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cache_bytes(experiment: Experiment, federation: Federation, each: int) -> int:
    """Return the bytes of all frozen activations, ``each`` an image and view; decoded images are there by now."""
    images = sum(len(site.labels) for site in federation.sites)
    train = sum(int((site.split == 0).sum()) for site in federation.sites if site.name != experiment.hold_out)
    return each * (images + train * (experiment.train.views - 1))


def run_bytes(experiment: Experiment, federation: Federation, backbone: Backbone) -> int:
    """Return the bytes that a run writes at most: what the server and every site keep of every round, and exports."""
    method = experiment.build_method()
    task = Prepared(experiment=experiment, method=method, federation=federation, backbones={"": backbone}, data={})
    params = initial(task, "")
    each = max(n_bytes({"": params}), n_bytes(method.init_server(params)))  # several models, or more than one site has
    keep, sites = experiment.record.keep, len(federation.sites)
    rounds = experiment.rounds + 1 if not keep else min(experiment.rounds, keep + 1) + 1
    # A site keeps its own state and what it sent; exports hold every slot and their sum.
    return (1 + len(experiment.controls)) * each * (rounds * (1 + 2 * sites) + 3 * sites) + 5_000_000


def _memory(experiment: Experiment, backbone: Backbone, part: np.ndarray) -> Finding:
    tokens, width = int(np.prod(part.shape[1:-1])), part.shape[-1]
    step = experiment.train.batch_size * tokens * width * 4 * KEPT_OF_A_BLOCK * max(1, experiment.adapter.blocks)
    need = LEAST_MEMORY // 2 + backbone.parameters * 4 + step * (experiment.workers or cores())
    free = free_memory()
    what = f"training needs about {need / 1e9:.1f} GB"
    if free is not None and need > free:
        fix = "use a smaller train.batch_size, adapter.blocks or workers"
        return Finding("warning", "memory", f"{what}, {free / 1e9:.1f} GB are free", backbone.name, fix)
    return Finding("ok", "memory", what, backbone.name)
