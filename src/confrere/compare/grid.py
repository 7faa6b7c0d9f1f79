"""The finished runs of a comparison, by method, data set and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from confrere.errors import ConfigError
from confrere.method import METHODS
from confrere.metrics.paired import Run as Predictions
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.report.task import LEFT_OUT
from confrere.tasks import CLASSIFICATION
from confrere.verdicts import predictions


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Finished runs.

    Args:
        labels: methods in the order of the table. sets: names of data sets. seeds: of training.
        where: run directory by (method, data set, seed).
        origin: the first data set of the same files, for those that have one: their patients are the same.
    """

    labels: Sequence[str]
    sets: Sequence[str]
    seeds: Sequence[int]
    where: Mapping[tuple[str, str, int], Path]
    origin: Mapping[str, str] = field(default_factory=dict)
    _read: dict[tuple[str, Path], Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def task(self) -> dict[str, Any]:
        """Return the task of all runs as results.json has it, its ``measures`` those that are compared.

        Raises:
            ConfigError: the runs have different tasks.
        """
        results = [self.results(label, data) for label in self.labels for data in self.sets]
        found = [result.get("task", CLASSIFICATION.describe()) for by_seed in results for result in by_seed]
        if any(one != found[0] for one in found):
            names = ", ".join(sorted({str(one["name"]) for one in found}))
            fix = "compare runs of one task"
            raise ConfigError(f"the runs have different tasks: {names}", where="compare", fix=fix, code="comparison")
        measures = {key: words for key, words in found[0]["measures"].items() if key not in LEFT_OUT}
        return {**found[0], "measures": measures}

    @property
    def headline(self) -> str:
        """Return the key of the metric that is compared."""
        return str(self.task["headline"])

    def runs(self, label: str, data: str) -> list[Path]:
        """Return the run directories of one method on one data set, by seed."""
        return [self.where[label, data, seed] for seed in self.seeds]

    def results(self, label: str, data: str) -> list[dict[str, Any]]:
        """Return results.json of each seed."""
        return [self._once("results", path) for path in self.runs(label, data)]

    def events(self, label: str, data: str) -> list[list[dict[str, Any]]]:
        """Return the journal of each seed."""
        return [self._once("events", path) for path in self.runs(label, data)]

    def predictions(self, label: str, data: str, site: str) -> list[Predictions | None]:
        """Return the personalised model's test predictions of each seed."""
        return [predictions(path, site) for path in self.runs(label, data)]

    def sites(self, *, held_out: bool = False) -> list[tuple[str, str]]:
        """Return (data set, site) of the sites that train, or of those held out, sorted within a data set."""
        found = []
        for data in self.sets:
            entries = self.results(self.labels[0], data)[0]["sites"]
            found += [(data, site) for site, entry in sorted(entries.items()) if entry["held_out"] == held_out]
        return found

    def site_name(self, data: str, site: str) -> str:
        """Return what a site is called: with its data set where there are several."""
        return f"{data}/{site}" if len(self.sets) > 1 else site

    def _once(self, kind: str, path: Path) -> Any:
        if (kind, path) not in self._read:
            found = read_json(path / "results.json") if kind == "results" else Run(path).events()
            self._read[kind, path] = found
        return self._read[kind, path]


def title(label: str) -> str:
    """Return a method's title with the options of its label, e.g. ``FedOPAL (...), head=local``."""
    name, *options = label.split(":")
    return ", ".join([METHODS[name].title, *options])


def value(result: Mapping[str, Any], site: str, model: str, metric: str) -> float | None:
    """Return one test score of results.json, None if undefined."""
    metrics = result["sites"].get(site, {"models": {}})["models"].get(model)
    return metrics[metric]["value"] if metrics else None
