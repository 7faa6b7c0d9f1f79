"""Kill a run a hundred times; ``confrere resume`` must end in the bytes of a run that nobody disturbed.

    python tests/reliability/kills.py --kills 100 --rounds 50 --out result.json

Three of five kills come at a moment drawn uniformly between the first file of the run and its end, two of five at one
of POINTS in turn (a phase or a call of the operating system, its number drawn uniformly). In a fifth of the cases the
resumed run is killed, too. Compared: SHA-256 of every safetensors file (server, every site, exported adapters), and the
test results. Counted: sites' trainings that were finished before a kill and done again after it. Timed: from the start
of ``confrere resume`` to its first work. A file ``--out`` that exists is continued. ``--fork`` starts forks
of one process that has imported everything: then start times leave the import out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # as a script, it finds only what lies beside it
from injected import Process, make_place, resumable, start, tensors
from nursery import Nursery

from confrere.record.machine import machine
from confrere.record.run import Run
from confrere.seeds import numpy_generator

POINTS = (
    "prefix", "step", "before_upload", "after_upload", "aggregate", "aggregated", "judge", "journal", "committed",
    "examine", "export_file", "report_file", "open", "write", "fsync", "replace",
)  # fmt: skip
WORK = ("task", "judge", "examine", "export", "report")
Log = list[dict[str, Any]]


class Place:
    """Data, the undisturbed run and what it did, in one folder."""

    def __init__(self, folder: Path, rounds: int, seed: int, *, fork: bool = False) -> None:
        self.folder, self.rounds, self.seed = folder, rounds, seed
        self._fork, self._here, self._nurseries = fork, threading.local(), list[Nursery]()
        if not (folder / "hospitals").exists():
            make_place(folder, sites=4, images=(24, 40))
        wholes = [self._whole("whole", "--quiet"), self._whole("whole-reported")]
        if wholes[0][0] != wholes[1][0]:
            raise SystemExit("two undisturbed runs differ: nothing can be compared")
        self.bytes, log, self.seconds = wholes[0]
        self.counts: dict[str, int] = wholes[1][1][-1]["counts"]
        self.trainings = len({(e["site"], e["round"]) for e in log if e["point"] == "trained"})

    def close(self) -> None:
        """End the processes that wait to start others."""
        for nursery in self._nurseries:
            nursery.close()

    def _whole(self, name: str, *options: str) -> tuple[dict[str, str], Log, float]:
        run, points = self.folder / name, self.folder / f"{name}.log"
        for old in (run, points):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        # The report's points are only counted where a fault names them; this one is never reached.
        fault = "none" if options else "kill:report_file:999999"
        process = self.start(run, points, fault, self.folder / "cache", *options)
        began = _appears(run / "machine.json", process)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed:\n{errors.decode()}")
        return fingerprint(run), read_log(points), time.monotonic() - began

    def start(self, run: Path, log: Path, fault: str, cache: Path, *options: str) -> Process:
        """Start ``confrere run`` or ``confrere resume`` under the injector."""
        if self._fork and not hasattr(self._here, "nursery"):  # one a thread
            said = self.folder / f"said-{threading.get_ident()}"
            self._here.nursery = Nursery({**os.environ, "OMP_NUM_THREADS": "1"}, said)
            self._nurseries.append(self._here.nursery)
        nursery, begin = getattr(self._here, "nursery", None), (f"rounds={self.rounds}",)
        return start(self.folder, run, fault, *options, nursery=nursery, begin=begin, log=log, cache=cache)


def read_log(path: Path) -> Log:
    """Return the points a process reached."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fingerprint(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of a run, and of its results without times."""
    results = json.loads((run / "results.json").read_text())
    del results["seconds"]
    return tensors(run) | {"results.json": hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()}


def _appears(file: Path, process: Process) -> float:
    while not file.exists() and process.poll() is None:
        time.sleep(0.002)
    return time.monotonic()


