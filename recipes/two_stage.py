"""Two stages: adapters trained on public data first, then by hospitals together. Handwritten digits, no patients.

    python recipes/two_stage.py --out results/two-stage

Stage 1 trains adapters on the digits 0 to 4, which count as public. Stage 2 tells 5 to 9 apart at eight sites of n
images each, with a new head: from the adapters of stage 1, or from those that every run starts with. A fifth of the
digits 5 to 9, drawn anew by each seed, tests all models. How sites differ is varied too: IID, or classes drawn from a
Dirichlet distribution. Trainings run side by side as in ``private_survival.py``; settings are fixed beforehand, the
last round is kept. Needs scikit-learn, which brings the 1,797 digits of 8 x 8 pixels along.

After Zhang and Li, arXiv 2203.12803 (lung CT, whole networks; no code, and no privacy beyond data that stay). The steps
are our reconstruction: see docs/results/two-stage.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_survival import interval, trained_together

from confrere.config import override, validate
from confrere.errors import MissingExtraError
from confrere.job import Prepared, initial
from confrere.job import prepare as prepare_job
from confrere.method import Reply, make
from confrere.opening import open_data
from confrere.record.files import write_json
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors

SITES, SEEDS, STAGE_1 = 8, (0, 1, 2), 60
PARTITIONS = {"IID": 0.0, "Dirichlet 1": 1.0, "Dirichlet 0.1": 0.1}
IMAGES = (10, 30, 80)
KINDS = ("together", "alone")
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "workers": 1,
    "controls": [],
    "method": {"name": "fedit"},
    "backbone": {"name": "mlp"},
    "adapter": {"rank": 8, "blocks": 2, "dropout": 0.0},
    "train": {"lr": 4e-3, "steps": 5, "balance": "none"},  # full batches
    "federation": {"weights": "equal"},
    "data": {"val": 0.0, "constants": {f"p{i}": [5.0, 6.0] for i in range(64)}},
    "rounds": 15,
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (1797, 64), 0 to 16, and which digit each is."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "dev", needed_for="the digits") from error
    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


def dealt(labels: np.ndarray, images: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Return ``images`` rows of each site, disjoint; classes in shares of Dirichlet(alpha), or evenly where it is 0.

    A class that has run out is replaced by those that are left, in proportion to the same shares.
    """
    left = {label: list(rng.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)}
    found = []
    for _ in range(SITES):
        shares = dict(zip(left, rng.dirichlet([alpha] * len(left)) if alpha else [1.0] * len(left), strict=True))
        rows = []
        for _ in range(images):
            able = [label for label in left if left[label]]
            weight = np.array([shares[label] + 1e-9 for label in able])
            rows.append(left[able[rng.choice(len(able), p=weight / weight.sum())]].pop())
        found.append(np.array(rows))
    return found


