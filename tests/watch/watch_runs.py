"""Run directories as a run leaves them while it goes on, made without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confrere.record.files import write_bytes, write_json
from confrere.record.run import Run

SITES = ("north", "south", "west")
REASON = "values are not finite"


def begin(run: Path, *, rounds: int = 20, controls: Sequence[str] = ()) -> Path:
    """Write what stands in a run directory before round 1."""
    text = f'rounds = {rounds}\ncontrols = {json.dumps(list(controls))}\n\n[method]\nname = "fedopal"\n'
    write_bytes(run / "experiment.toml", text.encode())
    return run


def asked(round_: int, sites: Sequence[str] = SITES) -> dict[str, Any]:
    return {"event": "begin", "round": round_, "server": "0" * 64, "requests": dict.fromkeys(sites, "0" * 64)}


def failed(round_: int, site: str | None, code: str = "update-values", reason: str = REASON) -> dict[str, Any]:
    return {"event": "failure", "round": round_, "site": site, "code": code, "reason": reason}


def judged(round_: int, sites: Sequence[str] = SITES) -> dict[str, Any]:
    scores = {site: round(0.5 + 0.4 * (1 - 0.8**round_) - 0.05 * k, 4) for k, site in enumerate(sites)}
    mean = sum(scores.values()) / len(scores)
    return {"event": "evaluation", "round": round_, "split": "val", "sites": scores, "mean": mean, "counts": True}


def done(round_: int, sites: Sequence[str] = SITES) -> dict[str, Any]:
    record = {"loss": 1 / round_, "reply": "0" * 64, "sent_bytes": 1000, "received_bytes": 2000, "seconds": 1.5}
    return {"event": "round", "round": round_, "seconds": 2.0, "server": "0" * 64, "averaged": True,
            "sites": {site: dict(record) for site in sites}}  # fmt: skip


def one_round(run: Path, round_: int, sites: Sequence[str] = SITES, *failures: dict[str, Any]) -> None:
    """Append a whole round to the journal."""
    Run(run).append(asked(round_, sites), *failures, judged(round_, sites), done(round_, sites))


def status(run: Path, phase: str = "train", *, updated: float, sites: Any = None, **more: Any) -> None:
    """Write the coordinator's status."""
    told = sites if sites is not None else {s: {"online": True, "seen": updated, "waiting": False, "refused": ""}
                                            for s in SITES}  # fmt: skip
    plain = {"format": 1, "consortium": "dermatology", "phase": phase, "method": "fedopal", "round": 1, "rounds": 20,
             "since": updated, "updated": updated, "sites": told, "error": ""}  # fmt: skip
    write_json(run / "status.json", plain | more)
