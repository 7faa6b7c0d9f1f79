"""Kill a private run around its debits: what is entered is never less than what was trained (G25).

    python tests/privacy/ledger_kills.py --kills 100 --out result.json

Every case kills one process at a point drawn uniformly (a phase of a round, or a call of the operating system below the
sites' states, where the ledger lies), half of them the one that resumes it once more, and lets ``confrere resume`` end
it. The injector's log tells which site finished the noisy steps of which round, in whichever process; the ledger must
hold a debit for each. Processes are forks of one that has imported everything; a result that exists is continued.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # as a script, it finds only what lies beside it
from injected import finished, make_place, start
from nursery import Nursery

from confrere.privacy.spending import spent
from confrere.record import journal
from confrere.record.machine import machine
from confrere.seeds import numpy_generator

DELTA = 1e-3
PRIVATE = (
    "train.balance=none", "rounds=4", "--method", "fedit", "privacy.unit=record", "privacy.sigma=2.0",
    f"privacy.delta={DELTA}",
)  # fmt: skip
POINTS = (
    "open",
    "write",
    "fsync",
    "replace",
    "task",
    "step",
    "trained",
    "before_upload",
    "kept",
    "after_upload",
    "commit",
)


def counted(logs: list[Path]) -> Counter[tuple[str, int]]:
    """Return how often each site finished the noisy steps of each round, over all processes of a case."""
    lines = [json.loads(line) for log in logs if log.exists() for line in log.read_text().splitlines()]
    return Counter((entry["site"], entry["round"]) for entry in lines if entry["point"] == "trained")


def entered(run: Path) -> tuple[Counter[tuple[str, int]], dict[str, float]]:
    """Return how often each round of each site was debited, and every site's epsilon."""
    debits, epsilon = Counter[tuple[str, int]](), {}
    for file in sorted(run.glob("sites/*/privacy.jsonl")):
        events = journal.read(file)[0]
        debits.update((file.parent.name, event["round"]) for event in events)
        epsilon[file.parent.name] = spent(events, DELTA)
    return debits, epsilon


class Case:
    """One run in a folder of its own."""

    def __init__(self, nursery: Nursery, place: Path, folder: Path) -> None:
        self.nursery, self.place, self.folder = nursery, place, folder
        self.run, self.logs = folder / "run", list[Path]()

    def go(self, fault: str) -> tuple[int | None, str]:
        """Run, or resume, with a fault; return the exit code and what was said."""
        self.logs.append(self.folder / f"{len(self.logs)}.log")
        own = {"nursery": self.nursery, "begin": PRIVATE, "under": self.run / "sites", "log": self.logs[-1]}
        return finished(start(self.place, self.run, fault, "--quiet", **own))

    def judge(self) -> dict[str, Any]:
        """Return what was trained and what was entered, as numbers of rounds of sites."""
        trained, (debits, epsilon) = counted(self.logs), entered(self.run)
        said = json.loads((self.run / "results.json").read_text())["privacy"]["sites"]
        return {
            "trained": sum(trained.values()),
            "debits": sum(debits.values()),
            "too little": sorted(
                f"{site} {round_}" for (site, round_), n in trained.items() if debits[site, round_] < n
            ),
            "said": all(abs(said[site]["epsilon"] - value) < 1e-9 for site, value in epsilon.items()),
        }


def carry_out(case: Case, number: int, seed: int, counts: dict[str, int]) -> dict[str, Any]:
    """Kill, resume (and kill again), and judge."""
    draw, kills = numpy_generator(seed, "ledger-kill", number), list[str]()
    for _ in range(1 + number % 2):
        point = POINTS[int(draw.integers(len(POINTS)))]
        after = "-after" if point in ("write", "fsync", "replace") and draw.integers(2) else ""
        fault = f"kill{after}:{point}:{int(draw.integers(1, counts[point] + 1))}"
        code, said = case.go(fault)
        if code == -signal.SIGKILL:
            kills.append(fault)
        elif code:
            return {"case": number, "kills": kills, "problem": said[-600:]}
    code, said = case.go("none")
    if code:
        return {"case": number, "kills": kills, "problem": said[-600:]}
    return {"case": number, "kills": kills, **case.judge()}


def measure(out: Path, folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Carry out cases until so many were killed, but for those that ``out`` holds; return what it holds."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"seed": seed, "cases": []}
    make_place(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with closing(Nursery(environment, folder / "said")) as nursery:
        (folder / "whole").mkdir()
        whole = Case(nursery, folder, folder / "whole")
        code, said = whole.go("none")
        if code:
            raise SystemExit(f"the undisturbed run failed:\n{said}")
        counts = json.loads(whole.logs[0].read_text().splitlines()[-1])["counts"]
        done = {case["case"] for case in found["cases"]}
        for number in range(4 * kills):
            if sum(bool(case["kills"]) for case in found["cases"]) >= kills:
                break
            if number in done:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as name:
                case = Case(nursery, folder, Path(name).resolve())
                found["cases"].append(carry_out(case, number, seed, counts))
            killed = [case for case in found["cases"] if case["kills"]]
            good = [case for case in killed if "problem" not in case and not case["too little"] and case["said"]]
            found |= {"machine": machine(), "killed": len(killed), "good": len(good)}
            found["redone"] = sum(case.get("debits", 0) - 8 for case in good)  # four rounds of two sites
            out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ledger-kills-") as name:
        found = measure(args.out, Path(name).resolve(), kills=args.kills, seed=args.seed)
    print(f"G25: {found['good']} of {found['killed']}; {found['redone']} rounds entered more than once")
    raise SystemExit(found["good"] != found["killed"])


if __name__ == "__main__":
    main()
