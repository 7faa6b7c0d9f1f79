"""Networks trained whole on images without labels: what they compute, that a run trains them, what comes out."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from confrere.adapters.lora import LoraSpec
from confrere.backbones import Backbone, load
from confrere.backbones.augmentation import two_views
from confrere.backbones.pretraining import MaskedAutoencoder, patches
from confrere.cli import app
from confrere.config import override, validate
from confrere.console import start
from confrere.data.options import DataOptions
from confrere.data.sources import read_listing
from confrere.errors import BackboneError, ConfigError, RunError
from confrere.job import run_experiment
from confrere.predict import Predictor
from confrere.pretrain import GENERAL, pretraining
from confrere.record.files import read_json, read_state
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks import make_task
from confrere.tasks.pretext import Reconstruction
from confrere.tasks.task import Answers

TASKS = ("reconstruction", "contrast")
TINY = {"data": {"image_size": [32, 32]}, "train": {"steps": 2, "batch_size": 4, "views": 2}, "threads": 1}


@functools.cache
def network(task: str = "reconstruction", **options: Any) -> Backbone:
    spec = LoraSpec(slots=("general",), blocks=2)
    return load("vit-nano", lora=spec, image_size=32, task=make_task({"name": task, **options}))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(numpy_generator(seed, "pictures").integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


@functools.cache
def hospitals(folder: Path) -> Path:
    """Return two sites with smooth pictures, in their folders and below."""
    for index, site in enumerate(("north", "south")):
        rng = numpy_generator(index, "smooth")
        (folder / site / "ward").mkdir(parents=True)
        for number in range(14):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((32, 32))
            coarse.save(folder / site / ("ward" if number % 2 else ".") / f"p{index}{number}__1.png")
    return folder


def small(path: Path, task: str = "reconstruction", method: str = "fedit") -> dict[str, Any]:
    names = {"task": {"name": task}, "backbone": {"name": "vit-nano"}, "method": {"name": method}}
    made = pretraining({**TINY, **names, "controls": [], "rounds": 2})
    return {**made, "selection": {"every": 1}, "path": str(path)}


def test_patches_are_cut_row_by_row() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    found = patches(images, 2)
    assert found.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            block = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 2, 3, 1)
            assert torch.equal(found[:, 3 * row + column], block.reshape(2, -1))


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_transformers_own(normalised: bool) -> None:
    """Parity with ``ViTMAEForPreTraining.forward``, which gives the mean over images of the same loss."""
    from transformers import ViTMAEForPreTraining

    backbone = network(normalised=normalised, masked=0.5)
    root = backbone.anatomy.root
    assert isinstance(root, MaskedAutoencoder)
    params = backbone.start(torch_generator(1, "weights"))
    with backbone.dropout(torch_generator(2, "masks")):
        mine = backbone.logits(params, pictures(5))
    config = root.encoder.config
    theirs = ViTMAEForPreTraining(config)
    fixed = {n: v for n, v in root.state_dict().items() if n.endswith(("position_embeddings", "pos_embed"))}
    named = {n.replace("encoder.", "vit.", 1): v for n, v in {**fixed, **params}.items()}
    theirs.load_state_dict(named, strict=True)
    noise = torch.rand((5, 16), generator=torch_generator(2, "masks"))
    with torch.no_grad():
        out = theirs(backbone.normalise(pictures(5)), noise=noise)
    assert int(out.mask.sum()) == 5 * 8
    # transformers divides by the unbiased variance of a patch, as we do; colours lie in another order in a patch.
    seen = torch.stack([patches(backbone.normalise(pictures(5)), 8), theirs.patchify(backbone.normalise(pictures(5)))])
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(mine[:, 0].mean(), out.loss)


def test_the_control_draws_each_patch_in_its_mean() -> None:
    backbone, images = network(normalised=False), pictures(3)
    params, root = backbone.start(torch_generator(0, "w")), backbone.anatomy.root
    assert isinstance(root, MaskedAutoencoder)
    seen = backbone.normalise(images)
    hidden = root.drawn(seen)[1].bool()
    parts = patches(seen, 8)
    expected = [float(np.mean([part.var(unbiased=False) for part in parts[i][hidden[i]]])) for i in range(3)]
    np.testing.assert_allclose(backbone.logits(params, images)[:, 1], expected, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_every_weight_learns_but_the_positions(task: str) -> None:
    backbone = network(task)
    params = {n: v.requires_grad_() for n, v in backbone.start(torch_generator(0, "w")).items()}
    with backbone.dropout(torch_generator(0, "step")):
        torch.autograd.backward(backbone.logits(params, pictures(4))[:, 0].mean())
    assert all(
        value.grad is not None and value.grad.abs().sum() > 0 for n, value in params.items() if ".k_proj.b" not in n
    )
    held = {name for name, _ in backbone.anatomy.root.named_parameters()} - params.keys()
    assert held
    assert all("pos" in name for name in held)


@pytest.mark.parametrize("task", TASKS)
def test_draws_have_an_address_and_judgements_none(task: str) -> None:
    backbone, images = network(task), pictures(6)
    params = backbone.start(torch_generator(0, "w"))
    assert not torch.equal(
        params["encoder.embeddings.cls_token"], backbone.start(torch_generator(1, "w"))["encoder.embeddings.cls_token"]
    )

    def trained(seed: int) -> torch.Tensor:
        with backbone.dropout(torch_generator(seed, "step")):
            return backbone.logits(params, images)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    assert torch.equal(backbone.logits(params, images), backbone.logits(params, images))


def test_hidden_patches_are_the_same_for_all_images_when_judged() -> None:
    backbone = network()
    params, images = backbone.start(torch_generator(0, "w")), pictures(6)
    together = backbone.logits(params, images)
    torch.testing.assert_close(torch.cat([backbone.logits(params, one[None]) for one in images]), together)


def test_the_momentum_encoder_follows_within_a_call_and_is_forgotten_after() -> None:
    backbone, images = network("contrast", momentum=0.5), pictures(4)
    first, moved = backbone.start(torch_generator(0, "w")), backbone.start(torch_generator(1, "w"))
    root: Any = backbone.anatomy.root
    with torch.no_grad(), backbone.dropout(torch_generator(0, "step")):
        backbone.logits(first, images)
        name = "encoder.embeddings.cls_token"
        assert torch.equal(root._slow[name], first[name])
        backbone.logits(moved, images)
        torch.testing.assert_close(root._slow[name], (first[name] + moved[name]) / 2)
    with torch.no_grad(), backbone.dropout(torch_generator(0, "step")):
        backbone.logits(moved, images)
        assert torch.equal(root._slow[name], moved[name])


def test_views_show_a_part_of_the_image() -> None:
    flat = torch.ones(3, 3, 16, 16) * torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1)
    one, two = two_views(flat, lambda like: torch.rand(like.shape, generator=torch_generator(0, "views")))
    assert one.shape == two.shape == flat.shape
    for view in (one, two):  # no contrast and no colour in it: only the brightness may change
        assert (view.amax((1, 2, 3)) - view.amin((1, 2, 3)) < 1e-5).all()
        assert ((view.mean((1, 2, 3)) / flat.mean((1, 2, 3)) - 1).abs() <= 0.4 + 1e-5).all()
    same, _ = two_views(pictures(2).permute(0, 3, 1, 2).float(), lambda like: torch.full(like.shape, 0.999))
    torch.testing.assert_close(same.mean(), pictures(2).float().mean() * 1.4, rtol=0.05, atol=0)


def test_scores_are_shares_of_what_a_mean_colour_leaves() -> None:
    task = Reconstruction()
    outputs = torch.tensor([[0.25, 1.0], [2.0, 1.0], [0.0, 0.0]])
    assert task.worth(outputs).tolist() == [0.75, 0.0, 1.0]
    found = task.judge(Answers(outputs=outputs, targets=np.zeros(3), groups=np.arange(3)))
    np.testing.assert_allclose(found, (1.75 / 3, np.exp(-0.75)), rtol=1e-6)
    none = Answers(outputs=outputs[:0], targets=np.zeros(0), groups=np.zeros(0, np.int64))
    assert task.examine(none, none, classes=("all",), generator=np.random.default_rng(0))[0]["metrics"] is None


def test_folders_say_nothing(tmp_path: Path) -> None:
    listing = read_listing(hospitals(tmp_path), DataOptions(target="image"))
    assert len(listing.rows) == 28
    assert {row.label for row in listing.rows} == {"all"}


@pytest.mark.parametrize("method", ["fedit", "local", "pooled", "fedadam"])
def test_a_run_makes_a_backbone_that_a_run_takes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    data, out = hospitals(tmp_path / "hospitals"), tmp_path / "run"
    start(data, out, small(data, method=method), [], quiet=True)
    made = out / "adapters" / "north" / "backbone" if method == "local" else out / GENERAL
    digest = (made / "README.md").read_text().split("`backbone.sha256`: ")[1].split()[0]
    backbone = load(made, lora=LoraSpec(slots=("general",), blocks=1), sha256=digest)
    assert (backbone.depth, backbone.image_size, backbone.feature_dim) == (4, (32, 32), 128)
    # What it computes is what was trained: the encoder of the round that was chosen.
    results = read_json(out / "results.json")
    site = "north" if method == "local" else ("pooled" if method == "pooled" else None)
    file = f"sites/{site}/" if site else "server/"
    kept = [read_state(path)[0] for path in sorted(out.glob(f"{file}*.safetensors"))]
    tokens = torch.stack(
        [s[g]["encoder.embeddings.cls_token"] for s in kept for g in s if "encoder.embeddings.cls_token" in s[g]]
    )
    own = dict(backbone.anatomy.root.named_parameters())["embeddings.cls_token"]
    assert any(torch.equal(own, token) for token in tokens)
    assert results["task"]["headline"] == "explained"
    with pytest.raises(RunError, match="learnt no labels"):
        Predictor(out, "north")
    assert 0 <= results["summary"]["personalised"]["mean"] <= 1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    data = hospitals(tmp_path / "hospitals")
    for name in ("one", "two"):
        run_experiment(validate(override(small(data, "contrast"), [])), tmp_path / name)
    one, two = (tmp_path / name / GENERAL / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": {"name": "fedopal"}}, "task"),
        ({"data": {"target": "label"}}, "task"),
        ({"train": {"balance": "weights"}}, "task"),
        ({"task": {"name": "reconstruction", "masked": 1.5}}, "value"),
        ({"task": {"name": "reconstruction", "decoder_width": 33}}, "value"),
        ({"task": {"name": {"reconstruction": 1}}}, "unknown-name"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**small(tmp_path), **change})
    assert caught.value.code == code


def test_networks_without_weights_are_refused_elsewhere() -> None:
    spec = LoraSpec(slots=("general",), blocks=1)
    with pytest.raises(BackboneError, match="no weights yet"):
        load("vit-nano", lora=spec)
    with pytest.raises(BackboneError, match="a network of its own"):
        load("test-vit", lora=spec, task=make_task({"name": "reconstruction"}))
    with pytest.raises(BackboneError, match="square"):
        load("vit-nano", lora=spec, image_size=(32, 64), task=make_task({"name": "reconstruction"}))


def test_defaults_yield_to_what_is_given() -> None:
    given = {"train": {"lr": 1.0}, "controls": ["local"], "task": {"name": "contrast", "temperature": 0.5}, "seed": 7}
    made = pretraining(given)
    assert json.loads(json.dumps(made))["train"] == {**made["train"], "lr": 1.0, "balance": "none"}
    assert made["controls"] == ["local"]
    assert made["task"] == {"name": "contrast", "temperature": 0.5}
    assert (made["seed"], made["rounds"], made["method"], made["backbone"]["name"]) == (
        7, 100, {"name": "fedit"}, "vit-tiny",
    )  # fmt: skip


def test_a_file_is_read_and_what_is_typed_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr("confrere.commands.start", lambda *args, **_: found.update(args[2]))
    file = tmp_path / "e.toml"
    file.write_text(
        'rounds = 9\nseed = 7\n[task]\nname = "contrast"\ntemperature = 0.5\n[backbone]\nname = "vit-nano"\n'
        '[method]\nname = "fedadam"\nlr = 0.3\n'
    )
    said = ["pretrain", str(tmp_path), "--out", str(tmp_path / "o"), "--config", str(file), "--quiet"]
    assert CliRunner().invoke(app, [*said, "--rounds", "3"]).exit_code == 0
    assert (found["rounds"], found["seed"]) == (3, 7)
    assert found["task"] == {"name": "contrast", "temperature": 0.5}
    assert (found["backbone"]["name"], found["method"]) == ("vit-nano", {"name": "fedadam", "lr": 0.3})
    assert CliRunner().invoke(app, [*said, "--task", "reconstruction", "--method", "fedit"]).exit_code == 0
    assert (found["rounds"], found["task"], found["method"]) == (9, {"name": "reconstruction"}, {"name": "fedit"})


def test_a_task_with_labels_is_no_pretraining() -> None:
    with pytest.raises(ConfigError, match="classification needs labels"):
        pretraining({"task": {"name": "classification"}})