def plan(place: Place, case: int) -> list[dict[str, Any]]:
    """Return the kills of a case, of the run and then of resumes: at a point, or at a share of the time."""
    draw = numpy_generator(place.seed, "kill", case)
    by_time = case % 5 < 3
    others = int(draw.integers(1, 3)) if case % 10 in (2, 4) else 0
    kills = [{"share": float(draw.random())} if by_time else _point(place, POINTS[_turn(case) % len(POINTS)], draw)]
    for _ in range(others):
        again = bool(draw.integers(2))
        point = POINTS[int(draw.integers(len(POINTS)))]
        kills.append({"share": float(draw.random())} if again else _point(place, point, draw, 20))
    return kills


def _turn(case: int) -> int:
    return case // 5 * 2 + case % 5 - 3


def _point(place: Place, point: str, draw: np.random.Generator, at_most: int = 10**9) -> dict[str, Any]:
    after = "-after" if point in ("write", "fsync", "replace") and draw.integers(2) else ""
    k = int(draw.integers(1, max(2, min(place.counts.get(point, 1), at_most) + 1)))
    return {"fault": f"kill{after}:{point}:{k}"}


def carry_out(place: Place, case: int, folder: Path) -> dict[str, Any]:
    """Run, kill, resume (and kill again); return what became of it."""
    run, kills, done = folder / "run", plan(place, case), []
    cold = any("prefix" in kill.get("fault", "") for kill in kills)
    cache = folder / "cache" if cold else place.folder / "cache"
    logs: list[Log] = []
    starts: list[dict[str, float]] = []
    begun = time.monotonic()
    for turn in range(len(kills) + 1):
        kill = kills[turn] if turn < len(kills) else {}
        verb = "resume" if resumable(run) else "run"
        options = [] if "report" in kill.get("fault", "") else ["--quiet"]
        points = folder / f"{turn}.log"
        launched = time.monotonic()
        process = place.start(run, points, kill.get("fault", "none"), cache, *options)
        if "share" in kill:
            _kill_later(place, run, kill["share"], process, verb)
        _, errors = process.communicate()
        logs.append(read_log(points))
        if verb == "resume":
            starts.append(start_of(logs[-1], launched))
        if process.returncode == -signal.SIGKILL:
            done.append({**kill, "during": verb, "round": Run(run).last_round()})
        elif process.returncode:
            return {"case": case, "kills": done, "same": False, "problem": errors.decode()[-600:]}
        elif turn < len(kills):  # it ended before its kill came
            break
    return {"case": case, "kills": done, "seconds": round(time.monotonic() - begun, 1)} | judge(
        place, run, logs, starts
    )


def _kill_later(place: Place, run: Path, share: float, process: Process, verb: str) -> None:
    began = _appears(run / "machine.json", process) if verb == "run" else time.monotonic()
    until = began + share * place.seconds
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.001)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)


def start_of(log: Log, launched: float) -> dict[str, float]:
    """Return seconds from the launch to the first work, and those of them that are not import or model load."""
    at: dict[str, float] = {}
    for entry in log:
        at.setdefault(entry["point"], entry["t"])
    work = min((at[p] for p in WORK if p in at), default=None)
    if work is None or "data" not in at:
        return {}
    load = at.get("loaded", 0.0) - at.get("loading", 0.0) if at.get("loaded", work + 1) <= work else 0.0
    return {"all": round(work - launched, 3), "own": round(work - at["data"] - load, 3)}


