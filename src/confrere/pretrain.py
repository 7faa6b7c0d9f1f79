"""``confrere pretrain`` is a run like any other, with other defaults: a pretext task, and a network trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confrere.errors import ConfigError
from confrere.tasks import make_task
from confrere.tasks.lwi import LearnableInitialisation

GENERAL = Path("adapters/general/backbone")
"""Where a run directory holds the backbone that all sites share."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "task": {"name": "reconstruction"},
    "backbone": {"name": "vit-tiny"},
    "method": {"name": "fedit"},
    "train": {"lr": 5e-4, "weight_decay": 0.05, "batch_size": 32, "steps": 20, "balance": "none", "views": 4},
    "selection": {"every": 5},
    "record": {"keep": 1},  # weights of a whole network fill a disk
}
_OF_VOLUMES: Mapping[str, Mapping[str, Any]] = {
    **_DEFAULTS,
    "backbone": {"name": "unetr"},
    "train": {"lr": 3e-3, "weight_decay": 1e-5, "batch_size": 4, "steps": 20, "balance": "none"},
}


def pretraining(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an experiment: those given, and the defaults of pre-training for all others.

    Raises:
        ConfigError: the task asks for labels.
    """
    of_volumes = given.get("task", {}).get("name") == LearnableInitialisation.name
    defaults = _OF_VOLUMES if of_volumes else _DEFAULTS
    tables = {key: {**default, **given.get(key, {})} for key, default in defaults.items()}
    if make_task(tables["task"]).target != "image":
        what, fix = (
            f"{tables['task']['name']} needs labels",
            "give --task reconstruction, contrast or, for volumes, lwi",
        )
        raise ConfigError(what, where="task", fix=fix, code="task")
    return {"controls": ["local", "pooled"], "rounds": 100, **given, **tables}
