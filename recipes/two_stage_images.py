"""Two stages with images: a publicly pretrained backbone or a random one, then adapters of four hospitals, with noise.

    python recipes/two_stage_images.py DATA --out results/two-stage-images
    python recipes/two_stage_images.py DATA --out results/two-stage-images --rates

DATA as for ``recipes/ham10000.py``. Stage 1 is what the backbone is: DINOv2-small as it was pretrained on public
images, or a network of its shape with random weights, drawn anew by each seed; both stay frozen. Stage 2 tells
melanocytic lesions from others at the four real sites: adapters trained together (with and without noise on every
image), alone, or on all images in one place. The table is of one lesion in three (by a hash of its name). ``--rates``
looks for learning rates, from the public start, on another third with one seed. What was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ham10000 import RECORD, one_lesion_in, prepare
from private_survival import interval
from two_stage import signed

from confrere.backbones.registry import IMAGENET_MEAN, IMAGENET_STD
from confrere.config import override, validate
from confrere.job import run_experiment
from confrere.record.files import read_json, write_json
from confrere.seeds import numpy_generator

PUBLIC, DEPTH = "dinov2-small-imgfocus", 8
STARTS = ("public", "random")
NOISY = f"fedit:{RECORD}8"
SCORES = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
Scores = dict[str, float]
SEEDS = (0, 1, 2)
RATES = {"fedit": (5e-4, 2e-3, 8e-3), NOISY: (2e-3, 8e-3, 2e-2, 5e-2)}
"""Learning rates that ``--rates`` tries, from the public start."""
ARMS = {
    "fedit": ("fedit", 2e-3),
    "fedit, epsilon 8": (NOISY, 2e-3),
    "local": ("local", 2e-3),
    "pooled": ("pooled", 2e-3),
}
"""Method and learning rate: of ``fedit``, with and without noise, that with the best AUROC on other lesions."""
SETTINGS = ["rounds=6", "train.steps=10", "train.batch_size=48", "train.balance=none", "selection.every=6"]
SETTINGS += ["adapter.rank=4", "adapter.blocks=1", "threads=1", "workers=1", "controls=[]", "engine.precision=fp32"]
MELANOCYTIC = ("mel", "nv")


def kind(label: str) -> str:
    """Return what stage 2 tells apart."""
    return "melanocytic" if label in MELANOCYTIC else "other"


def random_backbone(folder: Path, seed: int) -> str:
    """Write the first eight blocks of DINOv2-small with random weights in transformers' layout; return the folder."""
    if not (folder / "preprocessor_config.json").exists():
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=DEPTH, patch_size=14)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(numpy_generator(seed, "two-stage", "random").integers(2**31)))
            Dinov2Model(config).save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD})
    return str(folder.resolve())


def run(table: Path, start: str, method: str, seed: int, lr: float, out: Path, more: Sequence[str]) -> Scores:
    """Return the scores of one run, each a mean over the sites where it is defined; trained if that is not done yet."""
    folder = out / re.sub(r"[^a-z0-9=.-]+", "-", f"{start}-{method}-{seed}-{lr:g}")
    if not (folder / "results.json").exists():
        name = PUBLIC if start == "public" else random_backbone(out / f"random-{seed}", seed)
        backbone = {"name": name, "depth": DEPTH, "image_size": 56}
        values = {"path": str(table.resolve()), "seed": seed, "backbone": backbone}
        experiment = validate(override(values, [*SETTINGS, f"train.lr={lr}", *more])).for_method(method)
        run_experiment(experiment, folder)
    sites = read_json(folder / "results.json")["sites"].values()
    values = {key: [site["models"]["personalised"][key]["value"] for site in sites] for key in SCORES}
    return {key: float(np.mean([v for v in each if v is not None])) for key, each in values.items()}


def table_of(found: Mapping[tuple[str, str], Sequence[Scores]]) -> str:
    """Return a row an arm, in Markdown: scores from both starts over seeds, and what the public start adds."""
    titles = SCORES.values()
    head = [f"{title}, {start}" for title in titles for start in STARTS]
    head += [f"public adds, points of {title}" for title in titles]
    lines = ["| arm | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for arm in ARMS:
        of = {(key, start): np.array([one[key] for one in found[start, arm]]) for key in SCORES for start in STARTS}
        cells = [interval(values) for values in of.values()]
        cells += [signed(100 * (of[key, "public"] - of[key, "random"])) for key in SCORES]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/two-stage-images"))
    parser.add_argument("--rates", action="store_true", help="look for learning rates on other lesions")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    which = int(args.rates)
    whole, table = prepare(args.data, args.out / "data"), args.out / "data" / f"part-{which}.csv"
    one_lesion_in(3, whole, table, which=which, label=kind)
    out = args.out / f"part-{which}"
    if args.rates:
        for method, lr in ((method, lr) for method, rates in RATES.items() for lr in rates):
            print(method, lr, run(table, "public", method, 0, lr, out, args.overrides), flush=True)
        return
    found: dict[tuple[str, str], list[Scores]] = {}
    for (arm, (method, lr)), seed, start in itertools.product(ARMS.items(), SEEDS, STARTS):
        found.setdefault((start, arm), []).append(run(table, start, method, seed, lr, out, args.overrides))
        print(arm, seed, start, found[start, arm][-1], flush=True)
    print(table_of(found))


if __name__ == "__main__":
    main()
