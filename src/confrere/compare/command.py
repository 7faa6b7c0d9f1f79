"""What ``confrere compare`` does with its arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confrere.arguments import check_places, experiment_of, opened
from confrere.compare.run import compare
from confrere.config import Experiment, read
from confrere.errors import ConfigError
from confrere.progress import progress


def sort_out(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return data sets and overrides: what exists is data, else what holds an equals sign is an override."""
    data = [Path(one) for one in arguments if Path(one).exists() or "=" not in one]
    if not data:
        raise ConfigError(
            "no data are named", fix="confrere compare DATA --methods fedopal,fedit --out DIR", code="comparison"
        )
    return data, [one for one in arguments if not Path(one).exists() and "=" in one]


def carry_out(
    data: Sequence[Path],
    overrides: Sequence[str],
    *,
    methods: str,
    seeds: str,
    out: Path,
    jobs: int,
    trials: int,
    controls: bool,
    target: float | None,
    config: Path | None,
) -> dict[str, Any]:
    """Compare, showing progress; return comparison.json.

    Args:
        data: folders, tables, manifests, or TOML files of an experiment with a ``path``.
        overrides: ``key.path=value``.
        methods: labels with commas between; those in brackets part nothing (``fedit:attack.sites=["a", "b"]``).
        seeds: numbers with commas between.
        out: as the others, see :func:`confrere.compare.run.compare`.
        jobs: trainings at a time.
        trials: of tuning.
        controls: whether local and pooled training are added.
        target: validation score.
        config: a TOML file of an experiment.
    """
    labels = [label.strip() for label in re.split(r",(?![^\[]*\])", methods) if label.strip()]
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(
            f"{seeds!r} is not a list of numbers", where="--seeds", fix="--seeds 0,1,2", code="comparison"
        ) from None
    values = read(config) if config else {}
    if labels and not any(one.startswith("method") for one in overrides):
        # Not the default method, which may not carry what these can (adapter.ranks, backbone.depths).
        values = {"method": labels[0].split(":")[0], "controls": [], **values}
    found = [named_experiment(path, values, overrides) for path in data]
    for _, experiment in found:
        check_places(Path(experiment.path), out)
    kept: dict[str, Any] = {"jobs": jobs, "trials": trials, "controls": controls, "target": target}
    with progress(quiet=False) as notify:
        experiments, names = [one for _, one in found], [name for name, _ in found]
        return compare(experiments, labels, numbers, out, names=names, notify=notify, **kept)


def named_experiment(path: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[str, Experiment]:
    """Return a data set's name ("" where its federation has one) and experiment.

    Args:
        path: of the data; or a TOML file with a ``path`` of its own, which names the data set and whose keys and
            tables stand in for those of ``values``.
        values: what holds for all data sets.
        overrides: ``key.path=value``, the last word.
    """
    data, own = opened(path)
    return path.stem if own else "", experiment_of(data, {**values, **own}, overrides)
