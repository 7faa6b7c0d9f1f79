"""Equal tuning: every method gets the same number of trials, judged on validation data with a seed of its own.

A trial is a cell like any other. The job examines test data at the end of every training; the tuner reads the
journal of the rounds only, where nothing of test data stands. Trial 0 of every method is the experiment as it is, so
that tuning never ends below it. Each later trial asks a sampler of its own seed what to try, given the trials before:
a search that was stopped replays its finished cells and goes on as if it had not been, and a larger budget
keeps the trials of a smaller one.

References:
    Watanabe, "Tree-Structured Parzen Estimator", arXiv 2304.11127.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confrere.compare.cells import Cell, Notify, folder, run_cells
from confrere.compare.data import DataSet
from confrere.config import Experiment, validate
from confrere.errors import ConfigError, MissingExtraError
from confrere.federation.selection import best_round
from confrere.method import METHODS
from confrere.record.run import Run
from confrere.seeds import derive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LR = (1e-4, 1e-2)
"""Bounds of train.lr, log-uniform; widened where the experiment's own rate lies outside."""
AT_RANDOM = 5
"""So many trials before the sampler models what it saw."""
DRAWS = 50
"""So many draws a trial has to find values that the method takes in this experiment."""


def tuning_seed(seeds: Sequence[int]) -> int:
    """Return the training seed of all trials: the first from 1000 that is not compared."""
    return next(seed for seed in range(1000, 1001 + len(seeds)) if seed not in seeds)


def tune(
    out: Path,
    sets: Sequence[DataSet],
    labels: Sequence[str],
    seeds: Sequence[int],
    trials: int,
    *,
    jobs: int,
    notify: Notify,
) -> list[dict[str, Any]]:
    """Return for every data set and method its trials and the ``values`` chosen from them.

    Raises:
        MissingExtraError: optuna is not installed. RunError: every trial of a method diverged.
    """
    searches = [Search(one, label, tuning_seed(seeds)) for one in sets for label in labels]
    for number in range(trials):
        cells = [search.ask(number) for search in searches]
        run_cells(out, cells, jobs=jobs, notify=notify)
        for search, cell in zip(searches, cells, strict=True):
            search.tell(cell, criterion(folder(out, cell)))
    found = [search.result() for search in searches]
    for one in found:
        notify({"event": "tuned", **one})
    return found


def criterion(path: Path) -> float | None:
    """Return the validation criterion of the best round of a run, from its journal alone; None if it diverged."""
    if (path / "diverged.json").exists():
        return None
    events = Run(path).events()
    chosen = best_round(events)
    known = [e["criterion"] for e in events if e["event"] == "evaluation" and e["round"] == chosen]
    return float(known[0]) if known and known[0] is not None else None


def space(experiment: Experiment) -> dict[str, tuple[Any, ...]]:
    """Return what is searched: ``train.lr`` and the method's own knobs, but not those that were set by hand."""
    lr = experiment.train.lr
    found: dict[str, tuple[Any, ...]] = {"train.lr": ("log", min(LR[0], lr), max(LR[1], lr))}
    search = METHODS[str(experiment.method["name"])].search
    return found | {f"method.{key}": spec for key, spec in search.items() if key not in experiment.method}


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """Return the experiment with tuned ``values`` (``train.lr``, ``method.<option>``)."""
    options = {key.removeprefix("method."): value for key, value in values.items() if key != "train.lr"}
    train = experiment.train.model_dump() | {"lr": values.get("train.lr", experiment.train.lr)}
    return validate({**experiment.model_dump(), "method": {**experiment.method, **options}, "train": train})


