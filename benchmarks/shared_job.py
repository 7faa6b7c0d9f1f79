"""Write one federated job so that any program can do it: same files, splits, batches, first adapters.

    python benchmarks/shared_job.py ham10000.csv --out job --rounds 10 --steps 10

``job/`` then holds ``job.json`` (settings; per site the image files, labels, split and the rows of every batch),
``first.safetensors`` (adapters and head before training, PEFT's names) and ``backbone/`` (a transformers folder of the
blocks kept). The job is FedIT: one rank-r adapter on query and value of the last blocks and a linear head on the class
token, averaged by training images, AdamW made anew each round, gradients clipped, no dropout. ``--sites`` deals the
images out to so many equal sites; ``--part 4`` takes every fourth lesion.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from confrere.backbones.dinov2 import DinoV2
from confrere.config import Experiment, validate
from confrere.data.federation import Federation
from confrere.data.table import read_table
from confrere.job import initial, open_data, prepare
from confrere.learner import Learner, TrainSettings
from confrere.tokenset import TokenSet

KEPT = "backbone"


def narrowed(table: Path, *, pool: bool, part: int = 1) -> Path:
    """Return a copy beside the table: without its sites if ``pool``, with every ``part``-th lesion."""
    out = table.with_name(f"{table.stem}{'-pooled' * pool}-part-{part}.csv")
    with table.open(newline="") as source:
        reader = csv.DictReader(source)
        names = [name for name in reader.fieldnames or [] if not (pool and name == "site")]
        rows = list(reader)
    kept = set(sorted({row["lesion"] for row in rows})[::part])
    with out.open("w", newline="") as target:
        writer = csv.DictWriter(target, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if row["lesion"] in kept)
    return out


def experiment(data: Path, args: argparse.Namespace) -> Experiment:
    """Return the job as Confrere's own experiment."""
    return validate(
        {
            "path": str(data.resolve()),
            "method": "fedit",
            "controls": (),
            "rounds": args.rounds,
            "threads": args.threads,
            "backbone": {"name": args.backbone, "depth": args.depth, "image_size": args.image_size},
            "adapter": {"rank": 16, "blocks": args.blocks, "dropout": 0.0},
            "train": {"steps": args.steps, "batch_size": args.batch_size, "lr": 1e-3},
            "selection": {"every": args.rounds},
            "data": {"partition": {"by": "quantity", "alpha": 1000.0, "sites": args.sites}} if args.sites else {},
        }
    )


def batches(one: Experiment, federation: Federation, site: str) -> list[list[list[int]]]:
    """Return the rows of every batch: rounds x steps x batch size."""
    images = federation.site(site)
    data = TokenSet(
        tokens=np.arange(len(images.labels), dtype=np.float32)[:, None],
        labels=images.labels,
        groups=images.groups,
        split=images.split,
        classes=federation.classes,
    )
    drawn = []
    for round_ in range(1, one.rounds + 1):
        settings = TrainSettings(**one.train.model_dump())
        learner = Learner(
            backbone=None,  # type: ignore[arg-type]  # only its batches are wanted
            data=data,
            settings=settings,
            seed=one.seed,
            site=site,
            round=round_,
            rounds=one.rounds,
        )
        drawn.append([[int(row) for row in b.tokens[:, 0]] for b in learner.batches(settings.steps, "fit")])
    return drawn


def files_by_digest(data: Path, pooled: bool) -> dict[str, str]:
    """Return the path of every image of a table by its SHA-256."""
    rows = read_table(data, pooled=pooled).rows
    return {hashlib.sha256(row.path.read_bytes()).hexdigest(): str(row.path.resolve()) for row in rows}


def write(one: Experiment, data: Path, out: Path) -> None:
    """Write the job into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    federation = open_data(one, out)
    task = prepare(one, federation, lambda event: None)
    root = task.backbone.anatomy.root
    first = initial(task, "")
    save_file(dict(first), out / "first.safetensors")
    (out / "experiment.toml").write_text(one.toml())
    known = files_by_digest(data, one.data.partition is not None)
    sites = {
        site.name: {
            "files": [known[digest] for digest in site.digests],
            "labels": site.labels.tolist(),
            "split": site.split.tolist(),
            "batches": batches(one, federation, site.name),
        }
        for site in federation.sites
    }
    entry = task.backbone.entry
    settings = {
        "classes": list(federation.classes),
        "image_size": list(federation.image_size),
        "mean": entry.mean,
        "std": entry.std,
        "rank": one.adapter.rank,
        "scale": one.adapter.scale,
        "layers": list(task.backbone.layers),
        "lr": one.train.lr,
        "weight_decay": one.train.weight_decay,
        "clip": one.train.clip,
        "rounds": one.rounds,
        "threads": one.threads,
        "sites": sites,
    }
    (out / "job.json").write_text(json.dumps(settings))
    _save_backbone(root, out / KEPT)


def _save_backbone(root: DinoV2, folder: Path) -> None:
    """Write the frozen module without adapters, as transformers reads it."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=root.width,
        num_hidden_layers=len(root.encoder.layer),
        num_attention_heads=root.heads,
        patch_size=root.patch,
        image_size=37 * root.patch,
    )
    plain = Dinov2Model(config)
    frozen = {n.replace(".base_layer", ""): t for n, t in root.state_dict().items() if ".lora_" not in n}
    left = plain.load_state_dict(frozen, strict=False)
    if left.missing_keys != ["embeddings.mask_token"] or left.unexpected_keys:
        raise SystemExit(f"the backbone is not transformers' DINOv2: {left}")
    plain.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="dinov2-small-imgfocus")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sites", type=int, default=0, help="equal sites instead of the table's own")
    parser.add_argument("--part", type=int, default=1)
    args = parser.parse_args()
    data = args.data
    if args.sites or args.part > 1:
        data = narrowed(data, pool=bool(args.sites), part=args.part)
    write(experiment(data, args), data, args.out)


if __name__ == "__main__":
    main()
