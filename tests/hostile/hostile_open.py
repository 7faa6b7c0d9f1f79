"""The ways in: each opens a case as a user's command or another machine would, through the real functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_case import Base

from confrere import cli
from confrere.adapters import lora
from confrere.adapters.folder import import_
from confrere.backbones import load
from confrere.data.cache import decoded
from confrere.data.check import check, render_check
from confrere.data.options import DataOptions
from confrere.errors import DataError
from confrere.predict import predict_folder
from confrere.record.files import parse_state, read_state
from confrere.record.run import Run
from confrere.record.store import DirectoryStore


def data(path: Path, base: Base) -> str:
    """``confrere data check``."""
    return _checked(check(path, DataOptions()))


def picture(path: Path, base: Base) -> str:
    """``confrere data check data.on_bad=stop``, whose list names the file."""
    found = check(path, DataOptions(on_bad="stop"))
    if found["error"] and found["problems"]:
        found["error"]["where"] = " ".join(problem["name"] for problem in found["problems"])
    return _checked(found)


def _checked(found: dict[str, object]) -> str:
    render_check(found)
    error = found["error"]
    if isinstance(error, dict):
        raise DataError(error["what"], where=error["where"], fix=error["fix"], code=error["code"])
    sites = found["sheet"]["sites"]  # type: ignore[index]
    return json.dumps(found) + f" images={sites['a']['images']}"


def command(*words: object) -> str:
    """The command line in this process; errors come out as they are."""
    return str(cli.app([str(word) for word in words], standalone_mode=False))


def experiment(path: Path, base: Base) -> str:
    return command("run", base.data, "--config", path, "--out", path.with_suffix(".run"), "--quiet")


def override(path: Path, base: Base) -> str:
    return command("run", base.data, "--out", path.with_suffix(".run"), "--quiet", path.read_text())


def backbone(path: Path, base: Base) -> str:
    return load(path, lora=lora.LoraSpec(slots=("general",), blocks=1)).digest


def adapter(path: Path, base: Base) -> str:
    return f"{len(import_(path, slot='general', scale=1.0))} tensors"


def state(path: Path, base: Base) -> str:
    return f"round {read_state(path)[1]['round']}"


def update(path: Path, base: Base) -> str:
    return str(parse_state(path.read_bytes(), where="site a, round 1", limit=1_000_000)[1])


def site(path: Path, base: Base) -> str:
    return str(DirectoryStore(path, "a").before(9))


def server(path: Path, base: Base) -> str:
    return str(sorted(Run(path).server(1)))


def journal(path: Path, base: Base) -> str:
    run = Run(path)
    return f"{len(run.events())} events, round {run.last_round()}"


def resume(path: Path, base: Base) -> str:
    command("resume", path, "--quiet")
    return "finished" if (path / "results.json").exists() else "unfinished"


def predict(path: Path, base: Base) -> str:
    images = path.parent / "images"
    source = images if images.exists() else base.data / "a" / "x"
    count, problems = predict_folder(path, "a", source, path.parent / "out.csv")
    return f"{count} images; {problems}; {(path.parent / 'out.csv').read_text()}"


def cache(path: Path, base: Base) -> str:
    """An entry of the cache of pixels, damaged: it is made anew."""
    import hashlib

    files = {hashlib.sha256(f.read_bytes()).hexdigest(): f for f in sorted((base.data / "a" / "x").iterdir())}
    found = decoded(path, files, (8, 8), max_pixels=10_000)
    return f"{np.asarray(found.images[:]).shape} {dict(found.bad)}"


WAYS: dict[str, Callable[[Path, Base], str]] = {
    way.__name__: way
    for way in (data, picture, experiment, override, backbone, adapter, state, update, site, server, journal, resume)
} | {"predict": predict, "cache": cache}
