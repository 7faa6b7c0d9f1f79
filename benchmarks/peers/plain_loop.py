"""The whole job by hand: no framework, one process, PyTorch, transformers and PEFT.

python plain_loop.py JOB OUT.json [bf16] [decoded]

bf16: forward passes under torch.autocast. decoded: every image is decoded once and kept in memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from client import Client, Model, average, first_state, open_job


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    autocast = "bf16" in sys.argv[3:]
    job = open_job(folder)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    model = Model(job, folder)
    clients = [Client(folder, site, model, job, autocast=autocast) for site in sorted(job["sites"])]
    if "decoded" in sys.argv[3:]:
        for client in clients:
            client.data = [client.data[row] for row in range(len(client.data))]
    state, seconds = first_state(folder), []
    for round_ in range(1, job["rounds"] + 1):
        begun = time.perf_counter()
        state = average([(client.weight, client.fit(state, round_)) for client in clients])
        seconds.append(time.perf_counter() - begun)
    val = [client.score(state, 1) for client in clients]
    test = [client.score(state, 2) for client in clients]
    found = {"rounds": seconds, "val": val, "test": test, "torch": torch.__version__}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
