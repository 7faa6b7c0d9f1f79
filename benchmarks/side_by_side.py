"""Run one job by Confrere and by other programs, in turns, and print ratios with their spread.

    python benchmarks/side_by_side.py job --envs peers --programs confrere,plain,flower --pairs 3 --out result.json

``job`` is made by ``shared_job.py``; ``--envs`` holds a virtual environment a peer (``flower``, ``nvflare``, ``pfl``;
see README.md here). Every program reads the same files, takes the same batches and starts from the same adapters.
Turns go A B C A B C; a turn that is in ``--out`` already is not run again, so a stopped benchmark continues.

Programs: ``confrere`` (cold: empty cache), ``confrere-warm`` (cache of an earlier run), each also with ``-bf16``;
``plain``, ``plain-bf16`` (autocast), ``plain-decoded`` (images kept in memory), ``flower``, ``nvflare``, ``pfl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent / "peers"
MARK = "BENCHMARK_RUN"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes that carry the mark in their environment, daemons included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


class Memory(threading.Thread):
    """Notes the largest sum of the program's memory, shared pages counted once (PSS), twice a second."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.peak, self.done = mark, 0, threading.Event()

    def run(self) -> None:
        """Look until told that the program is done."""
        while not self.done.wait(0.5):
            total = 0
            for process in marked(self.mark):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
            self.peak = max(self.peak, total)


def command(program: str, job: Path, envs: Path, out: Path, work: Path) -> tuple[list[str], Path]:
    """Return how to run a program, and in which directory."""
    if program.startswith("confrere"):
        extra = ["engine.precision=bf16"] if "bf16" in program else []
        toml = str(job / "experiment.toml")
        return [sys.executable, "-m", "confrere", "run", toml, *extra, "--out", str(work / "run")], work
    if program.startswith("plain"):
        python = envs / "flower" / "bin" / "python"  # any environment with PyTorch, transformers and PEFT
        extra = [word for word in ("bf16", "decoded") if word in program]
        return [str(python), str(HERE / "plain_loop.py"), str(job), str(out), *extra], work
    if program == "pfl":
        return [str(envs / "pfl/bin/python"), str(HERE / "pfl_loop.py"), str(job), str(out)], work
    if program == "nvflare":
        return [str(envs / "nvflare/bin/python"), str(HERE / "nvflare_app/run.py"), str(job), str(out)], work
    app = work / "app"
    shutil.copytree(HERE / "flower_app", app)
    shutil.copy(HERE / "client.py", app)
    settings = json.loads((job / "job.json").read_text())
    sites = len(settings["sites"])
    run = f'job="{job}" out="{out}" rounds={settings["rounds"]} sites={sites}'
    cpus = "client-resources-num-cpus=1"
    flwr = str(envs / "flower/bin/flwr")
    return [
        flwr,
        "run",
        ".",
        "--stream",
        "--run-config",
        run,
        "--federation-config",
        f"num-supernodes={sites} {cpus}",
    ], app


def turn(program: str, job: Path, envs: Path, cache: Path) -> dict[str, Any]:
    """Run a program once; return its whole time, its rounds, its scores and its largest memory."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        out = work / "found.json"
        line, where = command(program, job, envs, out, work)
        own = cache if "warm" in program else work / "cache"
        environment = {
            **os.environ,
            **QUIET,
            MARK: mark,
            "CONFRERE_CACHE": str(own),
            "FLWR_HOME": str(work / "flwr"),
            "PATH": f"{Path(line[0]).parent}:{os.environ['PATH']}",
        }
        memory = Memory(mark)
        memory.start()
        began = time.perf_counter()
        with (work / "log").open("w") as log:
            code = subprocess.run(line, cwd=where, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - began
        memory.done.set()
        memory.join()
        _end(mark)
        if code or not (out.exists() or (work / "run").exists()):
            raise SystemExit(f"{program} failed ({code}):\n{(work / 'log').read_text()[-4000:]}")
        found = own_results(work / "run") if program.startswith("confrere") else json.loads(out.read_text())
    return {**found, "program": program, "seconds": seconds, "peak_mb": memory.peak / 1e6}


def _end(mark: str) -> None:
    """End what a program left running: Flower's SuperLink and Ray stay."""
    left = marked(mark)
    for process in left:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=10)


