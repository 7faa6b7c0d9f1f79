"""Run many rounds of a very small federation in this process; print its memory and its open files round by round."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_sites

from confrere.federation.loop import federate
from confrere.federation.transport import InProcess
from confrere.method import make
from confrere.record.run import Run

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    method, run = make("fedopal"), Run(folder)
    sites = tiny_sites(method, rounds=rounds, stores={name: run.store(name) for name in SITES}, steps=1, batch_size=2)
    found: list[tuple[int, float, int]] = []

    def notify(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            found.append((event["round"], resident(), len(os.listdir("/proc/self/fd"))))

    server = method.init_server(initial_params(backbone_of(method), method, ""))
    federate(method, server, InProcess(sites), tiny_plan(method, rounds=rounds), run, notify)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
