"""Networks for volumes trained on LWI at all sites: what they compute, what comes out, and what a run makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from volume_files import hospitals

from confrere.adapters.lora import LoraSpec
from confrere.backbones import Backbone, load
from confrere.backbones.volume_folder import network_files
from confrere.backbones.volumetric import Size, build
from confrere.config import validate
from confrere.console import start
from confrere.data.options import DataOptions
from confrere.data.sources import read_listing
from confrere.errors import BackboneError, ConfigError
from confrere.job import initial, prepare, run_experiment
from confrere.method import METHODS
from confrere.networks import output_name
from confrere.opening import open_data
from confrere.pretext.lwi import Lwi, OrderHeads, loss, order_heads
from confrere.pretrain import GENERAL, pretraining
from confrere.record.files import read_json, write_json
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tasks import make_task
from confrere.tasks.lwi import LearnableInitialisation
from confrere.tasks.task import Answers

SIZE: Size = (16, 16, 32)
WINDOW: Size = (8, 8, 32)
LABELS = make_task({"name": "volume-segmentation"})


@functools.cache
def network(window: Size | None = None, **options: Any) -> Backbone:
    task = make_task({"name": "lwi", **options})
    return load("unetr", lora=SPEC, image_size=SIZE, patch=window or WINDOW, task=task)


SPEC = LoraSpec(slots=("general",), blocks=1)


def volumes(count: int = 3, size: Size = SIZE) -> torch.Tensor:
    return torch.randn((count, *size, 1), generator=torch_generator(0, "volumes"))


def apart(params: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, OrderHeads]:
    """Return network and heads as :mod:`confrere.pretext.lwi` takes them, with these weights."""
    net = build("unetr", classes=1, size=WINDOW, generator=torch_generator(5, "other"))
    heads = order_heads(net, torch.zeros(1, 1, *WINDOW), Lwi(), torch_generator(5, "other"))
    for module, prefix in ((net, "net."), (heads, "order_heads.")):
        own = {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}
        module.load_state_dict(own, strict=True)
    return net, heads


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_loss_of_a_step_is_that_of_the_pretext_task(per_sample: bool) -> None:
    """Parity with ``pretext.lwi.loss`` on the same draws, in value and gradient."""
    backbone, given = network(per_sample=per_sample), volumes(3, WINDOW)
    backbone = load("unetr", lora=SPEC, image_size=WINDOW, task=backbone.task)
    params = {n: v.requires_grad_() for n, v in backbone.start(torch_generator(0, "w")).items()}
    with backbone.dropout(torch_generator(1, "step")):
        outputs = backbone.logits(params, given)
    net, heads = apart({n: v.detach() for n, v in params.items()})
    heads.task = Lwi(per_sample=per_sample)
    theirs = loss(net, heads, given.movedim(-1, 1), torch_generator(1, "step"))
    mine = backbone.task.objective("own")(outputs, torch.zeros(3))
    torch.testing.assert_close(mine, theirs.total)
    torch.testing.assert_close(outputs[:, 1].mean(), theirs.accuracy)
    torch.testing.assert_close(outputs[:, 2].mean(), theirs.reconstruction)
    torch.autograd.backward([mine, theirs.total])
    for prefix, module in (("net.", net), ("order_heads.", heads)):
        for name, value in module.named_parameters():
            torch.testing.assert_close(params[prefix + name].grad, value.grad, rtol=1e-3, atol=1e-5)


def test_training_draws_windows_and_puzzles_and_judging_none() -> None:
    backbone, given = network(), volumes(5)
    params = backbone.start(torch_generator(0, "w"))

    @torch.no_grad()
    def trained(seed: int) -> torch.Tensor:
        with backbone.dropout(torch_generator(seed, "step")):
            return backbone.logits(params, given)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    with torch.no_grad():
        together = backbone.logits(params, given)
        each = torch.cat([backbone.logits(params, one[None]) for one in given])
    torch.testing.assert_close(each, together)
    # The window in the middle, whose mean is the control.
    np.testing.assert_allclose(together[:, 3], given[:, 4:12, 4:12].flatten(1).var(1, correction=0), rtol=1e-5)
    same = network(per_sample=True)
    with torch.no_grad():
        torch.testing.assert_close(same.logits(params, given), together)


def test_every_weight_learns() -> None:
    backbone = network()
    params = {n: v.requires_grad_() for n, v in backbone.start(torch_generator(0, "w")).items()}
    with backbone.dropout(torch_generator(0, "step")):
        torch.autograd.backward(backbone.logits(params, volumes(2))[:, 0].mean())
    assert all(value.grad is not None and value.grad.any() for value in params.values())
    assert params.keys() == {name for name, _ in backbone.anatomy.root.named_parameters()}


def test_scores_are_shares() -> None:
    task = LearnableInitialisation()
    outputs = torch.tensor([[5.0, 0.25, 0.25, 1.0], [6.0, 1.0, 2.0, 1.0]])
    assert [one.tolist() for one in task.numbers(outputs)] == [[0.25, 1.0], [0.75, 0.0]]
    found = Answers(outputs=outputs, targets=np.zeros(2), groups=np.arange(2))
    np.testing.assert_allclose(task.judge(found), (0.625, np.exp(-5.5)), rtol=1e-6)
    metrics = task.examine(found, found, classes=("all",), generator=np.random.default_rng(0))[0]["metrics"]
    assert (metrics["told"]["value"], metrics["rebuilt"]["value"]) == (0.625, 0.375)
    none = Answers(outputs=torch.zeros(0, task.outputs(1)), targets=np.zeros(0), groups=np.zeros(0, np.int64))
    assert task.examine(none, none, classes=("all",), generator=np.random.default_rng(0))[0]["metrics"] is None
    assert make_task(task.choice()) == task


def test_folders_with_masks_and_series_are_read_without_labels(tmp_path: Path) -> None:
    folder = hospitals(tmp_path)
    (folder / "north" / "images" / "series").mkdir()
    grid = {"size": (16, 16, 16)}
    rows = read_listing(folder, DataOptions.model_validate({"target": "image", "volume": grid})).rows
    assert len(rows) == 13
    assert {row.label for row in rows} == {"all"}


# A run


def small(path: Path, method: str = "fedit", **more: Any) -> dict[str, Any]:
    tables = {
        "task": {"name": "lwi", "slabs": 2},
        "backbone": {"name": "unetr", "patch": [8, 8, 16]},
        "method": {"name": method},
    }
    made = pretraining({**tables, "train": {"steps": 1, "batch_size": 2}, "controls": [], "rounds": 2, **more})
    return {**made, "selection": {"every": 1}, "path": str(path), "threads": 1, "data": {"volume": {"size": [16] * 3}}}


def labelled(path: Path, backbone: Path | str, **more: Any) -> dict[str, Any]:
    """Return an experiment with labels that takes no step worth the name: what it ends with is what it began with."""
    return {
        "path": str(path),
        "task": "volume-segmentation",
        "method": "fedit",
        "controls": [],
        "rounds": 1,
        "threads": 1,
        "data": {"volume": {"size": [16] * 3}},
        "backbone": {"name": str(backbone)},
        "train": {"steps": 1, "batch_size": 2, "balance": "none", "lr": 1e-30, "weight_decay": 0.0},
        **more,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two hospitals, and the run on their volumes that is done; one cache for the whole module."""
    folder = tmp_path_factory.mktemp("lwi")
    data = hospitals(folder / "data", each=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(folder / "cache"))
        start(data, folder / "pre", small(data), [], quiet=True)
        yield data, folder / "pre"


