"""What a hospital takes home predicts what the examination saw, from a folder of images to a CSV."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from confrere.adapters import lora
from confrere.adapters.folder import import_
from confrere.backbones import load
from confrere.config import Experiment, read, validate
from confrere.data.federation import Federation
from confrere.errors import BackboneError, ConfigError, DataError, RunError
from confrere.export import export_adapters
from confrere.job import make_site, open_data, prepare, run_experiment
from confrere.method import Request, make
from confrere.predict import Predictor, image_files, predict_folder
from confrere.record.files import read_json, read_state
from confrere.record.run import Run

CLASSES = ("alpha", "beta", "gamma")
METHODS = ("fedopal", "fedit", "local")


def draw(path: Path, label: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 120, (32, 32, 3), dtype=np.uint8)
    pixels[..., label] += 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "hospitals"
    for s, site in enumerate(("east", "north", "west")):
        for label, name in enumerate(CLASSES):
            for k in range(8):
                draw(root / site / name / f"p{s}{label}{k}__1.png", label, 1000 * s + 100 * label + k)
    return root


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def experiment(hospitals: Path, method: str, **changes: Any) -> Experiment:
    small = {"steps": 4, "batch_size": 6, "lr": 0.02}
    values = {"path": str(hospitals), "method": method, "controls": (), "rounds": 3, "threads": 1, "train": small}
    values |= {"backbone": {"name": "test-vit"}, "adapter": {"blocks": 2, "rank": 4, "scale": 1.5}}
    return validate({**values, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> dict[str, Path]:
    """Return a finished run of each method, and one of FedOPAL with a site held out."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {name: experiment(hospitals, name) for name in METHODS}
    jobs["held out"] = experiment(hospitals, "fedopal", hold_out="west")
    for name, job in jobs.items():
        run_experiment(job, root / name)
    return {name: root / name for name in jobs}


def held(run: Path) -> tuple[Experiment, Federation]:
    job = validate(read(run / "experiment.toml"))
    return job, open_data(job, run)


def test_a_directory_in_use_is_not_taken_for_another_experiment(runs: dict[str, Path], hospitals: Path) -> None:
    before = (runs["fedit"] / "results.json").read_bytes()
    for other in (experiment(hospitals, "fedopal"), experiment(hospitals, "fedit", seed=9)):
        with pytest.raises(RunError, match="experiment changed"):
            run_experiment(other, runs["fedit"])
    torch.set_num_threads(2)
    run_experiment(experiment(hospitals, "fedit"), runs["fedit"])
    assert torch.get_num_threads() == 2, "the caller's threads are given back"
    assert (runs["fedit"] / "results.json").read_bytes() == before


def test_class_weights_for_other_classes_than_those_of_the_data_are_refused(tmp_path: Path, hospitals: Path) -> None:
    train = {"balance": "none", "class_weights": {"benign": 0.5, "malignant": 1.0}}
    with pytest.raises(ConfigError) as caught:
        open_data(experiment(hospitals, "fedit", train=train), tmp_path)
    assert (caught.value.where, caught.value.code) == ("train.class_weights", "classes")


@pytest.mark.parametrize(("fraction", "sites"), [(1.0, 3), (0.5, 2), (0.1, 1)])
def test_pooled_training_takes_the_steps_of_all_asked_sites(
    tmp_path: Path, hospitals: Path, fraction: float, sites: int
) -> None:
    job = experiment(hospitals, "pooled", federation={"fraction": fraction})
    task = prepare(job, open_data(job, tmp_path), lambda event: None)
    assert make_site(task, "pooled", Run(tmp_path)).settings.steps == sites * job.train.steps


def test_every_site_takes_home_the_slots_of_its_method(runs: dict[str, Path]) -> None:
    slots = {"fedopal": ["general", "personal"], "fedit": ["general"], "local": ["personal"]}
    for method in METHODS:
        folder = runs[method] / "adapters"
        assert sorted(p.name for p in folder.iterdir()) == ["east", "north", "west"]
        for site in folder.iterdir():
            assert sorted(p.name for p in site.iterdir() if p.is_dir()) == sorted([*slots[method], "merged"])
            for slot in (*slots[method], "merged"):
                names = sorted(p.name for p in (site / slot).iterdir())
                assert names == ["adapter_config.json", "adapter_model.safetensors"]
            head = read_json(site / "head.json")
            assert head["site"] == site.name
            assert head["classes"] == list(CLASSES)
            assert head["model"] == "personalised"
            assert head["temperature"] > 0
            assert set(load_file(site / "head.safetensors")) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", METHODS)
def test_imported_slots_give_the_logits_of_the_site(runs: dict[str, Path], method: str) -> None:
    """General + personal as exported, and their merger, are the function the site itself computes."""
    run = runs[method]
    job, federation = held(run)
    task = prepare(job, federation, lambda event: None)
    chosen = read_json(run / "results.json")["round"]
    server = Run(run).server(chosen)
    for name in ("east", "north"):
        site = make_site(task, name, Run(run))
        params = site.params(Request(kind="evaluate", round=chosen, state=task.method.broadcast(server, name)))
        tokens = site.data.batch(site.data.rows("test")).tokens
        expected = task.backbone.logits(params, tokens)
        folder = run / "adapters" / name
        head = load_file(folder / "head.safetensors")
        apart: dict[str, torch.Tensor] = {**head}
        for slot in task.method.slots:
            apart |= import_(folder / slot, slot=slot, scale=task.backbone.scale)
        assert apart.keys() == params.keys()
        assert all(torch.equal(apart[n], params[n]) for n in params)
        merged = {**head, **import_(folder / "merged", slot="general", scale=task.backbone.scale)}
        alone = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=2, scale=1.5, dropout=0.0))
        torch.testing.assert_close(alone.logits(merged, tokens), expected, rtol=1e-4, atol=1e-5)
        assert float(expected.std()) > 0.01
        # A slot of its own under another scale is the same function too.
        other = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=2, scale=3.0, dropout=0.0))
        rescaled = {**head, **import_(folder / "merged", slot="general", scale=3.0)}
        torch.testing.assert_close(other.logits(rescaled, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "held out"])
