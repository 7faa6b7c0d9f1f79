"""A hospital that arrives later: what is drawn, what is mixed, what is chosen, and what is taken home."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from confrere.adapters.algebra import pairs, product
from confrere.commands import onboard as command
from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, DataError, RunError
from confrere.job import run_experiment
from confrere.metrics import score
from confrere.onboard import onboard
from confrere.onboard.candidates import ALONE, SLOT, balanced, mixture, nll, open_run
from confrere.onboard.newcomer import draw, folds, newcomer
from confrere.predict import Predictor, predict_folder
from confrere.record.files import read_json

SITE, STEPS, IMAGES = "dunmore", 4, 12
AS_IS = ["general", "best site", "softmax mixture", "learnt mixture"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_microscopy(tmp_path_factory.mktemp("data") / "h", seed=1, images=(60, 60), size=32)


def trained(hospitals: Path, out: Path, method: str, **changes: Any) -> Path:
    values: dict[str, Any] = {"path": str(hospitals), "method": method, "controls": (), "rounds": 2, "threads": 1}
    values |= {"backbone": {"name": "test-vit"}, "adapter": {"blocks": 2, "rank": 4}}
    values |= {"train": {"steps": 4, "batch_size": 8, "lr": 0.02}}
    run_experiment(validate({**values, **changes}), out)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> Path:
    return trained(hospitals, tmp_path_factory.mktemp("runs") / "held", "fedopal", hold_out=SITE)


@pytest.fixture(scope="module")
def found(run: Path, hospitals: Path) -> dict[str, Any]:
    return onboard(run, hospitals, images=IMAGES, steps=STEPS)


# The draw.


@given(st.integers(2, 20), st.integers(0, 5))
def test_images_are_drawn_evenly_by_patient_and_the_others_test(k: int, seed: int) -> None:
    groups = np.arange(120) // 2
    labels = np.concatenate([np.zeros(8, int), np.ones(40, int), np.full(72, 2)])
    known, test = draw(labels, groups, k, seed, "a")
    assert len(known) == len(set(known.tolist())) == k
    assert not set(groups[known].tolist()) & set(groups[test].tolist())
    assert set(groups.tolist()) == set(groups[known].tolist()) | set(groups[test].tolist())
    counts = Counter(labels[known].tolist())
    assert counts[0] <= 4  # two of its four patients
    assert abs(counts[1] - counts[2]) <= 1
    assert counts[0] == 4 or max(counts.values()) - counts[0] <= 1
    assert set(labels[test].tolist()) == {0, 1, 2}
    again = draw(labels, groups, k, seed, "a")
    assert np.array_equal(again[0], known)


@given(st.integers(2, 20), st.integers(0, 5))
def test_a_patient_is_in_one_fold(k: int, seed: int) -> None:
    groups = np.arange(120) // 2
    labels = groups % 3
    known, _ = draw(labels, groups, k, seed, "a")
    found = folds(labels[known], groups[known])
    assert set(found.tolist()) == set(range(min(4, len(set(groups[known].tolist())))))
    for group in groups[known]:
        assert len(set(found[groups[known] == group].tolist())) == 1


def test_too_many_images_say_how_many_there_are() -> None:
    labels = np.arange(20) % 2
    with pytest.raises(DataError, match=r"(?s)11 images cannot be drawn at a.*use 2 to 10"):
        draw(labels, np.arange(20), 11, 0, "a")
    with pytest.raises(DataError, match="bring more images"):
        draw(np.array([0, 1]), np.arange(2), 2, 0, "a")


# The mixture.


def test_a_mixture_is_the_mean_of_products_and_heads(run: Path) -> None:
    """``sum w B A`` exactly, not ``(sum w B)(sum w A)``, which has products across donors."""
    donors = open_run(run).donors
    weights = torch.tensor([0.5, 0.2, 0.3])
    mixed = mixture(donors, weights)
    for layer, pair in pairs(mixed, SLOT).items():
        each = [product(pairs(params, SLOT)[layer]) for params in donors.values()]
        wanted = sum(w * p for w, p in zip(weights, each, strict=True))
        torch.testing.assert_close(product(pair), wanted)
        a, b = (
            sum(w * pairs(p, SLOT)[layer][i] for w, p in zip(weights, donors.values(), strict=True)) for i in (0, 1)
        )
        assert float((b @ a - wanted).norm()) > 0.05 * float(wanted.norm())
    heads = [params["head.weight"] for params in donors.values()]
    torch.testing.assert_close(mixed["head.weight"], sum(w * h for w, h in zip(weights, heads, strict=True)))


def test_a_mixture_of_one_is_that_one(run: Path) -> None:
    offer = open_run(run)
    name, params = next(iter(offer.donors.items()))
    tokens = offer.backbone.prefix(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    mixed = mixture(offer.donors, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(offer.backbone.logits(mixed, tokens), offer.backbone.logits(params, tokens))
    assert name == "ashford"


# The whole.


def test_a_run_offers_its_sites_and_the_general_model(run: Path, hospitals: Path) -> None:
    """The general one is what the run itself examined at the site it held out."""
    offer = open_run(run)
    assert list(offer.donors) == ["ashford", "brindley", "corvale"]
    held = Predictor(run, SITE)
    files = sorted((hospitals / SITE).rglob("*.png"))[:6]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    tokens = offer.backbone.prefix(images)
    assert offer.general is not None
    chances = (offer.backbone.logits(offer.general, tokens).double() / held.info["temperature"]).softmax(1)
    assert np.allclose(chances.detach().numpy(), held.probabilities(images), rtol=1e-4, atol=1e-6)


def test_every_candidate_is_judged_on_the_same_images(found: dict[str, Any], run: Path) -> None:
    assert list(found["candidates"]) == [*AS_IS, *(f"{name} + head" for name in AS_IS), ALONE]
    assert found["site"] == SITE
    assert sum(found["images"].values()) == IMAGES
    assert found["images"]["dysplastic"] == 0  # the site lacks it
    assert sum(found["images"].values()) + found["test_images"] + found["left_out"] == 60
    for entry in found["candidates"].values():
        assert entry["metrics"]["n"] == found["test_images"]
        value = entry["metrics"]["balanced_accuracy"]
        assert value["low"] <= value["value"] <= value["high"]
    losses = {name: entry["loss"] for name, entry in found["candidates"].items()}
    assert losses[found["chosen"]] == min(losses.values())
    assert "training alone on 12 images" in found["sentence"]
    assert read_json(run / "onboard" / SITE / "onboard.json") == json.loads(json.dumps(found))


def test_what_trains_takes_equal_steps(found: dict[str, Any]) -> None:
    steps = {name: entry["steps"] for name, entry in found["candidates"].items()}
    assert {steps[name] for name in ("general", "best site", "softmax mixture")} == {0}
    rest = set(steps) - {"general", "best site", "softmax mixture"}
    assert {steps[name] for name in rest} == {STEPS}


def test_weights_are_convex_and_prefer_the_lesser_loss(found: dict[str, Any]) -> None:
    for name in ("softmax mixture", "learnt mixture", "learnt mixture + head"):
        weights = found["candidates"][name]["weights"]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
        assert min(weights.values()) >= 0
    soft = found["candidates"]["softmax mixture"]["weights"]
    assert max(soft, key=lambda name: soft[name]) == found["candidates"]["best site"]["site"]
    learnt = found["candidates"]["learnt mixture"]["weights"]
    assert max(learnt.values()) > min(learnt.values())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    found: dict[str, Any], run: Path, hospitals: Path, tmp_path: Path
) -> None:
    again = onboard(run, hospitals, site="Dunmore", images=IMAGES, steps=STEPS, out=tmp_path / "again")
    assert again == found
    first, second = run / "onboard" / SITE, tmp_path / "again"
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / p).read_bytes() == (second / p).read_bytes() for p in files)
    assert onboard(run, hospitals, images=IMAGES, steps=STEPS, seed=1, out=tmp_path / "o") != found


def test_what_is_saved_predicts_as_it_was_judged(
    found: dict[str, Any], run: Path, hospitals: Path, tmp_path: Path
) -> None:
    out = run / "onboard" / SITE
    predictor = Predictor(out, SITE)
    assert predictor.info["chosen"] == found["chosen"]
    new = newcomer(run, open_run(run).experiment, hospitals, "", IMAGES, 0, predictor.info)
    chances = predictor.probabilities(new.site.images[new.test])
    value = found["candidates"][found["chosen"]]["metrics"]["balanced_accuracy"]["value"]
    assert score(chances, new.site.labels[new.test]) == pytest.approx(value)
    count, problems = predict_folder(out, SITE, hospitals / SITE, tmp_path / "p.csv")
    assert (count, problems) == (60, [])
    names = sorted(p.name for p in (out / "adapters" / SITE / SLOT).iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_new_data_elsewhere_and_a_method_without_a_general_model(hospitals: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for site in ("ashford", "brindley"):
        shutil.copytree(hospitals / site, old / site)
    shutil.copytree(hospitals / SITE, new / "late")
    run = trained(old, tmp_path / "run", "local")
    found = onboard(run, new, images=8, steps=2)
    assert found["site"] == "late"
    assert "general" not in found["candidates"]
    assert set(found["candidates"]["softmax mixture"]["weights"]) == {"ashford", "brindley"}
    # Pictures that some model has seen cannot judge it, whatever their site is called.
    shutil.copytree(hospitals / "ashford", tmp_path / "again" / "somewhere")
    with pytest.raises(DataError, match="60 of its images took part in the run"):
        onboard(run, tmp_path / "again", images=8)
    # A class that the run does not know.
    (new / "late" / "normal").rename(new / "late" / "usual")
    with pytest.raises(DataError, match=r"(?s)knows no class 'usual'.*rename it to one of dysplastic"):
        onboard(run, new, images=8)


def test_mistakes_name_the_way_out(run: Path, hospitals: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        onboard(tmp_path, hospitals)
    with pytest.raises(ConfigError, match=r"(?s)'ashford' took part in the run.*use one of: dunmore"):
        onboard(run, hospitals, site="ashford")
    with pytest.raises(ConfigError, match="'nowhere' is no site of the data"):
        onboard(run, hospitals, site="nowhere")
    with pytest.raises(DataError, match=r"(?s)200 images cannot be drawn.*use 2 to"):
        onboard(run, hospitals, images=200)
    with pytest.raises(ConfigError, match="directory of a run"):
        onboard(run, hospitals, images=8, out=run)


def test_a_method_of_more_than_one_adapter_is_refused(run: Path, hospitals: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for file in copy.glob("adapters/*/head.json"):
        file.write_text(json.dumps({**read_json(file), "slots": ["general", "personal"]}))
    with pytest.raises(RunError, match="a model of fedopal is more than one adapter"):
        onboard(copy, hospitals)


def test_the_command_prints_a_table(found: dict[str, Any], run: Path, hospitals: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    options = [str(run), str(hospitals), "--images", str(IMAGES), "--steps", str(STEPS), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == ["model", "loss", "balanced", "accuracy", "AUROC"]
    assert [line.split("  ")[0] for line in lines[1:10]] == list(found["candidates"])
    assert sum("chosen" in line for line in lines[1:10]) == 1
    assert f"Chosen by cross-validated loss on {IMAGES} images" in lines[10]
    assert lines[11] == found["sentence"]


def test_a_balanced_loss_counts_classes_equally() -> None:
    """Losses 1, 1, 1 of one class and 3 of another: (1 + 3) / 2."""
    assert balanced(np.array([1.0, 1.0, 1.0, 3.0]), np.array([0, 0, 0, 1])) == 2.0
    assert nll(torch.zeros(2, 4), np.array([0, 3])) == pytest.approx([np.log(4)] * 2)