def own_results(run: Path) -> dict[str, Any]:
    """Return rounds and scores of a run of Confrere, by the other programs' keys."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    ends = [path.stat().st_mtime for path in sorted((run / "server").glob("*.safetensors"))]
    results = json.loads((run / "results.json").read_text())
    sites = sorted(results["sites"])
    val = next(event for event in reversed(events) if event["event"] == "evaluation")["sites"]
    models = [next(iter(results["sites"][site]["models"].values())) for site in sites]
    test = [model["balanced_accuracy"]["value"] for model in models]
    return {
        "rounds": [after - before for before, after in pairwise(ends)],
        "val": [val[site] for site in sites],
        "test": test,
    }


def summary(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, of each program against each of ours: ratios of whole time and of warm rounds, mean and range."""
    by: dict[str, list[dict[str, Any]]] = {}
    for entry in turns:
        by.setdefault(entry["program"], []).append(entry)
    rows = []
    for ours in sorted(p for p in by if p.startswith("confrere")):
        for other in sorted(p for p in by if not p.startswith("confrere")):
            pairs = list(zip(by[ours], by[other], strict=False))
            whole = [b["seconds"] / a["seconds"] for a, b in pairs]
            rounds = [statistics.median(b["rounds"][1:]) / statistics.median(a["rounds"][1:]) for a, b in pairs]
            gap = [statistics.mean(a["test"]) - statistics.mean(b["test"]) for a, b in pairs]
            memory = [b["peak_mb"] / a["peak_mb"] for a, b in pairs]
            rows.append({"ours": ours, "other": other, "pairs": len(pairs)})
            for key, values in (("whole", whole), ("rounds", rounds), ("memory", memory), ("score_gap", gap)):
                rows[-1][key] = [statistics.mean(values), min(values), max(values)]
    return rows


def figures(ratios: list[dict[str, Any]]) -> dict[str, float]:
    """Return what ``regressions.py`` compares."""
    return {f"{row['other']} / {row['ours']}, {key}": row[key][0] for row in ratios for key in ("whole", "rounds")}


def show(found: dict[str, Any]) -> None:
    """Print times and ratios."""
    for program in dict.fromkeys(entry["program"] for entry in found["turns"]):
        of = [entry for entry in found["turns"] if entry["program"] == program]
        whole = " ".join(f"{entry['seconds']:.1f}" for entry in of)
        rounds = " ".join(f"{statistics.median(entry['rounds'][1:]):.2f}" for entry in of)
        score = statistics.mean(statistics.mean(entry["test"]) for entry in of)
        peak = max(entry["peak_mb"] for entry in of)
        print(f"{program:20s} whole {whole} s · a round {rounds} s · {peak:.0f} MB · test {score:.4f}")
    for row in found["ratios"]:
        text = " · ".join(
            f"{key} {row[key][0]:.2f} ({row[key][1]:.2f} to {row[key][2]:.2f})" for key in ("whole", "rounds", "memory")
        )
        print(f"{row['other']} / {row['ours']}: {text} · score gap {row['score_gap'][0]:+.4f} · {row['pairs']} pairs")


def machine(envs: Path | None) -> dict[str, Any]:
    """Return what ran this: processor, cores, versions of every program."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    known = "{x.name for x in m.distributions()}"
    ask = f"import importlib.metadata as m; print({{d: m.version(d) for d in %r if d in {known}}})"
    names = ("torch", "transformers", "peft", "flwr", "ray", "nvflare", "pfl", "confrere", "numpy")
    versions = {}
    pythons = {"confrere": sys.executable} | {
        e.name: str(e / "bin/python") for e in (sorted(envs.iterdir()) if envs else ())
    }
    for name, python in pythons.items():
        if not Path(python).exists():
            continue
        said = subprocess.run([python, "-c", ask % (names,)], capture_output=True, text=True, check=True).stdout
        versions[name] = json.loads(said.replace("'", '"'))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--envs", type=Path, required=True, help="folder of virtual environments, one a peer")
    parser.add_argument("--programs", default="confrere,plain")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    job, envs = args.job.resolve(), args.envs.resolve()
    settings = tomllib.loads((job / "experiment.toml").read_text())
    found: dict[str, Any] = {"date": str(date.today()), "machine": machine(envs), "job": settings, "turns": []}
    found["job"].pop("path")
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[key] != found[key] for key in ("machine", "job")):
            raise SystemExit(f"{args.out} holds turns of another job or machine: choose another --out")
        found["turns"] = before["turns"]
    for number in range(args.pairs):
        for program in args.programs.split(","):
            if sum(entry["program"] == program for entry in found["turns"]) > number:
                continue
            if "warm" in program and not (job / "cache" / program).exists():
                turn(program, job, envs, job / "cache" / program)
            found["turns"].append(turn(program, job, envs, job / "cache" / program))
            print(program, round(found["turns"][-1]["seconds"], 1), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    found["ratios"] = summary(found["turns"])
    found["figures"] = figures(found["ratios"])
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
