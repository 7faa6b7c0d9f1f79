"""Inversion of updates: with the frozen model that was agreed, and with one that a server made to see more.

    python recipes/inversion.py --out results/inversion

Synthetic microscopy, three seeds, the tiny test transformer (its features mean nothing, but gradients are gradients).
The first two lines train a site for one round of 12 steps on 12 images, of which one is the only one of its class,
over planted weights (skills cut at -1) and over honest ones. The others are ``confrere audit --only inversion`` on a
finished run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from property_digits import interval
from safetensors.torch import save_file

from confrere.adapters import head, lora
from confrere.audits import inversion
from confrere.audits.audit import Choice
from confrere.audits.inversion_planted import feature_of_class, patch_of, planted, waves
from confrere.audits.tapped import open_run
from confrere.backbones import load
from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.job import run_experiment
from confrere.learner import Learner, TrainSettings
from confrere.seeds import numpy_generator
from confrere.tensors import sub
from confrere.tokenset import TokenSet

SIDE, GRID = 8, 4
SETTINGS: dict[str, Any] = {
    "method": "fedit",
    "controls": [],
    "rounds": 4,
    "threads": 1,
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2, "rank": 4},
    "train": {"steps": 10, "batch_size": 16, "lr": 5e-3},
}


def audited(out: Path, seed: int) -> dict[str, tuple[float, float]]:
    """Return strength and control of every row of the audit on one run."""
    if not (out / f"run-{seed}" / "results.json").exists():
        data = make_microscopy(out / f"data-{seed}", seed=seed, sites=4, images=(60, 60), size=32)
        run_experiment(validate({**SETTINGS, "path": str(data), "seed": seed}), out / f"run-{seed}")
    found = inversion.inversion(open_run(out / f"run-{seed}"), Choice(seed=seed, notify=print))
    scores = {f"{r.model}, {r.measure}": (r.strength.value, r.control.value) for r in found.rows}
    return {key: (ours, control) for key, (ours, control) in scores.items() if ours is not None and control is not None}


def model(path: Path, seed: int, patch: int | None) -> Path:
    """Write a folder with a transformer: random, or planted for a patch."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=SIDE
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ViTModel(config, add_pooling_layer=False)
    made.save_pretrained(path)
    if patch is not None:
        save_file(planted(made.state_dict(), patch), path / "model.safetensors", {"format": "pt"})
    return path


def read_back(out: Path, seed: int, patch: int, *, plant: bool) -> float:
    """Return the skill of the patch that the server reads, against the mean patch of the site's images; 1 is exact."""
    path = model(out / f"model-{seed}-{patch}-{plant}", seed, patch if plant else None)
    backbone = load(path, lora=lora.LoraSpec(slots=("general",), blocks=2), image_size=32)
    coarse = numpy_generator(seed, "pictures").integers(0, 256, size=(12, 8, 8, 3))
    images = np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)
    labels = np.array([0] + [1] * 11)
    data = TokenSet(
        tokens=backbone.prefix(images).numpy(), labels=labels, groups=np.arange(12), split=np.zeros(12, dtype=np.int8),
        classes=("rare", "common", "elsewhere"),
    )  # fmt: skip
    settings = TrainSettings(steps=12, batch_size=4, balance="none")
    learner = Learner(backbone=backbone, data=data, settings=settings, seed=seed, site="a", round=1, rounds=1)
    params = {n: torch.zeros(s) for n, s in backbone.adapter_shapes({"general": 4}).items()}
    params = {n: v + 0.1 if ".lora_A." in n else v for n, v in params.items()} | head.init(3, backbone.feature_dim)
    change = sub(learner.fit(params), params)[head.WEIGHT]
    found = patch_of(feature_of_class(change, 0, 2), SIDE)
    row, column = divmod(patch, GRID)
    seen = backbone.normalise(images)[:, :, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
    base = waves(SIDE, 62)  # what a token of 64 channels can hold of the patch's 192 numbers
    held = (seen.flatten(1) @ base.T @ base).view(-1, 3, SIDE, SIDE).numpy()
    return max(-1.0, 1 - float(((found - held[0]) ** 2).sum() / ((held.mean(0) - held[0]) ** 2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/inversion"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, plant in (("planted", True), ("honest", False)):
        skills = [
            float(np.median([read_back(args.out, seed, patch, plant=plant) for patch in (0, 5, 10, 15)]))
            for seed in range(args.seeds)
        ]
        print(f"| {name} weights, a round of 12 steps, median of 4 patches | {interval(skills)} |", flush=True)
    rows = [audited(args.out, seed) for seed in range(args.seeds)]
    for key in rows[0]:
        ours, control = (interval([row[key][i] for row in rows]) for i in (0, 1))
        print(f"| {key} | {ours} | {control} |", flush=True)


if __name__ == "__main__":
    main()
