"""The backbone for tables: frozen, seeded, of full rank where asked, and carried by the same engine."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from confrere.adapters import lora
from confrere.adapters.algebra import pairs
from confrere.backbones import Backbone, load
from confrere.config import validate
from confrere.errors import BackboneError, DataError
from confrere.job import run_experiment
from confrere.predict import Predictor, predict_folder
from confrere.record.files import read_json
from confrere.seeds import torch_generator


def mlp(slots: tuple[str, ...] = ("general",), numbers: int = 6, **spec: object) -> Backbone:
    options = {"blocks": 4, "dropout": 0.0, **spec}
    return load("mlp", lora=lora.LoraSpec(slots=slots, **options), image_size=(1, numbers))  # type: ignore[arg-type]


def params(backbone: Backbone, rank: int) -> dict[str, torch.Tensor]:
    generator = torch_generator(0, "test")
    shapes = backbone.adapter_shapes({"general": rank})
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def rows(n: int = 5, numbers: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 1, numbers)).astype(np.float32)


def test_every_linear_layer_behind_the_embedding_is_adapted() -> None:
    backbone = mlp()
    assert backbone.layers == tuple(f"blocks.{i}.fc{j}" for i in range(4) for j in (1, 2))
    assert (backbone.depth, backbone.cut, backbone.feature_dim) == (4, 0, 64)


def test_the_weights_never_change() -> None:
    assert mlp().digest == mlp().digest
    assert mlp().digest != mlp(numbers=7).digest
    before = torch.random.get_rng_state()
    mlp()
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_forward_pass_by_hand() -> None:
    backbone, x = mlp(), rows()
    given = params(backbone, 3)
    root = backbone.anatomy.root
    h = torch.nn.functional.linear(torch.from_numpy(x[:, 0]), root.embed.weight, root.embed.bias)
    for i, block in enumerate(root.blocks):
        each = []
        for j in (1, 2):
            a, b = pairs(given, "general")[f"blocks.{i}.fc{j}"]
            each.append(getattr(block, f"fc{j}").base_layer.weight + 2.0 * b @ a)
        inner = torch.nn.functional.gelu(torch.nn.functional.layer_norm(h, (64,)) @ each[0].T)
        h = h + inner @ each[1].T
    expected = torch.nn.functional.layer_norm(h, (64,))
    found = backbone.features(given, backbone.prefix(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_full_rank_reaches_any_weight() -> None:
    """B A = target / scale with A = identity: what a low rank could not hold."""
    backbone = mlp()
    shapes = backbone.adapter_shapes({"general": 64})
    layer = backbone.layers[0]
    target = torch.randn(64, 64, generator=torch_generator(1, "target"))
    weight = backbone.anatomy.root.blocks[0].fc1.base_layer.weight
    a, b = torch.eye(64), (target - weight) / backbone.scale
    assert shapes[lora.tensor_name(layer, "A", "general")] == (64, 64)
    torch.testing.assert_close(weight + backbone.scale * b @ a, target)
    assert int(torch.linalg.matrix_rank(b)) == 64


def test_only_rows_of_its_width_are_taken() -> None:
    backbone = mlp()
    gap = rows()
    gap[0, 0, 0] = np.nan
    for wrong in (rows(numbers=7), rows()[:, 0], gap, np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(BackboneError, match="shape"):
            backbone.prefix(wrong)
    for size in (None, 32, (2, 6)):
        with pytest.raises(BackboneError, match="rows of numbers"):
            load("mlp", lora=lora.LoraSpec(slots=(), blocks=1), image_size=size)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two features whose product tells the class: no linear model does better than chance."""
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("table") / "xor.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "label", "a", "b"])
        for index in range(240):
            a, b = rng.uniform(-1, 1, 2)
            writer.writerow([("north", "south")[index % 2], "same" if a * b > 0 else "other", f"{a:.4f}", f"{b:.4f}"])
    return path


@pytest.fixture(scope="module")
def finished(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlp") / "run"
    values = {"path": str(table), "method": "fedit", "controls": [], "rounds": 6, "threads": 1, "workers": 1}
    train = {"steps": 20, "lr": 3e-3}
    run_experiment(validate({**values, "backbone": {"name": "mlp"}, "adapter": {"rank": 64}, "train": train}), out)
    return out


def test_a_run_on_a_table_learns_what_no_linear_model_can(finished: Path) -> None:
    sites = read_json(finished / "results.json")["sites"]
    assert all(entry["models"]["personalised"]["balanced_accuracy"]["value"] > 0.75 for entry in sites.values())
    assert (finished / "adapters" / "north" / "merged" / "adapter_model.safetensors").exists()


def test_the_export_predicts_rows_and_says_what_it_cannot(finished: Path, table: Path, tmp_path: Path) -> None:
    predictor = Predictor(finished, "north")
    given = np.array([[[1, 1, 0, 0]], [[1, -1, 0, 0]]], dtype=np.float32)  # standardised values, then indicators
    chances = predictor.probabilities(given)
    assert [predictor.classes[int(i)] for i in chances.argmax(1)] == ["same", "other"]
    with pytest.raises(DataError, match="rows of numbers"):
        predict_folder(finished, "north", table, tmp_path / "out.csv")


@pytest.mark.slow
def test_compare_runs_on_a_table(table: Path, tmp_path: Path) -> None:
    choices = ["backbone.name=mlp", "rounds=2", "train.steps=2"]
    command = ["compare", str(table), "--methods", "fedit,local", "--seeds", "0", "--out", str(tmp_path / "c")]
    done = subprocess.run([sys.executable, "-m", "confrere", *command, *choices], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "comparison.html").exists()