class Search:
    """The trials of one method on one data set."""

    def __init__(self, one: DataSet, label: str, seed: int) -> None:
        optuna = _optuna()
        self.data, self.label, self.seed = one, label, seed
        self.base = one.experiment.for_method(label, seed=seed, track=())
        self.space = space(self.base)
        method = self.base.build_method()
        self.kinds = {f"method.{f.name}": type(getattr(method, f.name)) for f in fields(method)}
        self.start = {
            key: self.base.train.lr if key == "train.lr" else getattr(method, key.removeprefix("method."))
            for key in self.space
        }
        self.ranges = {key: distribution(key, spec, self.kinds.get(key)) for key, spec in self.space.items()}
        self.study = optuna.create_study(direction="maximize")
        self.trials: list[dict[str, Any]] = []

    def ask(self, number: int) -> Cell:
        """Return the cell of trial ``number``; the trials before it must have been told."""
        if number == 0:
            self.values = dict(self.start)
        else:
            self.draw(number)
        return Cell(
            experiment=with_values(self.base, self.values),
            data=self.data.name,
            data_digest=self.data.digest,
            label=self.label,
            trial=True,
        )

    def draw(self, number: int) -> None:
        """Ask the sampler for values that the method takes; those it refuses count as pruned and cost no training.

        Raises:
            ConfigError: all draws were refused; it says why the last one was.
        """
        for attempt in range(DRAWS):
            address = ("tuning", number, attempt) if attempt else ("tuning", number)
            sampler = _optuna().samplers.TPESampler(
                seed=derive(self.seed, *address) % 2**32, n_startup_trials=AT_RANDOM
            )
            self.study.sampler = sampler
            self.asked = self.study.ask(self.ranges)
            self.values = dict(self.asked.params)
            try:
                with_values(self.base, self.values)
                return
            except ConfigError as error:
                refused = error
                self.study.tell(self.asked, state=_optuna().trial.TrialState.PRUNED)
        raise ConfigError(
            f"none of {DRAWS} draws was a valid experiment, the last one because {refused.what}",
            where=f"tuning of {self.label} on {self.data.name}",
            fix=refused.fix,
            code="tuning",
        )

    def tell(self, cell: Cell, value: float | None) -> None:
        """Take the criterion of the trial that was asked last; None: it diverged."""
        states = _optuna().trial.TrialState
        outcome = states.FAIL if value is None else states.COMPLETE
        if self.trials:
            self.study.tell(self.asked, value, state=outcome)
        elif all(inside(spec, self.start[key]) for key, spec in self.space.items()):
            create = _optuna().trial.create_trial
            self.study.add_trial(create(params=self.start, distributions=self.ranges, value=value, state=outcome))
        self.trials.append({"values": self.values, "criterion": value, "cell": cell.digest})

    def result(self) -> dict[str, Any]:
        """Return the trials and the best of them, the earliest of equals."""
        done = [one for one in self.trials if one["criterion"] is not None]
        if not done:
            raise ConfigError(
                "every trial diverged or had no validation images",
                where=f"tuning of {self.label} on {self.data.name}",
                fix="lower train.lr, or give the hospitals validation images",
                code="tuning",
            )
        best = max(done, key=lambda one: float(one["criterion"]))
        return {
            "method": self.label,
            "data": self.data.name,
            "seed": self.seed,
            "space": {key: list(spec) for key, spec in self.space.items()},
            "values": best["values"],
            "criterion": best["criterion"],
            "untuned": self.trials[0]["criterion"],
            "trials": self.trials,
        }


def inside(spec: tuple[Any, ...], value: Any) -> bool:
    """Return whether a value lies in a search range; an option's default need not."""
    how, *values = spec
    return value in values if how == "choice" else bool(values[0] <= value <= values[1])


def distribution(key: str, spec: tuple[Any, ...], kind: type | None) -> BaseDistribution:
    """Return Optuna's form of ``("log", low, high)``, ``("linear", low, high)`` or ``("choice", ...)``."""
    made = _optuna().distributions
    how, *values = spec
    if how == "choice" and values:
        return made.CategoricalDistribution(values)
    if how in ("log", "linear") and len(values) == 2:
        whole = kind is int
        of = made.IntDistribution if whole else made.FloatDistribution
        return of(*values, log=how == "log")
    raise ConfigError(
        f"{spec!r} is no search range", where=key, fix='("log", low, high) or ("choice", "a", "b")', code="tuning"
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "tune", needed_for="--tune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
