"""How near the machine's limit is a training step? Counted operations over the measured matrix-product peak.

    python benchmarks/roofline.py --blocks 4 --precision fp32 --out roofline.json --picture profile.svg

Prints GFLOP/s of one large matrix product, of a training step (forward and backward pass, clipping, AdamW) on cached
tokens, and of the frozen prefix; and what the step's time goes into. Random images: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from confrere.adapters import head, lora
from confrere.backbones import load
from confrere.tensors import Tensors

KINDS = {
    "matrix products": ("::addmm", "::mm", "::linear"),
    "attention": ("bmm", "attention", "softmax"),
    "optimiser and clipping": ("foreach", "linalg_vector_norm", "lerp", "addcdiv", "Optimizer"),
    "norms and activations": ("layer_norm", "gelu"),
    "residuals and sums": ("::add", "::mul", "::sum"),
    "copies and type changes": ("copy", "contiguous", "clone", "_to_copy"),
}


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# The counter knows these kernels for GPUs only.
COUNTED = {
    FUSED: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    FUSED_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of one call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def peak(dtype: torch.dtype, side: int = 2048) -> float:
    """Return the best rate of a square matrix product, in FLOP/s."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: left @ right, 1) for _ in range(10))


def kind(name: str) -> str:
    """Return what an operator counts as."""
    return next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Return the share of time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            work()
    total: dict[str, float] = {}
    for event in found.key_averages():
        total[kind(event.key)] = total.get(kind(event.key), 0.0) + event.self_cpu_time_total
    whole = sum(total.values())
    return {name: value / whole for name, value in sorted(total.items(), key=lambda item: -item[1])}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return rates and shares."""
    spec = lora.LoraSpec(slots=("general",), blocks=args.blocks, dropout=0.0)
    size = (args.image_size, args.image_size)
    backbone = load(args.backbone, lora=spec, depth=args.depth, image_size=size, precision=args.precision)
    generator = torch.Generator().manual_seed(0)
    params: Tensors = lora.init(backbone.adapter_shapes({"general": 16}), generator) | head.init(
        7, backbone.feature_dim
    )
    images = torch.randint(0, 256, (args.batch_size, *size, 3), dtype=torch.uint8, generator=generator)
    tokens = backbone.prefix(images)
    labels = torch.arange(args.batch_size) % 7
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimiser = torch.optim.AdamW(leaves.values(), lr=1e-3)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(backbone.logits(leaves, tokens), labels)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimiser.step()

    def prefix() -> None:
        backbone.prefix(images)

    best = peak(backbone.dtype)
    found: dict[str, Any] = {"peak_gflops": best / 1e9}
    for name, work in (("step", step), ("prefix", prefix)):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            work()
        took = seconds(work, args.repeats)
        rate = counter.get_total_flops() / took
        found[name] = {
            "gflop": counter.get_total_flops() / 1e9,
            "seconds": took,
            "gflops": rate / 1e9,
            "of_peak": rate / best,
            "shares": shares(work),
        }
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the shares of the step's and the prefix's time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    colours = ["#31688e", "#35b779", "#fde725", "#90d743", "#f0f0a0", "#443983", "#bbbbbb"]
    figure, axes = pyplot.subplots(figsize=(8, 2.2))
    named = {name: colours[i] for i, name in enumerate([*KINDS, "the rest"])}
    for row, part in enumerate(("prefix", "step")):
        left = 0.0
        for name, share in found[part]["shares"].items():
            axes.barh(row, share, left=left, color=named[name], edgecolor="white")
            if share > 0.04:
                dark = name in ("matrix products", "copies and type changes")
                text = f"{share:.0%}"
                axes.text(left + share / 2, row, text, ha="center", va="center", color="white" if dark else "black")
            left += share
    axes.set_yticks([0, 1], ["frozen prefix", "training step"])
    axes.set_xticks([])
    axes.set_frame_on(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    axes.legend(handles, named, ncols=3, loc="lower center", bbox_to_anchor=(0.45, -0.5), frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2-small-imgfocus")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--picture", type=Path, help="SVG to write")
    args = parser.parse_args()
    found = measure(args)
    for part in ("step", "prefix"):
        row = found[part]
        print(f"{part}: {row['gflop']:.1f} GFLOP in {row['seconds']:.3f} s = {row['gflops']:.0f} GFLOP/s, ", end="")
        print(f"{row['of_peak']:.0%} of {found['peak_gflops']:.0f}; ", end="")
        print(", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items()))
    if args.picture:
        draw(found, args.picture)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "picture")}
        found["figures"] = {f"{part}, share of the peak": found[part]["of_peak"] for part in ("step", "prefix")}
        what = {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": platform.python_version()}
        args.out.write_text(json.dumps({"date": str(date.today()), **what, **settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