def opened(sites: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int, table: Path, more: Sequence[str]) -> Prepared:
    """Return sites of (pixels, labels) ready to train; those of ``test`` are held out."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "split", "label", *(f"p{i}" for i in range(64))])
        for site, (pixels, labels) in sites.items():
            for row, (values, label) in enumerate(zip(pixels, labels, strict=True)):
                split = "test" if site == "test" and row else "train"  # every site needs a training row
                writer.writerow([site, split, f"digit {label}", *values])
    experiment = validate(override({**SETTINGS, "path": str(table.resolve()), "seed": seed, "hold_out": "test"}, more))
    return prepare_job(experiment, open_data(experiment, table.with_suffix("")), lambda event: None)


def stage_1(seed: int, out: Path, more: Sequence[str]) -> Tensors:
    """Return adapters after training on the public digits, and a head as before training, for other classes."""
    pixels, labels = digits()
    public = np.flatnonzero(labels < 5)
    rows = numpy_generator(seed, "two-stage", "public").permutation(public)
    parts = {"public": (pixels[rows[100:]], labels[rows[100:]]), "test": (pixels[rows[:100]], labels[rows[:100]])}
    task = opened(parts, seed, out / f"public-{seed}.csv", [*more, f"train.steps={STAGE_1}"])
    start = initial(task, "")
    trained = trained_together(task, [start], ["public"])[0]
    print(f"seed {seed}: stage 1 tells {score(task, trained):.3f} of public digits apart", flush=True)
    return {name: start[name] if name.startswith("head.") else value for name, value in trained.items()}


@torch.no_grad()
def score(task: Prepared, params: Tensors) -> float:
    """Return balanced accuracy on the images that test."""
    data = task.data["test"]
    rows = data.rows("test")
    right = (task.backbone.logits(params, data.batch(rows).tokens).argmax(1).numpy() == data.labels[rows]).astype(float)
    return float(np.mean([right[data.labels[rows] == label].mean() for label in np.unique(data.labels[rows])]))


def cell(seed: int, images: int, alpha: float, public: Tensors, out: Path, more: Sequence[str]) -> dict[str, float]:
    """Return balanced accuracy by arm; of training alone, the mean over the sites."""
    pixels, labels = digits()
    rng = numpy_generator(seed, "two-stage", images, alpha)
    order = numpy_generator(seed, "two-stage", "test").permutation(np.flatnonzero(labels >= 5))
    test, rest = order[: len(order) // 5], order[len(order) // 5 :]
    parts = {f"s{k}": (pixels[rest[r]], labels[rest[r]]) for k, r in enumerate(dealt(labels[rest], images, alpha, rng))}
    every = tuple(np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    held = (pixels[test], labels[test])
    task = opened({**parts, "test": held}, seed, out / f"{images}-{alpha}-{seed}.csv", more)
    pooled = opened({"all": every, "test": held}, seed, out / f"pooled-{images}-{alpha}-{seed}.csv", more)
    names, method = task.training_sites, task.method
    scratch, found = initial(task, ""), {}
    starts = {"scratch": scratch, "stage 1": public}
    joint = {name: method.init_server(start) for name, start in starts.items()}
    alone = [start for start in starts.values() for _ in names]
    central = list(starts.values())
    for round_ in range(1, task.experiment.rounds + 1):
        asked = [server["shared"] for server in joint.values() for _ in names]
        trained = trained_together(task, [*asked, *alone], names)
        alone = trained[len(asked) :]
        for place, name in enumerate(starts):
            mine = trained[place * len(names) : (place + 1) * len(names)]
            replies = [
                Reply(site=s, run="", round=round_, state={"shared": t}, weight=1.0)
                for s, t in zip(names, mine, strict=True)
            ]
            joint[name] = make("fedit").aggregate(joint[name], replies)
        central = trained_together(pooled, central, ["all"])
    for place, name in enumerate(starts):
        found[f"together, from {name}"] = score(task, joint[name]["shared"])
        mine = alone[place * len(names) : (place + 1) * len(names)]
        found[f"alone, from {name}"] = float(np.mean([score(task, params) for params in mine]))
        found[f"pooled, from {name}"] = score(task, central[place])
    return found


def gains(found: Mapping[tuple[str, int], Sequence[Mapping[str, float]]]) -> str:
    """Return a row for each partition and n, in Markdown: every arm, and what stage 1 adds, in points."""
    arms = list(next(iter(found.values()))[0])
    lines = [
        "| sites | images a site | " + " | ".join(arms) + " | stage 1 adds, together | stage 1 adds, alone |",
        "|---" * (len(arms) + 4) + "|",
    ]
    for (partition, images), seeds in found.items():
        more = [[100 * (one[f"{how}, from stage 1"] - one[f"{how}, from scratch"]) for one in seeds] for how in KINDS]
        cells = [interval([one[arm] for one in seeds]) for arm in arms] + [signed(values) for values in more]
        lines.append(f"| {partition} | {images} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def signed(values: Sequence[float]) -> str:
    """Return mean and interval of differences, with signs: ``+1.2 (-0.3 to +2.7)``."""
    mean, *ends = re.findall(r"-?[0-9.]+", interval(values))
    return f"{float(mean):+.1f}" + (f" ({float(ends[0]):+.1f} to {float(ends[1]):+.1f})" if ends else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/two-stage"))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--images", default=",".join(map(str, IMAGES)), help="n, of each site")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    counts = [int(count) for count in args.images.split(",")]
    found: dict[tuple[str, int], list[dict[str, float]]] = {(p, n): [] for p in PARTITIONS for n in counts}
    for seed in map(int, args.seeds.split(",")):
        public = stage_1(seed, args.out / "tables", args.overrides)
        for partition, images in found:
            kept = args.out / f"{partition.lower().replace(' ', '-')}-{images}-{seed}.json"
            if not kept.exists():
                done = cell(seed, images, PARTITIONS[partition], public, args.out / "tables", args.overrides)
                write_json(kept, done)
            found[partition, images].append(json.loads(kept.read_text()))
            print(seed, partition, images, found[partition, images][-1], flush=True)
    print(gains(found))


if __name__ == "__main__":
    main()
