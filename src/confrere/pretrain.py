"""``confrere pretrain`` is a run like any other, with other defaults: a pretext task, and a network trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERAL = Path("adapters/general/backbone")
"""Where a run directory holds the backbone that all sites share."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "train": {"lr": 5e-4, "weight_decay": 0.05, "batch_size": 32, "steps": 20, "balance": "none", "views": 4},
    "selection": {"every": 5},
    "record": {"keep": 1},  # weights of a whole network fill a disk
}


def pretraining(
    given: Mapping[str, Any], task: str, backbone: str, method: str, rounds: int, seed: int
) -> dict[str, Any]:
    """Return the values of an experiment; what ``given`` says of a table wins over the defaults of this module."""
    tables = {key: {**default, **given.get(key, {})} for key, default in _DEFAULTS.items()}
    chosen = {"task": {"name": task}, "method": {"name": method}, "rounds": rounds, "seed": seed}
    return {"controls": ["local", "pooled"], **given, **tables, **chosen, "backbone": {"name": backbone}}
