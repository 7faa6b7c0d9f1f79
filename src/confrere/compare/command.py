"""What ``confrere compare`` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confrere.compare.run import compare
from confrere.config import override, read, validate
from confrere.errors import ConfigError
from confrere.progress import progress


def sort_out(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return data sets and overrides: what exists is data, else what holds an equals sign is an override."""
    data = [Path(one) for one in arguments if Path(one).exists() or "=" not in one]
    if not data:
        raise ConfigError("no data are named", fix="confrere compare DATA --methods fedopal,fedit --out DIR")
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
        data: folders, tables or manifests.
        overrides: ``key.path=value``.
        methods: names with commas between.
        seeds: numbers with commas between.
        out: as the others, see :func:`confrere.compare.run.compare`.
        jobs: trainings at a time.
        trials: of tuning.
        controls: whether local and pooled training are added.
        target: validation score.
        config: a TOML file of an experiment.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"{seeds!r} is not a list of numbers", where="--seeds", fix="--seeds 0,1,2") from None
    values = override(read(config) if config else {}, overrides)
    experiments = [validate({**values, "path": str(path.resolve())}) for path in data]
    with progress(quiet=False) as notify:
        return compare(
            experiments, names, numbers, out, jobs=jobs, trials=trials, controls=controls, target=target, notify=notify
        )
