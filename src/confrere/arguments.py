"""What stands on a command line, as an experiment: alike for every verb that takes PATH, a file and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confrere.config import Experiment, override, read, validate
from confrere.errors import ConfigError


def named(path: Path, config: Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the data and the values that PATH and ``--config`` name; PATH may be the file of an experiment."""
    values = read(config) if config else {}
    data, own = opened(path)
    return data, {**own, **values}


def opened(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the data and the values of the TOML file of an experiment; any other path itself, and no values."""
    if path.suffix == ".toml" and path.is_file() and "path" in (found := read(path)):
        return Path(str(found["path"])), found
    return path, {}


def experiment_of(path: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> Experiment:
    """Return the experiment on the data at ``path``; ConfigError names the first wrong key."""
    return validate(override({**values, "path": str(path.resolve())}, overrides))


def check_places(path: Path, out: Path | None) -> None:
    """Raise ConfigError where the data are not there, or where the run would be written into them."""
    if not path.exists():
        raise ConfigError(
            "no such file or folder",
            where=str(path),
            fix="give a folder of sites, a CSV or a TOML file",
            code="no-such-path",
        )
    if out is not None and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            "the run would be written into the data",
            where="--out",
            fix="choose a place outside PATH",
            code="out-inside-data",
        )
