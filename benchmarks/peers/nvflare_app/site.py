"""One site in NVFlare's simulator, by its Client API: one process a site, the model built once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nvflare.client as flare
import torch

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))  # where client.py is
from client import Client, Model, open_job


def main() -> None:
    folder, out = Path(sys.argv[2]), Path(sys.argv[3])
    job = open_job(folder)
    torch.set_num_threads(1)  # a process a site: more would stand in each other's way
    flare.init()
    name = sorted(job["sites"])[int(flare.get_site_name().rpartition("-")[2]) - 1]
    client = Client(folder, name, Model(job, folder), job)
    ends = [time.perf_counter()]
    while flare.is_running():
        received = flare.receive()
        round_ = int(received.current_round) + 1
        state = {key: torch.as_tensor(value) for key, value in received.params.items()}
        if round_ <= job["rounds"]:
            state = client.fit(state, round_)
            ends.append(time.perf_counter())
        else:  # one more round carries the last average to the sites, which score it
            found = {"site": name, "val": client.score(state, 1), "test": client.score(state, 2), "ends": ends}
            (out / f"{name}.json").write_text(json.dumps(found))
        flare.send(flare.FLModel(params=state, meta={"NUM_STEPS_CURRENT_ROUND": client.weight}))


if __name__ == "__main__":
    main()
