"""Kinds of answers: each task is one file with its head, losses, judgement and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from confrere.errors import ConfigError, nearest
from confrere.tasks.classification import Classification
from confrere.tasks.detection import Detection
from confrere.tasks.lwi import LearnableInitialisation
from confrere.tasks.multilabel import MultiLabel
from confrere.tasks.pretext import Contrast, Reconstruction
from confrere.tasks.segmentation import Segmentation
from confrere.tasks.survival import Survival
from confrere.tasks.task import Objective, Task
from confrere.tasks.volume_segmentation import VolumeSegmentation

__all__ = ["CLASSIFICATION", "TASKS", "Objective", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Classification,
        MultiLabel,
        Segmentation,
        VolumeSegmentation,
        Detection,
        Survival,
        Reconstruction,
        Contrast,
        LearnableInitialisation,
    )
}
CLASSIFICATION = Classification()


def make_task(choice: Mapping[str, Any]) -> Task:
    """Return a task by its ``name`` with its options.

    Raises:
        ConfigError: there is no such task or option (the nearest is named), or a value is out of range.
    """
    options = {key: value for key, value in choice.items() if key != "name"}
    name = str(choice.get("name", Classification.name))
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r:.40}", where="task", fix=nearest(name, TASKS), code="unknown-name")
    known = TASKS[name].__dataclass_fields__
    for key in options:
        if key not in known:
            fix = nearest(key, known) if known else f"{name} has no options"
            raise ConfigError(f"{name} has no option {key!r:.40}", where=f"task.{key}", fix=fix, code="unknown-key")
    try:
        return TypeAdapter(TASKS[name]).validate_python(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["task", *map(str, first["loc"])])
        what, fix = f"{first['msg']}; got {first['input']!r:.100}", "see docs/survival.md"
        raise ConfigError(what, where=where, fix=fix) from None
