"""What does a round across hospitals cost beside plain Flower? Three sites on this machine, one run of each.

    python benchmarks/flower_overhead.py --rounds 4 --out flower_overhead.json

Ours: ``confrere coordinator`` and three ``confrere site``, each round a training of one step and a validation, through
the front. Plain: FedAvg of Flower with a client that returns the arrays it got, the same arrays in number and size,
and reports a number when it evaluates; the same SuperLink with TLS and registered node keys, reached directly. So the
difference is our front, the frames, the site's process, its step of training, the journal and states on disk. The first
round, in which backbones are loaded, is left out. Seconds are from one new server state to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from side_by_side import machine

from confrere.consortium.kit import load
from confrere.consortium.provision import provision
from confrere.data.painting import CLASSES
from confrere.data.synthetic import make_microscopy
from confrere.flower.coordinator import APP, Coordinator
from confrere.flower.processes import SILENT, flwr, free_port, start, stop

SITES = ("ashford", "brindley", "corvale")
POLICY = "least_examples = 5\n"
SERVER = """
import json
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file

app = ServerApp()


@app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < {sites}:
        time.sleep(0.5)
    times = []

    def evaluated(number, arrays):
        times.append(time.time())
        return MetricRecord({{}})

    arrays = ArrayRecord({{name: Array(value) for name, value in load_file({state!r}).items()}})
    strategy = FedAvg(min_train_nodes={sites}, min_evaluate_nodes={sites}, min_available_nodes={sites})
    strategy.start(grid, arrays, num_rounds={rounds}, evaluate_fn=evaluated)
    Path({part!r}).write_text(json.dumps(times))
    Path({part!r}).rename({report!r})
"""
CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 32, "loss": 0.5})}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 8, "score": 0.5})}), reply_to=message)
"""


def kits_in(folder: Path) -> Path:
    """Provision the three sites; return the folder of the kits."""
    roster = folder / "consortium.toml"
    names = "".join(f'[[sites]]\nname = "{site}"\n' for site in SITES)
    classes = json.dumps(list(CLASSES))
    text = f'name = "overhead"\naddress = "127.0.0.1"\nport = {free_port()}\nclasses = {classes}\n{names}'
    roster.write_text(text)
    provision(roster, folder / "kits")
    for site in SITES:
        (folder / "kits" / "sites" / site / "policy.toml").write_text(POLICY)
    return folder / "kits"


def ours(folder: Path, rounds: int, rank: int) -> list[float]:
    """Return the seconds of every round but the first."""
    kits, run = kits_in(folder), folder / "run"
    make_microscopy(folder / "hospitals", seed=3, sites=3, images=(24, 40), size=32)
    config = folder / "experiment.toml"
    config.write_text('path = "hospitals"\ncontrols = []\nthreads = 1\n[backbone]\nname = "test-vit"\n')
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CONFRERE_CACHE": str(folder / "cache")}
    confrere = [sys.executable, "-m", "confrere"]
    with ExitStack() as ends, (folder / "log").open("wb") as log:
        for site in SITES:
            words = ["site", str(kits / "sites" / site), "--data", str(folder / "hospitals")]
            words += ["--state", str(folder / "state" / site)]
            process = subprocess.Popen([*confrere, *words], env=env, stdout=log, stderr=log, start_new_session=True)
            ends.callback(stop, process)
        words = ["coordinator", str(kits / "coordinator"), "--config", str(config), "--out", str(run)]
        words += ["--host", "127.0.0.1", "method=fedopal", f"rounds={rounds}", "adapter.blocks=2"]
        words += [f"adapter.rank={rank}", "train.steps=1", "train.batch_size=4"]
        if subprocess.run([*confrere, *words], env=env, stdout=log, stderr=log, check=False).returncode:
            raise SystemExit((folder / "log").read_text(errors="replace")[-2000:])
    return _differences([(run / "server" / f"{n:05d}.safetensors").stat().st_mtime for n in range(1, rounds + 1)])


def plain(folder: Path, rounds: int, state: Path) -> list[float]:
    """Return the same of plain Flower, which sends the arrays of ``state``."""
    kits, report = kits_in(folder), folder / "report.json"
    app = folder / "app"
    (app / "bare").mkdir(parents=True)
    (app / "bare" / "__init__.py").touch()
    names = {"rounds": rounds, "sites": len(SITES), "state": str(state), "report": str(report)}
    (app / "bare" / "server.py").write_text(SERVER.format(part=str(folder / "part"), **names))
    (app / "bare" / "client.py").write_text(CLIENT)
    text = APP.format(version="1.0.0").replace("confrere.flower.server", "bare.server")
    (app / "pyproject.toml").write_text(text.replace("confrere.flower.client", "bare.client"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with (
        Coordinator(kit=load(kits / "coordinator", "coordinator"), host="127.0.0.1") as coordinator,
        ExitStack() as ends,
    ):
        here = tomllib.loads((coordinator.home / "flwr" / "config.toml").read_text())["superlink"]["here"]
        for site in SITES:
            words = ["--superlink", here["address"], "--root-certificates", here["root-certificates"]]
            words += ["--auth-supernode-private-key", str(kits / "sites" / site / "node.key")]
            env = {**os.environ, **SILENT, "FLWR_HOME": str(folder / site), "PATH": path}  # Flower's own commands
            process = start("flower-supernode", [*words, "--port", str(free_port())], env, folder / f"{site}.log")
            ends.callback(stop, process)
        flwr(["run", str(app), "here"], coordinator.env)
        _wait(report.exists, coordinator.log)
    return _differences(json.loads(report.read_text())[1:])  # the first is before round 1


def _wait(holds: Callable[[], bool], log: Path, seconds: float = 1800.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise SystemExit(f"not within {seconds:g} s:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        (Path(name) / "ours").mkdir()
        (Path(name) / "plain").mkdir()
        mine = ours(Path(name) / "ours", args.rounds, args.rank)
        state = Path(name) / "ours" / "run" / "server" / "00001.safetensors"
        theirs = plain(Path(name) / "plain", args.rounds, state)
        sent: dict[str, Any] = {"arrays": len(load_file(state)), "bytes": state.stat().st_size}
    a, b = statistics.median(mine), statistics.median(theirs)
    print(f"a round across three sites: {a:.1f} s ({min(mine):.1f} to {max(mine):.1f}); plain Flower {b:.1f} s", end="")
    print(
        f" ({min(theirs):.1f} to {max(theirs):.1f}): {a / b:.2f} times; {sent['arrays']} arrays, {sent['bytes']} bytes"
    )
    if args.out:
        found = {"date": str(date.today()), "machine": machine(None), "sent": sent, "ours": mine, "plain": theirs}
        found["figures"] = {"rounds a second beside plain Flower": b / a}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
