"""Python, packages, processor and memory."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from confrere.config import Experiment
from confrere.doctor.finding import Finding, attempt
from confrere.errors import MissingExtraError
from confrere.record.machine import cores
from confrere.record.signing import VARIABLE, sign

LEAST_MEMORY = 1_500_000_000
"""Bytes that Python, the libraries and a small model need."""


def machine_findings(experiment: Experiment | None) -> list[Finding]:
    """Return what stands about this machine, and about what the experiment needs of it."""
    found = [_python(), *_packages(), *_extras(experiment), *_processor(experiment), _memory()]
    if os.environ.get(VARIABLE) and attempt("signing", lambda: sign("0" * 64), found):
        found.append(Finding("ok", "signing", "the key can sign"))
    return found


def requirements(extra: str = "") -> list[Requirement]:
    """Return what the installed package says it needs: always, or for one of its extras."""
    listed = [Requirement(text) for text in metadata.requires("confrere") or ()]

    def wanted(one: Requirement, name: str) -> bool:
        return one.marker is None or one.marker.evaluate({"extra": name})

    return [one for one in listed if wanted(one, extra) and (not extra or not wanted(one, ""))]


def _python() -> Finding:
    have, want = platform.python_version(), SpecifierSet(metadata.metadata("confrere")["Requires-Python"])
    if want.contains(have, prereleases=True):
        return Finding("ok", "python", have)
    return Finding("error", "python", f"{have} is installed, {want} is needed", fix="use a newer Python", exit_code=8)


def _packages() -> list[Finding]:
    """Return one finding a package that is missing or too old, else one for all."""
    needed = requirements()
    wrong = [found for one in needed if (found := fault(one))]
    if wrong:
        return [Finding("error", "packages", what, fix=fix, exit_code=8) for what, fix in wrong]
    return [Finding("ok", "packages", f"{len(needed)} are there and new enough, torch {metadata.version('torch')}")]


def fault(one: Requirement) -> tuple[str, str] | None:
    """Return what is wrong with an installed package, and the fix; None where it is there and new enough."""
    try:
        have = metadata.version(one.name)
    except metadata.PackageNotFoundError:
        return f"{one.name} is not installed", f"pip install '{one.name}{one.specifier}'"
    if one.specifier.contains(have, prereleases=True):
        return None
    return f"{one.name} {have} is installed, {one.specifier} is needed", f"pip install '{one.name}{one.specifier}'"


def _extras(experiment: Experiment | None) -> list[Finding]:
    """Return what is missing of the extras that a run of ``experiment`` would ask for."""
    uses = {"report": ("the report", requirements("report"))}
    for name in experiment.track if experiment else ():
        uses[f"track {name}"] = (f"track = ['{name}']", [r for r in requirements("track") if r.name == name])
    found = []
    for use, (needed_for, needed) in uses.items():
        for one in needed:
            wrong = fault(one)
            if wrong:
                missing = MissingExtraError(one.name, use.split()[0], needed_for=needed_for)
                found.append(Finding("error", "extras", f"{needed_for}: {wrong[0]}", fix=missing.fix, exit_code=8))
    return found or [Finding("ok", "extras", " and ".join(needed_for for needed_for, _ in uses.values()))]


def _processor(experiment: Experiment | None) -> list[Finding]:
    capability, have = torch.backends.cpu.get_cpu_capability(), cores()
    found = [Finding("ok", "processor", f"{have} cores, {capability}")]
    if capability in ("DEFAULT", "NO AVX"):
        what = f"torch uses no vector instructions here ({capability}): training is several times slower"
        found = [Finding("warning", "processor", what, fix="unset ATEN_CPU_CAPABILITY, or use a newer processor")]
    if experiment is None:
        return found
    if experiment.engine.precision == "bf16" and experiment.engine.device == "cpu" and "AVX512" not in capability:
        what = f"{capability} does not multiply bfloat16: it saves memory here, but no time"
        found.append(Finding("warning", "processor", what, "engine.precision", "use engine.precision=fp32"))
    for key, number in (("threads", experiment.threads), ("workers", experiment.workers)):
        if number > have:
            what = f"{number} {key} on {have} cores wait for each other"
            found.append(Finding("warning", "processor", what, key, f"use at most {key}={have}"))
    return found


def _memory() -> Finding:
    free = free_memory()
    if free is None:
        return Finding("ok", "memory", "how much is free cannot be told on this system")
    if free < LEAST_MEMORY:
        what = f"{free / 1e9:.1f} GB are free, a run needs about {LEAST_MEMORY / 1e9:.1f} GB or more"
        return Finding("warning", "memory", what, fix="end other programs, or use a machine with more")
    return Finding("ok", "memory", f"{free / 1e9:.1f} GB free")


def free_memory() -> int | None:
    """Return the bytes that this process may still take, within its control group; None where the system hides it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
