"""Compare methods fairly: same data, split, backbone, total rank and steps, several seeds, paired tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from confrere.config import Experiment, read, validate
from confrere.errors import ConfigError, RunError
from confrere.job import run_experiment
from confrere.method import METHODS
from confrere.metrics.bootstrap import LEVEL
from confrere.metrics.paired import holm, verdict
from confrere.record.files import read_json, write_bytes, write_json
from confrere.record.machine import cores, machine
from confrere.record.run import Run
from confrere.verdicts import site_gain

Notify = Callable[[dict[str, Any]], None]


def compare(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    notify: Notify = lambda event: None,
) -> dict[str, Any]:
    """Train every method with every seed into ``out/runs/<method>/seed-<s>`` and write comparison.json.

    Finished runs are kept, so a comparison that was stopped continues where it was.

    Args:
        experiment: everything that is the same for all runs.
        methods: names, with options after colons (``fedopal:head=local``); the first is tested against the others.
        seeds: of training; the split is the same for all.
        out: directory of the comparison.
        notify: called with each event.
        jobs: runs at a time, each in its own process with ``experiment.threads`` threads.

    Raises:
        ConfigError: unknown method, no seed. RunError: a run failed, or ``out`` holds runs of another experiment.
    """
    if not methods or not seeds or len(set(seeds)) != len(seeds) or len(set(methods)) != len(methods):
        raise ConfigError("give methods and seeds, each once", fix="--methods fedopal,local --seeds 0,1,2")
    every = [(experiment.for_method(name, seed=seed), folder(out, name, seed)) for seed in seeds for name in methods]
    for one, path in every:
        if (path / "experiment.toml").exists() and validate(read(path / "experiment.toml")).choices() != one.choices():
            raise RunError("a run of another experiment is there", where=str(path), fix="choose another --out")
    todo = [(one, path) for one, path in every if not (path / "results.json").exists()]
    notify({"event": "runs", "total": len(every), "done": len(every) - len(todo)})
    if jobs == 1:
        for one, path in todo:
            notify({"event": "run", "path": path})
            run_experiment(one, path, notify=notify)
            notify({"event": "run-done", "path": path})
    else:
        _in_processes(todo, jobs, notify)
    result = summarise(out, methods, seeds, experiment)
    write_json(out / "comparison.json", result)
    return result


def folder(out: Path, label: str, seed: int) -> Path:
    """Return the directory of one run of a comparison."""
    return out / "runs" / label.replace(":", "+") / f"seed-{seed}"


def title(label: str) -> str:
    """Return a method's title with the options of its label, e.g. ``FedOPAL (...), head=local``."""
    name, *options = label.split(":")
    return ", ".join([METHODS[name].title, *options])


def summarise(out: Path, methods: Sequence[str], seeds: Sequence[int], experiment: Experiment) -> dict[str, Any]:
    """Return comparison.json from finished runs: one row a method, paired tests of the first against the others."""
    first = folder(out, methods[0], seeds[0])
    rows = [_row(name, [folder(out, name, s) for s in seeds], seeds) for name in methods]
    pairs = [pair for other in methods[1:] for pair in _pairs(methods[0], other, out, seeds, sorted(rows[0]["sites"]))]
    return {
        "methods": rows,
        "pairs": adjusted(pairs),
        "seeds": list(seeds),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "federation": read_json(first / "federation.json"),
        "experiment": experiment.toml(),
        "command": f"confrere compare DATA --methods {','.join(methods)} --seeds {','.join(map(str, seeds))}",
    }


