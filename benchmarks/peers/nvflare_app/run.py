"""The job in NVFlare's simulator: FedAvgRecipe, a script a site, all sites at once, full parameters as tensors.

python run.py JOB OUT.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
from client import open_job  # noqa: E402  beside this folder
from shared_state import Adapters  # noqa: E402


def main() -> None:
    folder, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    job = open_job(folder)
    with tempfile.TemporaryDirectory() as work:
        recipe = FedAvgRecipe(
            name="peer",
            model=Adapters(str(folder)),
            min_clients=len(job["sites"]),
            num_rounds=job["rounds"] + 1,
            train_script=str(HERE / "site.py"),
            train_args=f"{HERE.parent} {folder} {work}",
            server_expected_format=ExchangeFormat.PYTORCH,
        )
        recipe.execute(SimEnv(num_clients=len(job["sites"]), workspace_root=f"{work}/simulation"))
        scores = [json.loads(path.read_text()) for path in sorted(Path(work).glob("*.json"))]
    ends = [max(each) for each in zip(*(score["ends"] for score in scores), strict=True)]
    found = {
        "rounds": [after - before for before, after in pairwise(ends)],
        "val": [score["val"] for score in scores],
        "test": [score["test"] for score in scores],
        "torch": torch.__version__,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
