"""How deep should the backbone be? Linear probes after every block, trained on train, judged on validation.

    python benchmarks/depth_probe.py DATA --backbone dinov2-small-imgfocus --image-size 98 --per-site 150

Test images are never touched. Features are the class token beside the mean patch after the final norm; the probe
is multinomial logistic regression with balanced class weights. Prints balanced accuracy on the validation split,
mean over sites, with pooled training. One line per depth, three subsamples (seeds) each: mean and 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from confrere.adapters.lora import LoraSpec
from confrere.backbones import load
from confrere.data.federation import SiteImages, load_federation
from confrere.data.options import DataOptions
from confrere.metrics.classification import score
from confrere.prefix import cache_dir
from confrere.seeds import numpy_generator

SEEDS = (0, 1, 2)


def features_by_depth(name: str, side: int, images: np.ndarray) -> list[np.ndarray]:
    """Return (N, F) features after each block, normed as the model's last layer is."""
    backbone = load(name, lora=LoraSpec(slots=("general",), blocks=1, dropout=0.0), image_size=side)
    anatomy, found = backbone.anatomy, [[] for _ in range(backbone.depth)]
    with torch.no_grad():
        for start in range(0, len(images), 64):
            tokens = anatomy.embed(backbone.normalise(images[start : start + 64]))
            for depth, block in enumerate(anatomy.blocks):
                tokens = block(tokens, **anatomy.block_kwargs)
                normed = anatomy.norm(tokens)
                found[depth].append(torch.cat([normed[:, 0], normed[:, anatomy.prefix_tokens :].mean(1)], 1))
    return [torch.cat(parts).numpy() for parts in found]


def pick(site: SiteImages, split: str, limit: int, seed: int) -> np.ndarray:
    """Return at most ``limit`` rows of a split, by seed."""
    rows = site.indices(split)
    return np.sort(numpy_generator(seed, "probe", split, site.name).permutation(rows)[:limit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="dinov2-small-imgfocus")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--per-site", type=int, default=150)
    args = parser.parse_args()
    federation = load_federation(
        args.data, options=DataOptions(), image_size=(args.image_size,) * 2, seed=0, cache=cache_dir()
    )
    scores: dict[int, list[float]] = {}
    for seed in SEEDS:
        chosen = [
            (s, split, pick(s, split, args.per_site, seed)) for s in federation.sites for split in ("train", "val")
        ]
        images = np.concatenate([np.array(s.images[rows]) for s, _, rows in chosen])
        labels = np.concatenate([s.labels[rows] for s, _, rows in chosen])
        owner = np.concatenate([[f"{s.name}/{split}"] * len(rows) for s, split, rows in chosen])
        train = np.char.endswith(owner, "/train")
        for depth, x in enumerate(features_by_depth(args.backbone, args.image_size, images), 1):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced"))
            probe.fit(x[train], labels[train])
            found = []
            for name in sorted(set(owner[~train])):
                here = owner == name
                chances = np.zeros((here.sum(), len(federation.classes)))
                chances[:, probe.classes_] = probe.predict_proba(x[here])
                found.append(score(chances, labels[here]))
            scores.setdefault(depth, []).append(float(np.mean(found)))
        print(f"seed {seed} done", flush=True)
    for depth, values in scores.items():
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        print(f"first {depth:>2} blocks  {np.mean(values):.3f} +- {half:.3f}")


if __name__ == "__main__":
    main()