def test_a_run_makes_a_start_that_a_run_takes(done: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = done
    results = read_json(out / "results.json")
    assert results["task"]["headline"] == "told"
    assert 0 <= results["summary"]["personalised"]["mean"] <= 1
    # Of the round that was chosen: all of the network but the output, and no order heads.
    weights = load_file(out / GENERAL / "model.safetensors")
    state = Run(out).server(results["round"])["shared"]
    expected = {n.removeprefix("net.") for n in state if n.startswith("net.") and "net.out." not in n}
    assert weights.keys() == expected
    assert all(torch.equal(value, state[f"net.{name}"]) for name, value in weights.items())
    # A run with labels begins there at every site, with any seed.
    digest = (out / GENERAL / "README.md").read_text().split("`backbone.sha256`: ")[1].split()[0]
    for seed in (0, 1):
        given = labelled(data, out / GENERAL, seed=seed)
        experiment = validate({**given, "backbone": {**given["backbone"], "sha256": digest}})
        prepared = prepare(experiment, open_data(experiment, tmp_path), lambda event: None)
        for site in ("", "north", "south"):
            first = initial(prepared, site)
            assert first.keys() == {*(f"net.{name}" for name in weights), "head.weight", "head.bias"}
            assert all(torch.equal(first[f"net.{name}"], value) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["fedit", "local", "pooled", "fedadam", "fedprox", "scaffold", "fedper", "ditto", "fedit-ft"],
)
def test_every_method_makes_a_start(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    data, out = hospitals(tmp_path / "data", each=4), tmp_path / "pre"
    start(data, out, small(data, method), ["train.steps=2"], quiet=True)
    own, made = out / "adapters" / "north" / "backbone", out / GENERAL
    assert made.exists() == METHODS[method]().has_general()
    assert own.exists() == (method in ("local", "fedper", "ditto", "fedit-ft"))
    made = made if made.exists() else own
    weights = load_file(made / "model.safetensors")
    if method in ("ditto", "fedit-ft"):  # what all sites share is nobody's own
        state = Run(out).server(read_json(out / "results.json")["round"])["shared"]
        assert all(torch.equal(state[f"net.{n}"], value) for n, value in weights.items())
        mine = load_file(own / "model.safetensors")
        assert not all(torch.equal(mine[n], value) for n, value in weights.items())
    start(data, tmp_path / "run", labelled(data, made), [], quiet=True)
    ended = load_file(tmp_path / "run" / "adapters" / "north" / "head.safetensors")
    for name, value in weights.items():  # its step is too small to change a number
        torch.testing.assert_close(ended[f"net.{name}"], value, rtol=0, atol=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_bytes(done: tuple[Path, Path], tmp_path: Path) -> None:
    data, other = done
    experiment = validate(small(data))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event.get("round") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path, notify=stop)
    assert not (tmp_path / GENERAL).exists()
    run_experiment(experiment, tmp_path)
    one, two = (run / GENERAL / "model.safetensors" for run in (tmp_path, other))
    assert one.read_bytes() == two.read_bytes()


# Refusals


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    backbone, folder = network(), tmp_path / "backbone"
    folder.mkdir()
    for name, content in network_files(backbone.anatomy, backbone.start(torch_generator(0, "w"))).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_gives_its_weights_with_every_seed(pretrained: Path) -> None:
    found = load(pretrained, lora=SPEC, image_size=SIZE, task=LABELS)  # the window is the folder's
    assert found.anatomy.root.window == WINDOW
    one, two = (found.start(torch_generator(seed, "w")) for seed in (0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    first = network().start(torch_generator(0, "w"))
    assert all(torch.equal(one[n], first[n]) for n in one)
    assert found.anatomy.family == "unetr"
    root: Any = network().anatomy.root
    assert first.keys() - one.keys() == {
        n for n in first if n.startswith(("order_heads.", f"net.{output_name(root.net)}"))
    }


def test_another_window_or_task_is_refused(pretrained: Path) -> None:
    with pytest.raises(BackboneError, match="windows of 8 x 8 x 32 voxels") as caught:
        load(pretrained, lora=SPEC, image_size=SIZE, patch=(8, 8, 16), task=LABELS)
    assert caught.value.code == "backbone-image-size"
    with pytest.raises(BackboneError, match="larger than a volume"):
        load(pretrained, lora=SPEC, image_size=(16, 16, 16), task=LABELS)
    with pytest.raises(BackboneError, match="reads volumes"):
        load(pretrained, lora=SPEC, image_size=32)
    with pytest.raises(BackboneError, match="segments volumes"):
        load(pretrained, lora=SPEC, image_size=SIZE, task=make_task({"name": "lwi"}))
    with pytest.raises(BackboneError, match="SHA-256"):
        load(pretrained, lora=SPEC, image_size=SIZE, task=LABELS, sha256="0" * 64)


def damage(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return do


FIRST = "vit.patch_embedding.position_embeddings"


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (damage(lambda t: t.pop(FIRST)), "weights-damaged"),
        (damage(lambda t: t.update(more=torch.zeros(1))), "weights-damaged"),
        (damage(lambda t: t.update({FIRST: t[FIRST][:, :-1]})), "weights-damaged"),
        (damage(lambda t: t.update({FIRST: t[FIRST].double()})), "weights-damaged"),
        (damage(lambda t: t.update({FIRST: t[FIRST] * torch.nan})), "weights-damaged"),
        (lambda f: write_json(f / "config.json", {"network": "unet", "window": list(SIZE)}), "weights-damaged"),
        (lambda f: write_json(f / "config.json", {"network": "vnet", "window": list(WINDOW)}), "backbone-folder"),
        (lambda f: write_json(f / "config.json", {"network": ["unet"], "window": list(WINDOW)}), "backbone-folder"),
        (lambda f: write_json(f / "config.json", {"network": "unetr", "window": [16, True, 32]}), "backbone-folder"),
        (lambda f: write_json(f / "config.json", {"network": "unetr", "window": [4096] * 3}), "backbone-image-size"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "backbone-folder"),
        (lambda f: (f / "model.safetensors").rename(f / "model.pt"), "weights-pickled"),
    ],
)  # fmt: skip
def test_a_folder_of_another_network_or_damaged_is_refused(
    harm: Callable[[Path], object], code: str, pretrained: Path
) -> None:
    harm(pretrained)
    with pytest.raises(BackboneError) as caught:
        load(pretrained, lora=SPEC, image_size=SIZE, task=LABELS)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("task", "where"),
    [
        ({"slabs": 5}, "task"),
        ({"cube": 5}, "task"),
        ({"slabs": 8}, "task.slabs"),
        ({"slabs": 1}, "task"),
        ({"masked": 1.0}, "task"),
        ({"grouping": "released", "axis": 1}, "task.grouping"),
        ({"grouping": "published"}, "task.grouping"),
    ],
)
def test_puzzles_that_cannot_be_cut_are_refused(task: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("unetr", lora=SPEC, image_size=SIZE, patch=WINDOW, task=make_task({"name": "lwi", **task}))
    assert caught.value.where == where


def test_networks_and_methods_that_do_not_go_with_it_are_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="learnt of volumes"):
        load("vit-nano", lora=SPEC, image_size=64, task=make_task({"name": "lwi"}))
    with pytest.raises(BackboneError, match="segments volumes"):
        load("unetr", lora=SPEC, image_size=SIZE, task=make_task({"name": "reconstruction"}))
    with pytest.raises(ConfigError, match="trained whole"):
        validate(labelled(tmp_path, pretrained, method="fedopal"))
    with pytest.raises(ConfigError, match="trained whole"):
        validate(small(tmp_path, "fedopal"))
    data = hospitals(tmp_path / "data", each=1)
    with pytest.raises(ConfigError, match="reads volumes"):
        start(data, tmp_path / "run", labelled(data, pretrained, data={}), [], quiet=True)


def test_defaults_are_those_of_volumes_and_yield() -> None:
    made = pretraining({"task": {"name": "lwi", "axis": 1}, "train": {"lr": 1.0}})
    assert (made["backbone"], made["method"], made["task"]["axis"]) == ({"name": "unetr"}, {"name": "fedit"}, 1)
    assert "views" not in made["train"]
    assert (made["train"]["lr"], made["train"]["batch_size"]) == (1.0, 4)