def judge(place: Place, run: Path, logs: Sequence[Log], starts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Compare a run that was killed and resumed with the undisturbed one; count what was done twice."""
    now = fingerprint(run)
    differs = sorted(k for k in now.keys() | place.bytes.keys() if now.get(k) != place.bytes.get(k))
    redone, ever = 0, set()
    for log in logs:
        trained = {(e["site"], e["round"]) for e in log if e["point"] == "trained"}
        redone = max(redone, len(trained & ever))
        ever |= trained
    return {
        "same": not differs,
        "differs": differs[:6],
        "files": len(now),
        "redone": redone,
        "trainings": len(ever),
        "left_over": [f.name for f in run.rglob("*") if f.name.startswith(".tmp-")],
        "starts": [s for s in starts if s],
    }


def summary(place: Place, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of all cases."""
    starts = [s for c in cases for s in c.get("starts", [])]
    killed = [c for c in cases if c["kills"]]
    by_time = sum("share" in c["kills"][0] for c in killed)
    phases = {k["fault"].split(":")[1] for c in killed for k in c["kills"] if "fault" in k}
    own, whole = ([s[k] for s in starts] or [0.0] for k in ("own", "all"))
    return {
        "killed": len(killed),
        "same": sum(bool(c["same"]) for c in killed),
        "kills": sum(len(c["kills"]) for c in cases),
        "killed_more_than_once": sum(len(c["kills"]) > 1 for c in cases),
        "at_a_moment": by_time,
        "at_a_point": len(killed) - by_time,
        "points": sorted(phases),
        "rounds": place.rounds,
        "trainings": place.trainings,
        "files_compared": len(place.bytes),
        "most_trainings_redone": max((c.get("redone", 0) for c in killed), default=0),
        "left_over": sum(len(c.get("left_over", [])) for c in cases),
        "resume_start_s": {"median": statistics.median(whole), "max": max(whole)},
        "resume_start_without_import_and_model_s": {"median": statistics.median(own), "max": max(own)},
    }


def measure(
    out: Path, folder: Path, *, kills: int, rounds: int, seed: int, jobs: int, fork: bool = False
) -> dict[str, Any]:
    """Carry out all cases that ``out`` does not hold yet; write it after each; return what it holds."""
    settings = {"rounds": rounds, "seed": seed, "fork": fork}
    old = json.loads(out.read_text()) if out.exists() else {}
    cases = {c["case"]: c for c in old.get("cases", [])} if old.get("settings") == settings else {}
    lock, found = threading.Lock(), dict(old)

    def one(case: int) -> None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"case-{case}-") as name:
            result = carry_out(place, case, Path(name).resolve())
        with lock:
            cases[case] = result
            found.update(collected(place, settings, [cases[c] for c in sorted(cases)]))
            out.with_suffix(".tmp").write_text(json.dumps(found, indent=1) + "\n")
            out.with_suffix(".tmp").replace(out)
            print(f"{case}: {json.dumps(result)[:200]}", flush=True)

    with closing(Place(folder, rounds, seed, fork=fork)) as place:
        # A run may end before the moment of its kill: then further cases make up for it.
        while todo := [c for c in range(2 * kills) if c not in cases][: kills - _killed(cases.values())]:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(one, todo))
    return found


def _killed(cases: Iterable[dict[str, Any]]) -> int:
    return sum(bool(case["kills"]) for case in cases)


def collected(place: Place, settings: dict[str, Any], cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is written: numbers, every case, and on what machine they were found."""
    numbers = summary(place, cases)
    figures = {"runs killed and resumed to the same bytes, share": numbers["same"] / max(1, numbers["killed"])}
    about = {"date": str(date.today()), "machine": machine(), "load": os.getloadavg()[1], "settings": settings}
    return {**about, "figures": figures, "summary": numbers, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--fork", action="store_true", help="start processes with everything imported")
    parser.add_argument("--place", type=Path, help="folder for data and runs; default: a temporary one")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = args.place or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"kills": args.kills, "rounds": args.rounds, "seed": args.seed, "jobs": args.jobs, "fork": args.fork}
        found = measure(args.out, folder.resolve(), **options)
    print(f"G1: {found['summary']['same']} of {found['summary']['killed']}")
    print(json.dumps(found["summary"], indent=1))
    raise SystemExit(found["summary"]["same"] != found["summary"]["killed"])


if __name__ == "__main__":
    main()
