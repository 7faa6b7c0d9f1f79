"""Several sites' adapters over one frozen model at once: in turn, in threads, or batched by torch.func.vmap.

    python benchmarks/batched_sites.py --sites 4 --precision fp32 --out batched.json

Forward and backward pass of one batch a site, on the same cached tokens; gradients are checked equal. Prints
milliseconds a site and the ratio of vmap to threads, which is how runs do it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
from side_by_side import machine
from torch import Tensor

from confrere.adapters import head, lora
from confrere.backbones import load
from confrere.record.machine import cores
from confrere.tensors import Tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    spec = lora.LoraSpec(slots=("general",), blocks=4, dropout=0.0)
    backbone = load("dinov2-small-imgfocus", lora=spec, depth=12, image_size=98, precision=args.precision)
    draw = torch.Generator().manual_seed(0)
    shapes = backbone.adapter_shapes({"general": 16})
    params = [
        {n: torch.randn(t.shape, generator=draw) * 0.05 for n, t in {**lora.init(shapes, draw), **heads}.items()}
        for heads in [head.init(7, backbone.feature_dim)] * args.sites
    ]
    images = torch.randint(0, 256, (args.sites, args.batch_size, 98, 98, 3), dtype=torch.uint8, generator=draw)
    tokens = torch.stack([backbone.prefix(batch) for batch in images])
    labels = torch.arange(args.batch_size) % 7

    def loss(one: Tensors, batch: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(backbone.logits(one, batch), labels)

    def alone(site: int) -> list[Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in params[site].items()}
        return list(torch.autograd.grad(loss(leaves, tokens[site]), list(leaves.values())))

    stacked = {n: torch.stack([one[n] for one in params]) for n in params[0]}
    batched = torch.func.vmap(torch.func.grad(loss))
    pool = ThreadPoolExecutor(cores())
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "one after the other": (cores(), lambda: [alone(site) for site in range(args.sites)]),
        "threads": (1, lambda: list(pool.map(alone, range(args.sites)))),
        "vmap": (cores(), lambda: batched(stacked, tokens)),
    }
    near = 1e-3 if args.precision == "fp32" else 0.1
    for got, want in zip([t[0] for t in batched(stacked, tokens).values()], alone(0), strict=True):
        if (got - want).norm() > near * want.norm() + 1e-6:
            raise SystemExit("gradients differ")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):  # in turns; the first does not count
        for name, (threads, work) in ways.items():
            torch.set_num_threads(threads)
            began = time.perf_counter()
            work()
            times[name].append(1000 * (time.perf_counter() - began) / args.sites)
    middle = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    ratios = [v / t for v, t in zip(times["vmap"][1:], times["threads"][1:], strict=True)]
    print(", ".join(f"{name} {value:.0f} ms a site" for name, value in middle.items()))
    print(f"vmap / threads: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.out:
        kept = {"date": str(date.today()), "machine": machine(None), "sites": args.sites, "precision": args.precision}
        kept |= {
            "ms_a_site": middle,
            "vmap_over_threads": ratios,
            "figures": {},
        }  # a fall would be no regression of ours
        args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
