"""Real ``confrere site`` and ``confrere coordinator`` processes on this machine, and all that they start.

Every process carries a mark in its environment, which those that it starts inherit: so all are found in /proc, whatever
session they run in and whoever their parent is by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
from members import CLASSES, SITES, SMALL, make_images
from safetensors.numpy import load, save

from confrere.config import override, validate
from confrere.consortium.provision import provision
from confrere.flower.processes import free_port
from confrere.job import run_experiment

MARK = "CONFRERE_TEST_PROCESS"
MAIN = "from confrere.cli import main; main()"
POLICY = 'groups = ["shared", "control", "choice", "tier"]\nleast_examples = 5\n'
PLAIN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

PATIENCE = 600.0
"""Seconds: a loaded machine says nothing about correctness."""


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what ``holds`` returns once that is true; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return found


class Hospitals:
    """The three hospitals of tests/flower/members.py with kits, each process with a log of its own.

    Args:
        folder: everything is written below it.
        address: where the coordinator is reached.
        inside: site -> command that runs what follows it elsewhere, e.g. in a network namespace.
    """

    def __init__(
        self, folder: Path, address: str = "127.0.0.1", inside: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.folder, self.address, self.inside = folder, address, dict(inside or {})
        self.images, self.kits, self.state = make_images(folder / "images"), folder / "kits", folder / "state"
        self.port, self.mark = free_port(), secrets.token_hex(8)
        self.provision(SITES)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def provision(self, sites: Sequence[str], **how: Any) -> None:
        """Make or renew the kits of ``sites``."""
        roster = self.folder / "consortium.toml"
        text = f'name = "members"\naddress = "{self.address}"\nport = {self.port}\nclasses = {json.dumps(CLASSES)}\n'
        roster.write_text(text + "".join(f'[[sites]]\nname = "{site}"\n' for site in sites))
        provision(roster, self.kits, **how)
        for site in sites:
            (self.kits / "sites" / site / "policy.toml").write_text(POLICY)

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of the process ``name``."""
        cache = str(self.folder / "cache")
        return {**os.environ, **PLAIN, MARK: f"{self.mark}.{name}", "CONFRERE_CACHE": cache, "COLUMNS": "200"}

    def start(self, name: str, *words: str, code: str = MAIN) -> subprocess.Popen[bytes]:
        """Start ``confrere WORDS`` as ``name``; ``code`` may change something in it first."""
        log = self.folder / f"{name}.log"
        line = [*self.inside.get(name, ()), sys.executable, "-c", code, *words]
        with log.open("wb") as output:
            self.processes[name] = subprocess.Popen(
                line,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # as in a terminal of its own
            )
        return self.processes[name]

    def site(
        self, name: str, *options: str, kit: Path | None = None, state: str = "", code: str = MAIN, process: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start ``confrere site`` for ``name``; by default with its own kit and state."""
        folder = str(kit or self.kits / "sites" / name)
        data, own = str(self.images / name), str(self.state / (state or name))
        return self.start(process or name, "site", folder, "--data", data, "--state", own, *options, code=code)

    def sites(self) -> None:
        """Start all three."""
        for name in SITES:
            self.site(name)

    def coordinator(self, out: Path, *options: str) -> subprocess.Popen[bytes]:
        """Start ``confrere coordinator``: with the small experiment, or with ``out`` as it is where there is a run."""
        config = self.folder / "experiment.toml"
        config.write_text(tomli_w.dumps({"path": "set by the kit", **SMALL}))
        words = ["--out", str(out), "--host", self.address]
        if not (out / "experiment.toml").exists():
            words += ["--config", str(config)]
        return self.start("coordinator", "coordinator", str(self.kits / "coordinator"), *words, *options)

    def conduct(self, out: Path, *options: str, seconds: float = PATIENCE) -> None:
        """Run a coordinator to its end, which must be a good one."""
        assert self.ended("coordinator", self.coordinator(out, *options), seconds) == 0, self.said("coordinator")

    def ended(self, name: str, process: subprocess.Popen[bytes], seconds: float) -> int:
        """Return a process's exit code; nothing that it started may be left."""
        code = process.wait(seconds)
        until(lambda: not self.running(name), 60.0, f"all that {name} started has ended: {self.running(name)}")
        return code

    def said(self, name: str) -> str:
        """Return what a process printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def running(self, name: str = "") -> dict[int, str]:
        """Return command lines by process: all that carry the mark of ``name``, or of any of ours."""
        found = {}
        wanted = f"{MARK}={self.mark}.{name}".encode() + (b"\0" if name else b"")
        for entry in Path("/proc").glob("[0-9]*"):
            # It may end while we look, or be another user's.
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if wanted in (entry / "environ").read_bytes() + b"\0":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def kill(self, name: str, having: str = "") -> list[int]:
        """SIGKILL every process of ``name`` whose command line holds ``having``, at once; return which."""
        victims = [process for process, line in self.running(name).items() if having in line]
        for process in victims:
            os.kill(process, signal.SIGKILL)
        if not having and name in self.processes:
            self.processes.pop(name).wait(60.0)
        return victims

    def close(self) -> None:
        """Kill all that is left."""
        until(self._killed, 60.0, "everything is dead")
        for process in self.processes.values():
            process.wait(60.0)

    def _killed(self) -> bool:
        left = self.running()
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not left

    def bytes_of(self, out: Path) -> dict[str, str]:
        """Return SHA-256 of every tensor file of a run across hospitals, wherever it lies, by its place in a run."""
        job = json.loads((out / "job.json").read_text())["job"]
        found = tensors(out)
        for site in SITES:
            found |= tensors(self.state / site / job)
        return found

    def compare(self, out: Path, *overrides: str) -> int:
        """Compare a run across hospitals with the same one in one process; return how many tensor files that has."""
        found, one = self.bytes_of(out), self.bytes_in_one_process(*overrides)
        extra = {file for file in found if "adapters/general/" in file}  # only the coordinator has one for everybody
        assert {file: found[file] for file in found.keys() - extra} == one
        assert all(any(f"sites/{site}/" in file for file in one) for site in SITES)
        return len(one)

    def bytes_in_one_process(self, *overrides: str) -> dict[str, str]:
        """Return the same of ``confrere run`` on the data of all three."""
        one = self.folder / "-".join(["one", *(hashlib.sha256(o.encode()).hexdigest()[:8] for o in overrides)])
        if not one.exists():
            values = {**SMALL, "path": str(self.images / "all"), "data": {"classes": CLASSES}}
            run_experiment(validate(override(values, overrides)), one)
        return tensors(one)


def tensors(run: Path) -> dict[str, str]:
    """Return SHA-256 of every tensor file of a folder by its place there.

    Predictions on test images name patients by number, and numbers are each hospital's own: these are left out.
    """
    found = {}
    for file in run.rglob("*.safetensors"):
        content = file.read_bytes()
        if file.name.startswith("test-"):
            content = save({name: value for name, value in load(content).items() if name != "test/groups"})
        found[str(file.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


def in_the_middle(place: Hospitals, out: Path, site: str, number: int) -> None:
    """Wait until ``site`` has been handed its training of a round, and something there works at it."""

    def working() -> bool:
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if line.endswith("}")]
        begun = [event["round"] for event in events if event["event"] == "begin"]
        return begun[-1:] == [number] and any("flwr-clientapp" in line for line in place.running(site).values())

    until(lambda: (out / "events.jsonl").exists() and working(), PATIENCE, f"round {number} at {site}")


@contextmanager
def hospitals(folder: Path, *arguments: Any) -> Iterator[Hospitals]:
    """Hospitals of which nothing is left running afterwards."""
    place = Hospitals(folder, *arguments)
    try:
        yield place
    finally:
        place.close()
