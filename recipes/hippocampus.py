"""Segmentation of the hippocampus from few volumes: a small UNETR with learnt initial weights (LWI) and without.

    python recipes/hippocampus.py DATA --out results/hippocampus --page tables.md

DATA holds ``volumes.zip`` with ``images/NAME.nii.gz`` and ``labels/NAME.nii.gz`` (Medical Segmentation Decathlon, task
4: 0 background, 1 anterior, 2 posterior). Test volumes are the same for all seeds; training volumes, initial weights
and patches are drawn anew by each seed, and are the same for all arms of a seed:

- ``random``: random start, then labels. After S and after S + P steps: the same labels, the same total of steps.
- ``lwi``: P steps of the pretext task on the same training volumes, then S steps with labels.
- ``mask``, ``order``: the same pretext task with one of its two losses left out.

Nothing is chosen by test volumes. An arm and seed that was done is not done again. Settings are set by ``KEY=NUMBER``.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from confrere.backbones.volumetric import build
from confrere.compare.table import interval
from confrere.data.decode import BadImageError
from confrere.data.patches import draw_patches, sliding
from confrere.data.volume import prepared, prepared_labels, read_labels, read_volume
from confrere.errors import ConfigError, DataError
from confrere.pretext.lwi import Lwi, OrderHeads, order_heads, swap_output
from confrere.pretext.lwi import loss as pretext_loss
from confrere.record.files import read_json, write_json
from confrere.seeds import numpy_generator, torch_generator

ARMS = ("random", "lwi", "mask", "order")
CLASSES = ("background", "anterior", "posterior")
SPACING, WHOLE, PATCH = (1.0, 1.0, 1.0), (48, 64, 48), (32, 32, 32)
SETTINGS: dict[str, float] = {
    "train": 12,  # volumes
    "test": 12,
    "batch": 2,
    "pretext": 60,  # P
    "few": 20,  # S, the smaller one
    "more": 60,  # S, the larger one
    "lr": 3e-3,
}
# The long axis of the hippocampus, along which its two classes lie, is Y. Each volume has a permutation of its own.
TASKS = {
    "lwi": Lwi(axis=1, per_sample=True),
    "mask": Lwi(axis=1, per_sample=True, order=0.0),
    "order": Lwi(axis=1, per_sample=True, reconstruction=0.0),
}
Settings = dict[str, float]
Data = tuple[Tensor, Tensor]  # volumes (n, 1, *WHOLE) float32, labels (n, *WHOLE) int64


def unpack(data: Path, out: Path) -> list[str]:
    """Unpack the volumes once; return their names, sorted."""
    archive = data / "volumes.zip"
    if not archive.exists():
        raise DataError("volumes.zip is missing", where=str(data), fix="give the folder of the hippocampus volumes")
    with zipfile.ZipFile(archive) as source:
        members = [name for name in source.namelist() if name.endswith(".nii.gz")]
        for member in members:
            target = out / Path(member).parent.name / Path(member).name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                draft = target.with_suffix(".tmp")
                draft.write_bytes(source.read(member))
                draft.replace(target)
    return sorted(Path(member).name for member in members if Path(member).parent.name == "images")


def split(names: Sequence[str], seed: int, settings: Settings) -> tuple[list[str], list[str]]:
    """Return the names of a seed's training volumes, and those of the test volumes of all seeds."""
    test, train = int(settings["test"]), int(settings["train"])
    if len(names) < test + train:
        raise DataError(f"{len(names)} volumes are too few", fix=f"{test} are to test, {train} are to train")
    shuffled = [names[k] for k in numpy_generator(0, "hippocampus", "test").permutation(len(names))]
    rest = shuffled[test:]
    order = numpy_generator(seed, "hippocampus", "train").permutation(len(rest))
    return [rest[k] for k in order[:train]], shuffled[:test]


def read(folder: Path, names: Sequence[str]) -> Data:
    """Return volumes and labels on the grid that the network sees; a volume that cannot be read stops the recipe."""
    pictures, masks = [], []
    for name in names:
        try:
            volume = read_volume(folder / "images" / name)
            labels = read_labels(folder / "labels" / name, len(CLASSES), volume)
            pictures.append(prepared(volume, SPACING, WHOLE))
            masks.append(prepared_labels(labels, volume.spacing, SPACING, WHOLE))
        except BadImageError as error:
            raise DataError(f"a volume was refused: {error}", where=name) from error
    return torch.from_numpy(np.stack(pictures))[:, None], torch.from_numpy(np.stack(masks)).long()


def loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return soft Dice loss, a mean over patches and foreground classes, plus cross-entropy over voxels.

    As ``confrere.tasks.segmentation`` has it for images, with one voxel added to both sides; (B, K, X, Y, Z) and
    (B, X, Y, Z).
    """
    truth = nn.functional.one_hot(labels, scores.shape[1]).movedim(-1, 1)[:, 1:].to(scores.dtype)
    found = scores.softmax(1)[:, 1:]
    both, total = (found * truth).sum((2, 3, 4)), (found + truth).sum((2, 3, 4))
    return (1 - (2 * both + 1) / (total + 1)).mean() + nn.functional.cross_entropy(scores, labels)


def draw(data: Data, settings: Settings, generator: torch.Generator, foreground: float) -> Data:
    """Return a patch of each of ``batch`` volumes."""
    rows = torch.randperm(len(data[0]), generator=generator)[: int(settings["batch"])]
    return draw_patches(data[0][rows], data[1][rows], PATCH, generator, foreground)


def descend(optimiser: torch.optim.Optimizer, value: Tensor) -> None:
    optimiser.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def pretrain(net: nn.Module, data: Data, task: Lwi, seed: int, settings: Settings) -> OrderHeads:
    """Do P steps of the pretext task, which sees no label; return the order heads."""
    heads = order_heads(net, torch.zeros(1, 1, *PATCH), task, torch_generator(seed, "heads"))
    optimiser = torch.optim.AdamW([*net.parameters(), *heads.parameters()], settings["lr"], weight_decay=1e-5)
    for step in range(int(settings["pretext"])):
        patches, _ = draw(data, settings, torch_generator(seed, "pretext patches", step), 0.0)
        descend(optimiser, pretext_loss(net, heads, patches, torch_generator(seed, "puzzle", step)).total)
    return heads


def train(
    net: nn.Module, data: Data, seed: int, settings: Settings, stops: Sequence[int], look: Callable[[int], None]
) -> None:
    """Train with labels at a constant rate up to the last of ``stops``; ``look`` is called at each of them."""
    optimiser = torch.optim.AdamW(net.parameters(), settings["lr"], weight_decay=1e-5)
    for step in range(1, max(stops) + 1):
        patches, labels = draw(data, settings, torch_generator(seed, "patches", step), 0.5)
        descend(optimiser, loss(net(patches), labels))
        if step in stops:
            look(step)


def dice(net: nn.Module, data: Data) -> list[list[float]]:
    """Return, of every volume, the Dice of anterior and posterior; windows meet with an overlap of a quarter."""
    scores = []
    for volume, labels in zip(*data, strict=True):
        # PyTorch 2.13 has no fast convolution in three dimensions for a single window on one thread.
        guess = sliding(net, volume[None], PATCH, overlap=0.25, batch_size=4).argmax(1)[0]
        pairs = [(guess == k, labels == k) for k in range(1, len(CLASSES))]
        scores.append([float(2 * (a & b).sum() / max(1, int(a.sum() + b.sum()))) for a, b in pairs])
    return scores


def examine(net: nn.Module, heads: OrderHeads, data: Data) -> dict[str, dict[str, float]]:
    """Return how well the pretext task is done on unseen volumes, with patches anywhere and in the middle.

    ``error`` is the mean squared error of the reconstruction, ``constant`` that of the best constant of each patch.
    Patches in the middle hold next to no padding, which tells where a slab at the border came from.
    """
    middle = tuple(slice((whole - side) // 2, (whole + side) // 2) for whole, side in zip(WHOLE, PATCH, strict=True))
    anywhere = draw_patches(*data, PATCH, torch_generator(0, "pretext test patches"), 0.0)[0]
    found = {}
    for name, patches in (("anywhere", anywhere), ("middle", data[0][(slice(None), slice(None), *middle)])):
        with torch.no_grad():
            result = pretext_loss(net, heads, patches, torch_generator(0, "pretext test", name))
        constant = patches.flatten(1).var(1, correction=0).mean()
        numbers = {"accuracy": result.accuracy, "error": result.reconstruction, "constant": constant}
        found[name] = {key: float(value) for key, value in numbers.items()}
    return found


def run(arm: str, seed: int, known: Data, unseen: Data, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed; return each test volume's Dice at every stop, and how the pretext task went."""
    net = build("unetr", classes=1, size=PATCH, generator=torch_generator(seed, "net"), width=8, depth=4, patch=8)
    pretext = None
    if arm != "random":
        pretext = examine(net, pretrain(net, known, TASKS[arm], seed, settings), unseen)
    swap_output(net, len(CLASSES), torch_generator(seed, "output"))
    found: dict[str, list[list[float]]] = {}

    def look(step: int) -> None:
        found[str(step)] = dice(net, unseen)
        print(f"{arm}, seed {seed}, {step} steps: Dice {np.mean(found[str(step)]):.3f}", flush=True)

    train(net, known, seed, settings, stops(arm, settings), look)
    return {"arm": arm, "seed": seed, "settings": settings, "dice": found, "pretext": pretext}


