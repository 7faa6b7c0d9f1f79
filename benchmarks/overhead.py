"""What does the framework itself cost? Rounds of sites that send back what they received, with a model of no work.

    python benchmarks/overhead.py --out overhead.json

Everything else happens: broadcast, the site's entry, checks, storing state and reply on disk, averaging, diagnostics,
journal. Prints milliseconds a round for 1 to 256 sites and two sizes of adapter, a least-squares fit
``a round + sites + megabytes moved``, and what a durable write of one small file alone takes here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from confrere.adapters import head, lora
from confrere.backbones import Backbone, load
from confrere.federation.loop import Plan, federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.learner import Learner, TrainSettings
from confrere.method import Method
from confrere.record.files import write_bytes
from confrere.record.run import Run
from confrere.tensors import State, Tensors, n_bytes
from confrere.tokenset import TokenSet, as_numpy


@dataclass(frozen=True, kw_only=True)
class Idle(Method):
    """A site sends back what it received."""

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Return what was received."""
        return self.split(self.personal(received, state))


class NoModel:
    """Stands in for the backbone: every class scores zero."""

    def logits(self, params: Tensors, tokens: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(tokens), 2)


def first(backbone: Backbone, rank: int) -> Tensors:
    """Return adapters and head before training."""
    shapes = backbone.adapter_shapes({"general": rank})
    return lora.init(shapes, torch.Generator().manual_seed(0)) | head.init(2, backbone.feature_dim)


def rounds(backbone: Backbone, data: TokenSet, sites: int, rank: int, count: int) -> tuple[float, float]:
    """Return milliseconds and megabytes moved of a round, the median of ``count``."""
    method = Idle()
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name))
        members = {
            site: Site(
                name=site,
                method=method,
                backbone=NoModel(),  # type: ignore[arg-type]
                data=data,
                initial=partial(first, backbone, rank),
                store=run.store(site),
                settings=TrainSettings(steps=0),
                seed=0,
                rounds=count,
            )
            for site in (f"site_{i:03d}" for i in range(sites))
        }
        server = method.init_server(first(backbone, rank))
        ends = [time.perf_counter()]
        plan = Plan(rounds=count, every=count + 1)
        federate(method, server, InProcess(members), plan, run, lambda event: ends.append(time.perf_counter()))
        # The run's last round is judged whatever the plan says: it is left out, like the first.
        times = [b - a for a, b in pairwise(ends[1:-2])]
        return 1000 * statistics.median(times), 2 * sites * n_bytes(server) / 1e6


def durable_write() -> float:
    """Return milliseconds of one small file written so that a loss of power keeps it, the median of 200."""
    times = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(200):
            begun = time.perf_counter()
            write_bytes(Path(name) / str(number % 4), b"x" * 4096)
            times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backbone = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=2, dropout=0.0))
    images = np.random.default_rng(0).integers(0, 256, (8, *backbone.image_size, 3), dtype=np.uint8)
    data = TokenSet(
        tokens=as_numpy(backbone.prefix(images)),
        labels=np.arange(8) % 2,
        groups=np.arange(8),
        split=np.zeros(8, dtype=np.int8),
        classes=("a", "b"),
    )
    table = []
    for rank in (4, 512):
        for sites in (1, 4, 16, 64, 256):
            took, moved = rounds(backbone, data, sites, rank, args.rounds)
            table.append({"sites": sites, "rank": rank, "ms": took, "mb": moved})
            print(f"{sites:4d} sites, {moved:8.2f} MB moved a round: {took:8.1f} ms")
    design = np.array([[1, row["sites"], row["mb"]] for row in table], dtype=float)
    weight = 1 / np.array([row["ms"] for row in table])  # relative errors count alike
    fit = np.linalg.lstsq(design * weight[:, None], np.ones(len(table)), rcond=None)[0]
    print(f"fit: {fit[0]:.1f} ms a round + {fit[1]:.2f} ms a site + {fit[2]:.2f} ms a megabyte")
    durable = durable_write()
    print(f"one durable write of 4 kB: {durable:.2f} ms")
    if args.out:
        found = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rounds": table,
            "figures": {"idle rounds of 4 sites a second": 1000 / next(r["ms"] for r in table if r["sites"] == 4)},
            "durable_write_ms": durable,
            "fit_ms": dict(zip(("round", "site", "megabyte"), fit.tolist(), strict=True)),
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