def test_the_predictor_repeats_the_stored_test_probabilities(runs: dict[str, Path], method: str) -> None:
    run = runs[method]
    _, federation = held(run)
    for site in federation.sites:
        predictor = Predictor(run, site.name)
        model = "general" if method == "held out" and site.name == "west" else "personalised"
        assert predictor.info["model"] == model
        state, _ = read_state(run / "sites" / site.name / f"test-{model}.safetensors")
        rows = np.flatnonzero(site.split == 2)
        assert len(rows)
        found = predictor.probabilities(np.asarray(site.images[rows]))
        assert np.allclose(found, state["test"]["probabilities"].numpy(), rtol=1e-4, atol=1e-6)
        assert np.array_equal(state["test"]["labels"].numpy(), site.labels[rows])


def test_a_folder_becomes_a_table_and_bad_files_are_named(
    runs: dict[str, Path], hospitals: Path, tmp_path: Path
) -> None:
    source = tmp_path / "new"
    for k, path in enumerate(sorted((hospitals / "east").rglob("*.png"))[:5]):
        (source / f"d{k % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / f"d{k % 2}" / f"{k}.png")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (source / ".hidden.png").write_bytes(b"")
    count, problems = predict_folder(runs["fedopal"], "east", source, tmp_path / "out.csv", overlays=1, batch_size=2)
    assert count == 5
    assert len(problems) == 1
    assert problems[0].startswith("broken.png: ")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["file"] for r in rows] == ["d0/0.png", "d0/2.png", "d0/4.png", "d1/1.png", "d1/3.png"]
    predictor = Predictor(runs["fedopal"], "east")
    for row in rows:
        chances = [float(row[c]) for c in CLASSES]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == CLASSES[int(np.argmax(chances))]
        with Image.open(source / row["file"]) as image:
            pixels = np.asarray(image)[None]
        assert chances == pytest.approx(predictor.probabilities(pixels)[0].tolist(), abs=1e-5)
    assert [p.name for p in (tmp_path / "out_overlays").iterdir()] == ["0000.png"]
    with Image.open(tmp_path / "out_overlays" / "0000.png") as overlay:
        assert overlay.width == 2 * overlay.height  # the image, and where the model looks


def test_one_file_is_a_source_too(runs: dict[str, Path], hospitals: Path, tmp_path: Path) -> None:
    image = next((hospitals / "east").rglob("*.png"))
    assert predict_folder(runs["fedit"], "east", image, tmp_path / "out.csv") == (1, [])
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith(image.name + ",")


def test_nothing_to_predict_or_nobody_to_predict_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"site 'south'[\s\S]*use one of: east, north, west"):
        Predictor(runs["fedit"], "south")
    with pytest.raises(RunError, match="finish the run first"):
        Predictor(tmp_path, "east")
    with pytest.raises(DataError, match="no such file"):
        image_files(tmp_path / "none")
    with pytest.raises(DataError, match="holds no files"):
        image_files(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"none of the files[\s\S]*notes\.txt"):
        predict_folder(runs["fedit"], "east", tmp_path, tmp_path / "out.csv")


def test_a_damaged_or_exchanged_part_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["fedit"], copy)
    folder = copy / "adapters" / "east"
    weights = folder / "merged" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match="damaged"):
        Predictor(copy, "east")
    weights.write_bytes(whole)
    info = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps({**info, "backbone_sha256": "0" * 64}))
    with pytest.raises(BackboneError):
        Predictor(copy, "east")


def test_a_site_that_was_never_examined_takes_nothing_home(tmp_path: Path) -> None:
    results = {"sites": {"a": {"held_out": True, "models": {}}}, "classes": []}
    export_adapters(tmp_path / "adapters", make("local"), {"shared": {}}, {}, results, 1)
    assert not (tmp_path / "adapters").exists()


def test_running_again_changes_nothing(runs: dict[str, Path]) -> None:
    run = runs["fedopal"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
    job, _ = held(run)
    run_experiment(job, run)
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_in_bf16_predicts_and_shows_where_it_looks(tmp_path: Path, hospitals: Path) -> None:
    run_experiment(experiment(hospitals, "fedopal", engine={"precision": "bf16"}), tmp_path / "run")
    count, left_out = predict_folder(tmp_path / "run", "east", hospitals / "north", tmp_path / "new.csv", overlays=2)
    assert (count, left_out) == (24, [])
    with (tmp_path / "new.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(sum(float(row[name]) for name in CLASSES) == pytest.approx(1, abs=1e-3) for row in rows)
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_the_views_of_a_site_held_out_are_not_computed(tmp_path: Path, hospitals: Path) -> None:
    job = experiment(hospitals, "fedopal", hold_out="west", train={"steps": 1, "views": 4})
    task = prepare(job, open_data(job, tmp_path), lambda event: None)
    assert {name: len(data.views) for name, data in task.data.items()} == {"east": 3, "north": 3, "west": 0}