def stops(arm: str, settings: Settings) -> list[int]:
    """Return after how many steps with labels an arm is tested."""
    after = [int(settings[key]) for key in ("few", "more")]
    return sorted({*after, *(n + int(settings["pretext"]) for n in after if arm == "random")})


def cell(values: Sequence[float] | np.ndarray, *, points: bool = False) -> str:
    """Return mean and 95 % Student t interval over seeds, of scores or of differences in points; one seed has none."""
    # A difference may be negative: its interval is that of a share, moved there and back.
    known = interval([(1 + value) / 2 if points else value for value in values])
    told = []
    for key in ("mean", "low", "high"):
        if (value := known[key]) is not None:
            told.append(f"{100 * (2 * value - 1):+.1f}" if points else f"{value:.3f}")
    return f"{told[0]} ({told[1]} to {told[2]})" if len(told) == 3 else told[0]


def page(found: dict[str, list[dict[str, Any]]], settings: Settings) -> list[str]:
    """Return the tables in Markdown; ``found`` has the seeds' results of every arm."""

    def scores(arm: str, step: int) -> np.ndarray:  # (seeds, 2), means over test volumes
        return np.array([np.mean(one["dice"][str(step)], axis=0) for one in found[arm]])

    lines, pretext = [], int(settings["pretext"])
    titles = {"random": "random start", "lwi": "LWI", "mask": "masks only", "order": "order only"}
    for steps in (int(settings["few"]), int(settings["more"])):
        equal = scores("random", steps + pretext).mean(1)
        lines += ["", f"### {steps} steps with labels, {pretext} of pretext", ""]
        lines += ["| start | steps | anterior | posterior | mean | each seed | against equal total, points |"]
        lines += ["|---" * 7 + "|"]
        rows = [("random", steps, f"{steps}"), ("random", steps + pretext, f"{steps + pretext}")]
        rows += [(arm, steps, f"{pretext} + {steps}") for arm in found if arm != "random"]
        for arm, step, taken in rows:
            values = scores(arm, step)
            mean = values.mean(1)
            cells = [titles[arm], taken, cell(values[:, 0]), cell(values[:, 1]), cell(mean)]
            gain = "" if (arm, step) == ("random", steps + pretext) else cell(mean - equal, points=True)
            lines.append("| " + " | ".join([*cells, " ".join(f"{one:.3f}" for one in mean), gain]) + " |")
    lines += ["", "### The pretext task on unseen volumes", ""]
    lines += ["| losses | patches | order told, chance 0.250 | error of the reconstruction | of each patch's mean |"]
    lines += ["|---" * 5 + "|"]
    for arm in (arm for arm in found if arm != "random"):
        for where in ("anywhere", "middle"):
            told = [one["pretext"][where] for one in found[arm]]
            accuracy = cell([one["accuracy"] for one in told])
            errors = [" ".join(f"{one[key]:.3f}" for one in told) for key in ("error", "constant")]
            lines.append("| " + " | ".join([titles[arm], where, accuracy, *errors]) + " |")
    return lines


def changed(overrides: Sequence[str]) -> Settings:
    """Return the settings with ``KEY=NUMBER`` applied."""
    settings = dict(SETTINGS)
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            settings[key] = type(SETTINGS[key])(float(value))
        except (KeyError, ValueError) as error:
            known = ", ".join(SETTINGS)
            raise ConfigError(f"{text!r:.80} sets nothing", fix=f"KEY=NUMBER, of {known}") from error
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/hippocampus"))
    parser.add_argument("--arms", default=",".join(ARMS), help="random must be among them")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=NUMBER, e.g. pretext=240")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    settings = changed(args.overrides)
    names = unpack(args.data, args.out / "volumes")
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, args.seeds.split(",")):
        for arm in args.arms.split(","):
            file = args.out / f"{arm}-{seed}.json"
            if not file.exists():
                known, unseen = (read(args.out / "volumes", part) for part in split(names, seed, settings))
                write_json(file, run(arm, seed, known, unseen, settings))
            one = read_json(file)
            if one["settings"] != settings:
                raise ConfigError("results of other settings are there", where=str(file), fix="give another --out")
            found.setdefault(arm, []).append(one)
    lines = page(found, settings)
    print("\n".join(lines))
    if args.page:
        args.page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
