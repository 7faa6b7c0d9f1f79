"""Two tiny data sets and what a comparison of them is made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from confrere.config import Experiment, validate

TINY: dict[str, Any] = {
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2},
    "rounds": 2,
    "threads": 1,
    "train": {"steps": 2, "batch_size": 4},
}


def experiment(data: Path, **changes: Any) -> Experiment:
    return validate({**TINY, "path": str(data), **changes})


class Log:
    """Keeps the events of a comparison."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def trained(self) -> list[str]:
        return [e["name"] for e in self.events if e["event"] == "run"]


def stamps(out: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in (out / "cells").rglob("results.json")}
