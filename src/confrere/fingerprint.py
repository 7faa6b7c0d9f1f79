"""What a run began with, kept beside it: another experiment, machine or data is noticed before it goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from confrere.config import Experiment, read, validate
from confrere.data.federation import Federation
from confrere.errors import RunError
from confrere.record.files import read_json, write_bytes, write_json
from confrere.record.machine import machine
from confrere.record.run import Run


def stored_experiment(out: Path) -> Experiment:
    """Return the experiment of a run to resume; RunError when there is no run."""
    if not (out / "experiment.toml").exists():
        raise RunError("no run here", where=str(out), fix="give the --out directory of `confrere run`", code="no-run")
    return validate(read(out / "experiment.toml"))


def trainings(out: Path, experiment: Experiment) -> list[Path]:
    """Return the directories of a run's trainings: its own, then those of its controls."""
    return [out, *(out / "controls" / name for name in experiment.other_controls)]


def differences(out: Path, experiment: Experiment) -> list[str]:
    """Return what is not as it was when the run began, one sentence each: packages, threads, processor, choices."""
    now, then = {**machine(), **experiment.choices()}, read_json(out / "machine.json")
    return [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in {**now, **then} if then.get(k) != now.get(k)]


def begin(out: Path, experiment: Experiment, federation: Federation, *, accept_drift: bool) -> None:
    """Write what a run begins with, or refuse one that began with something else.

    Raises:
        RunError: the data changed; or, without ``accept_drift``, anything else of :func:`differences`.
    """
    if (out / "experiment.toml").exists():
        changed = differences(out, experiment)
        if changed and not accept_drift:
            raise RunError(
                "machine, packages or experiment changed since this run began: " + "; ".join(changed),
                where=str(out),
                fix="restore them, choose another --out, or resume with --accept-drift and give up bit-identity",
                code="drift",
            )
        if read_json(out / "federation.json")["digest"] != federation.digest:
            raise RunError(
                "the data changed since this run began", where=str(out), fix="start a new run", code="data-changed"
            )
        drift = {"event": "drift", "changed": changed}
        unfinished = any(not (part / "results.json").exists() for part in trainings(out, experiment))
        if changed and unfinished and drift not in Run(out).events():
            Run(out).append(drift)
        return
    write_json(out / "machine.json", {**machine(), **experiment.choices()})
    kept = {
        "name": federation.name,
        "synthetic": federation.synthetic,
        "classes": list(federation.classes),
        "strata": list(federation.strata),
        "image_size": list(federation.image_size),
        "digest": federation.digest,
        "sheet": federation.sheet,
    }
    write_json(out / "federation.json", kept)
    write_bytes(out / "experiment.toml", experiment.toml().encode())


def stamp(experiment: Experiment, federation: Federation) -> str:
    """Return what marks the messages of a run: the same for the same data, method and seed, 16 hexadecimal digits."""
    told = json.dumps([federation.digest, experiment.method["name"], experiment.seed])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def digest_of(experiment: Experiment) -> str:
    """Return a SHA-256 over every choice that results depend on."""
    return hashlib.sha256(json.dumps(experiment.choices(), sort_keys=True).encode()).hexdigest()


def inputs(experiment: Experiment, federation: Federation, backbone: object) -> dict[str, object]:
    """Return the event that opens a journal: digests of the experiment, the data and the frozen model."""
    return {
        "event": "inputs",
        "experiment": digest_of(experiment),
        "data": federation.digest,
        "backbone": backbone,
        "stamp": stamp(experiment, federation),
    }