def _row(name: str, runs: Sequence[Path], seeds: Sequence[int]) -> dict[str, Any]:
    results = [read_json(run / "results.json") for run in runs]
    sites = [s for s, entry in results[0]["sites"].items() if not entry["held_out"]]
    row: dict[str, Any] = {"name": name, "title": title(name), "seeds": list(seeds)}
    for metric in ("balanced_accuracy", "auroc", "f1", "ece"):
        row[metric] = _over_seeds([_values(r, sites, "personalised", metric) for r in results])
    held_out = [s for s, entry in results[0]["sites"].items() if entry["held_out"]]
    row["general"] = _over_seeds([_values(r, sites, "general", "balanced_accuracy") for r in results])
    row["held_out"] = _over_seeds([_values(r, held_out, "general", "balanced_accuracy") for r in results])
    row["sites"] = {
        s: _interval([v for r in results if (v := _value(r, s, "personalised", "balanced_accuracy")) is not None])
        for s in sites
    }
    row["rounds_chosen"] = [r["round"] for r in results]
    row["seconds"] = float(np.mean([r["seconds"] for r in results]))
    total = sum(e["sent_bytes"] + e["received_bytes"] for r in results for e in r["sites"].values())
    row["bytes_per_round"] = total / sum(r["rounds"] for r in results)
    row["overlap_after"] = _overlap(runs, results)
    return row


def _pairs(ours: str, theirs: str, out: Path, seeds: Sequence[int], sites: Sequence[str]) -> list[dict[str, Any]]:
    pairs = []
    for site in sites:
        gain = site_gain([folder(out, ours, s) for s in seeds], [folder(out, theirs, s) for s in seeds], site)
        if gain is not None:
            pairs.append({"a": ours, "b": theirs, "site": site, **gain})
    return pairs


def adjusted(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs with Holm's p-value and a sentence; words, interval and adjusted p tell one story."""
    told = []
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        one = {**pair, "p_holm": p}
        if p is not None and p >= 1 - LEVEL:
            one |= {"low": min(pair["low"], 0.0), "high": max(pair["high"], 0.0)}
        told.append({**one, "sentence": verdict(pair["site"], one, title(pair["b"]), subject=title(pair["a"]))})
    return told


def _value(result: Mapping[str, Any], site: str, model: str, metric: str) -> float | None:
    metrics = result["sites"][site]["models"].get(model)
    return metrics[metric]["value"] if metrics else None


def _values(result: Mapping[str, Any], sites: Sequence[str], model: str, metric: str) -> list[float]:
    return [v for s in sites if (v := _value(result, s, model, metric)) is not None]


def _over_seeds(per_seed: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return mean over sites, then mean and 95 % t-interval over seeds; the same for the worst site."""
    if not all(len(values) for values in per_seed):
        return None
    mean, worst = (_interval([float(f(v)) for v in per_seed]) for f in (np.mean, np.min))
    return {**mean, "worst": worst["mean"], "worst_low": worst["low"], "worst_high": worst["high"]}


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of scores in 0..1 and its 95 % Student t interval, cut to 0..1; none from a single value."""
    from scipy import stats

    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def _overlap(runs: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return the mean overlap of the adapters after averaging in the chosen round, over sites and seeds."""
    found: dict[str, list[float]] = {}
    for run, result in zip(runs, results, strict=True):
        for event in Run(run).events():
            if event["event"] == "round" and event["round"] == result["round"]:
                for measures in (event["diagnostics"]["overlap_after"] or {}).values():
                    for key, value in measures.items():
                        if value is not None:
                            found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()} or None


def _in_processes(todo: Sequence[tuple[Experiment, Path]], jobs: int, notify: Notify) -> None:
    """Run experiments in separate processes, ``jobs`` at a time; a process is only given a TOML file."""
    waiting = list(todo)
    running: dict[Path, subprocess.Popen[str]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                experiment, path = waiting.pop(0)
                plan = path.parent / f"{path.name}.toml"
                share = experiment.workers or max(1, cores() // jobs)
                write_bytes(plan, experiment.model_copy(update={"workers": share}).toml().encode())
                begun = (path / "experiment.toml").exists()
                verb = ["resume", str(path), "--quiet"] if begun else ["run", str(plan), "--out", str(path), "--quiet"]
                notify({"event": "run", "path": path})
                command = [sys.executable, "-m", "confrere", *verb]
                running[path] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for path, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[path]
                _, errors = process.communicate()
                if process.returncode:
                    raise RunError(errors.strip() or "a run failed", where=str(path))
                notify({"event": "run-done", "path": path})
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.communicate()
