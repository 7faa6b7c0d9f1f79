"""Volumes in a run: windows, losses beside what was looked at, every method that can, predictions as NIfTI."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from volume_files import hospitals, save

from confrere.adapters.dropout import Chance
from confrere.adapters.lora import LoraSpec
from confrere.backbones import Backbone, load
from confrere.backbones.windows import centred, somewhere
from confrere.cli import app
from confrere.config import validate
from confrere.console import start
from confrere.data.patches import sliding
from confrere.errors import BackboneError, ConfigError
from confrere.learner import Learner, TrainSettings
from confrere.method import METHODS
from confrere.metrics.masks import evaluate_masks
from confrere.record.files import read_json
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks import make_task
from confrere.tasks.segmentation import dice_terms
from confrere.tokenset import Batch

SIZE, WINDOW = (32, 32, 48), (32, 32, 32)
TASK = make_task({"name": "volume-segmentation"})


@functools.cache
def network(name: str = "unet", window: tuple[int, int, int] | None = WINDOW) -> Backbone:
    return load(name, lora=LoraSpec(slots=("general",), blocks=1), image_size=SIZE, patch=window, task=TASK)


def volumes(count: int = 2) -> torch.Tensor:
    return torch.randn((count, *SIZE, 1), generator=torch_generator(0, "volumes"))


def params(backbone: Backbone, classes: int = 3) -> dict[str, torch.Tensor]:
    drawn = backbone.start(torch_generator(0, "net")) | TASK.init(
        classes, backbone.feature_dim, torch_generator(0, "head")
    )
    return drawn | {"head.weight": torch.randn(drawn["head.weight"].shape, generator=torch_generator(1, "head"))}


def test_the_last_layer_starts_at_random_as_the_network_below_does() -> None:
    """From zeros it learns much later."""
    head = TASK.init(3, 4000, torch_generator(0, "net"))
    again = TASK.init(3, 4000, torch_generator(0, "net"))
    assert all(torch.equal(head[name], again[name]) for name in head)
    assert float(head["head.weight"].std()) == pytest.approx(12000**-0.5, rel=0.05)
    assert not head["head.bias"].any()


def test_whole_volumes_are_seen_through_windows() -> None:
    backbone = network()
    root: Any = backbone.anatomy.root
    given = params(backbone)
    found = backbone.logits(given, volumes())
    assert found.shape == (2, 4, *SIZE)
    assert (found[:, -1] == 1).all()

    def alone(patch: torch.Tensor) -> torch.Tensor:
        weights = {n.removeprefix("net."): v for n, v in given.items() if n.startswith("net.")}
        maps = torch.func.functional_call(root.net, weights, (patch,))
        return torch.einsum("bdxyz,kd->bkxyz", maps, given["head.weight"]) + given["head.bias"].view(1, -1, 1, 1, 1)

    expected = sliding(alone, volumes().movedim(-1, 1), WINDOW, overlap=0.25)
    torch.testing.assert_close(found[:, :-1], expected, rtol=1e-4, atol=1e-4)


def test_training_sees_one_window_of_each_volume_and_learns_nothing_elsewhere() -> None:
    backbone, given = network(), params(network())
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    with backbone.dropout(torch_generator(3, "step")):
        outputs = backbone.logits(leaves, volumes())
    seen = outputs[:, -1]
    assert [int(one.sum()) for one in seen] == [32**3] * 2
    masks = torch.randint(0, 3, (2, *SIZE), generator=torch_generator(0, "masks")).to(torch.uint8)
    loss = TASK.objective("dice-cross-entropy")
    value = loss(outputs, masks)
    assert torch.equal(loss(outputs, torch.where(seen == 1, masks, 2)), value)
    inside = [outputs[i, :3][:, seen[i] == 1].T for i in range(2)]
    truth = [masks[i][seen[i] == 1].long() for i in range(2)]
    cross = torch.nn.functional.cross_entropy(torch.cat(inside), torch.cat(truth))
    dice = torch.stack(
        [dice_terms(s.softmax(1).T[None], t[None])[0] for s, t in zip(inside, truth, strict=True)]
    ).mean()
    torch.testing.assert_close(value, cross + dice)
    torch.autograd.backward(value)
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves.values())


def corner_masks(count: int) -> torch.Tensor:
    """Return masks whose only foreground is one voxel in a far corner, which few windows anywhere would show."""
    masks = torch.zeros(count, *SIZE, dtype=torch.uint8)
    masks[:, 31, 30, 47] = 1
    return masks


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1 / 17), (0.5, 9 / 17), (1.0, 1.0)])
def test_a_share_of_the_windows_lies_around_the_foreground(share: float, expected: float) -> None:
    chance, masks = Chance(), corner_masks(400)
    chance.generator = torch_generator(0, "windows")
    inputs = torch.zeros(400, 1, 1, 1, 1).expand(400, 1, *SIZE)
    found = somewhere(inputs, WINDOW, chance, masks, share)
    assert all((cut.stop - cut.start, cut.start >= 0) == (32, True) for one in found for cut in one)
    assert all(cut.stop <= side for one in found for cut, side in zip(one, SIZE, strict=True))
    shown = [bool(mask[one].any()) for mask, one in zip(masks, found, strict=True)]
    assert np.mean(shown) == pytest.approx(expected, abs=0.07)


def test_windows_around_the_foreground_are_those_of_draw_patches() -> None:
    masks = (torch.rand(5, *SIZE, generator=torch_generator(1, "masks")) < 1e-4).to(torch.uint8)
    masks[2] = 0
    numbers = torch.arange(5 * 32 * 32 * 48, dtype=torch.float64).view(5, 1, *SIZE)
    draws = torch.rand(5, 5, generator=torch_generator(0, "w"), dtype=torch.float32)
    chance = Chance()
    chance.generator = torch_generator(0, "w")
    found = somewhere(numbers, (9, 10, 11), chance, masks, 0.8)
    for row, one in enumerate(found):
        centred, which, *anywhere = draws[row].tolist()
        voxels = np.argwhere(masks[row].numpy() > 0)
        for axis, cut in enumerate(one):
            free = SIZE[axis] - (9, 10, 11)[axis]
            expected = int(anywhere[axis] * (free + 1))
            if centred < 0.8 and len(voxels):
                middle = voxels[int(which * len(voxels))][axis]
                expected = int(np.clip(middle - (9, 10, 11)[axis] // 2, 0, free))
            assert cut.start == expected


def test_a_learner_centres_the_windows_of_its_own_training_alone() -> None:
    backbone, given, masks = network(), params(network()), corner_masks(2)
    root: Any = backbone.anatomy.root

    def seen(share: float) -> torch.Tensor:
        with backbone.dropout(torch_generator(3, "step")), centred(backbone.anatomy, masks, share):
            return backbone.logits(given, volumes())[:, -1]

    with backbone.dropout(torch_generator(3, "step")):
        plain = backbone.logits(given, volumes())[:, -1]
    assert torch.equal(seen(0.0), plain)
    assert (seen(1.0)[:, 31, 30, 47] == 1).all()
    assert not torch.equal(seen(1.0), plain)
    assert (root.masks, root.share) == (None, 0.0)
    with pytest.raises(RuntimeError), centred(backbone.anatomy, masks, 1.0):
        raise RuntimeError
    assert root.masks is None
    settings = TrainSettings(steps=1, batch_size=2, balance="none", foreground=1.0)
    data: Any = None
    learner = Learner(backbone=backbone, data=data, settings=settings, seed=0, site="a", round=1, rounds=1)
    asked: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch, backbone.dropout(torch_generator(3, "step")):
        patch.setattr(Learner, "_task", lambda self, outputs, labels: asked.append(outputs) or outputs.sum())
        learner.loss(given, Batch(volumes(), masks))
        replace(learner, settings=replace(settings, foreground=0.0)).loss(given, Batch(volumes(), masks))
    assert (asked[0][:, -1, 31, 30, 47] == 1).all()
    assert (asked[1][:, -1, 31, 30, 47] == 0).all()


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_first_weights_have_an_address(name: str) -> None:
    backbone = network(name)
    one, two, other = (backbone.start(torch_generator(seed, "net")) for seed in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    assert backbone.logits(params(backbone), volumes(1)).shape == (1, 4, *SIZE)


def test_metrics_of_volumes_are_those_of_slow_loops() -> None:
    rng = numpy_generator(0, "volumes")
    truth, guess = (rng.random((4, 6, 7, 5)) < 0.3 for _ in range(2))
    found, values = evaluate_masks(
        guess.astype(np.uint8), truth.astype(np.uint8), np.arange(4), classes=("b", "f"), generator=rng, resamples=10
    )
    slow = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(guess, truth, strict=True)]
    np.testing.assert_allclose(values, slow)

    def box(mask: np.ndarray) -> list[tuple[int, int]]:
        where = np.nonzero(mask)
        return [(int(axis.min()), int(axis.max()) + 1) for axis in where]

    overlaps = []
    for a, b in zip(guess, truth, strict=True):
        sides = [max(0, min(h1, h2) - max(l1, l2)) for (l1, h1), (l2, h2) in zip(box(a), box(b), strict=True)]
        sizes = [np.prod([h - low for low, h in box(one)]) for one in (a, b)]
        overlaps.append(np.prod(sides) / (sum(sizes) - np.prod(sides)))
    assert found["box_iou"]["value"] == pytest.approx(np.mean(overlaps))
    assert 0 < found["hd95"]["value"] < 1


def small(path: Path, method: str = "fedit", **more: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "task": "volume-segmentation",
        "method": method,
        "controls": [],
        "rounds": 2,
        "threads": 1,
        "data": {"volume": {"size": [32, 32, 32]}},
        "backbone": {"name": "unet"},
        "train": {"steps": 2, "batch_size": 2, "balance": "none", "lr": 1e-2},
        **more,
    }


WHOLE = [name for name, cls in sorted(METHODS.items()) if cls.whole]


@pytest.mark.slow
@pytest.mark.parametrize("method", WHOLE)
def test_a_run_ends_with_models_that_predict(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    data, out = hospitals(tmp_path / "data", each=5), tmp_path / "run"
    start(data, out, small(data, method), [], quiet=True)
    results = read_json(out / "results.json")
    assert results["task"]["headline"] == "dice"
    assert all(0 <= one["models"]["personalised"]["dice"]["value"] <= 1 for one in results["sites"].values())
    if method != "fedper":
        return
    fresh = tmp_path / "fresh"
    shutil.copytree(data / "north" / "images", fresh)
    (fresh / "rubbish.nii").write_text("no volume")
    save(fresh / "empty.nii.gz", np.zeros((15, 16, 14)))
    save(fresh / "wide.nii.gz", numpy_generator(0, "wide").random((40, 16, 14)))
    told = ["predict", str(out), str(fresh), "--site", "north", "--out", str(tmp_path / "found.csv")]
    done = CliRunner().invoke(app, told, catch_exceptions=False)
    assert "6 images, 2 left out" in done.output
    assert "1 of 6 volumes reach beyond data.volume.size" in done.output
    rows = (tmp_path / "found.csv").read_text().splitlines()
    assert rows[0] == "file,foreground ml,outside the grid ml"
    for number, row in enumerate(rows[1:]):
        mask = nibabel.load(tmp_path / "found_masks" / f"{number:04d}.nii.gz")
        seen = nibabel.load(fresh / row.split(",")[0])
        assert (mask.shape, mask.affine.tolist()) == (seen.shape, seen.affine.tolist())
        assert float(row.split(",")[1]) == pytest.approx(int((np.asarray(mask.dataobj) == 1).sum()) / 1000, abs=1e-4)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    data = hospitals(tmp_path / "data", each=5)
    for name in ("one", "two"):
        start(data, tmp_path / name, small(data), [], quiet=True)
    one, two = (tmp_path / name / "adapters" / "north" / "head.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "fedopal"}, "task"),
        ({"train": {"views": 2}}, "backbone-kind"),
        ({"data": {}}, "backbone-kind"),
        ({"backbone": {"name": "test-vit"}}, "backbone-kind"),
        ({"backbone": {"name": "unet", "patch": [4, 16, 16]}}, "value"),
        ({"train": {"foreground": 1.5}}, "value"),
        ({"train": {"foreground": 0.5}}, "value"),  # the window is the volume
        ({"task": "lwi", "train": {"foreground": 0.5}}, "task"),
        ({"task": "segmentation", "train": {"foreground": 0.5}}, "task"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    data = hospitals(tmp_path / "data", each=5)
    with pytest.raises(ConfigError) as caught:
        start(data, tmp_path / "run", small(data, **change), [], quiet=True)
    assert caught.value.code == code


def test_networks_refuse_what_they_do_not_read() -> None:
    spec = LoraSpec(slots=("general",), blocks=1)
    with pytest.raises(BackboneError, match="larger than a volume"):
        load("unet", lora=spec, image_size=(32, 32, 32), patch=(48, 32, 32), task=TASK)
    with pytest.raises(BackboneError, match="reads volumes"):
        load("unet", lora=spec, image_size=32, task=TASK)
    with pytest.raises(BackboneError, match="segments volumes"):
        load("unet", lora=spec, image_size=SIZE)
    with pytest.raises(BackboneError, match="multiples of 16"):
        load("unet", lora=spec, image_size=(32, 32, 40), task=TASK)
    with pytest.raises(BackboneError, match="flat images"):
        load("test-vit", lora=spec, image_size=SIZE)
    assert validate(
        {"path": "x", "task": "volume-segmentation", "method": "fedit", "backbone": {"name": "unet"}}
    ).data.target
