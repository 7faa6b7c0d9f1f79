"""Pictures beside a prediction: all of one prediction, none of an earlier one, nothing that is somebody else's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from confrere import predict, predict_boxes
from confrere.errors import DataError
from confrere.predict import predict_folder

KINDS = ["masks", "boxes", "labels"]


class Model:
    """What stands in for a trained model of 8 x 8 pixels; ``target`` is what it predicts."""

    classes, columns, volumes = ("background", "disc"), ("background", "disc"), None

    def __init__(self, target: str) -> None:
        task = SimpleNamespace(dense=target == "masks", target="label" if target == "labels" else target)
        self.backbone = SimpleNamespace(image_size=(8, 8), task=task, anatomy=SimpleNamespace(accept=None))

    def refuse_overlays(self) -> None:
        pass

    def overlay(self, image: np.ndarray) -> bytes:
        return predict.png(image)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        shape = {"masks": (2, 8, 8), "boxes": (6, 3), "label": (2,)}[self.backbone.task.target]
        return np.full((len(images), *shape), 0.5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((9, 10, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


def predicted(target: str, source: Path, out: Path, patch: pytest.MonkeyPatch, overlays: int = 2) -> Any:
    patch.setattr(predict, "Predictor", lambda run, site: Model(target))
    return predict_folder(Path("run"), "a", source, out, overlays=overlays, batch_size=2)


def lying(folder: Path) -> dict[str, list[str]]:
    return {one.name: sorted(file.name for file in one.iterdir()) for one in folder.iterdir() if one.is_dir()}


@pytest.mark.parametrize("target", KINDS)
def test_a_smaller_prediction_leaves_nothing_of_a_larger_one(
    target: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "found.csv"
    assert predicted(target, images, out, monkeypatch, overlays=3)[0] == 3
    masks = target == "masks"
    assert len(lying(out.parent).get("found_masks", [])) == 3 * masks
    assert len(lying(out.parent)["found_overlays"]) == 3
    (images / "0.png").unlink()
    (images / "1.png").unlink()
    predicted(target, images, out, monkeypatch, overlays=3)
    assert lying(out.parent) == {"found_overlays": ["0000.png"], **({"found_masks": ["0000.png"]} if masks else {})}
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(predict, "png", lambda pixels: (_ for _ in ()).throw(MemoryError))
        patch.setattr(predict_boxes, "png", lambda pixels: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            predicted(target, images, out, monkeypatch)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    predicted(target, images, out, monkeypatch, overlays=0)
    assert lying(out.parent) == ({"found_masks": ["0000.png"]} if masks else {})
    predicted("labels", images, out, monkeypatch, overlays=0)
    assert lying(out.parent) == {}  # no mask beside a table that has none


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("kind", ["another's picture", "notes", "folder", "link", "file in place of the folder"])
def test_what_was_not_predicted_is_never_removed(
    kind: str, target: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "found.csv"
    predicted(target, images, out, monkeypatch)
    folder = out.with_name("found_masks" if target == "masks" else "found_overlays")
    theirs = folder / "0009.png"
    if kind == "another's picture":
        Image.fromarray(np.zeros((9, 10, 3), np.uint8)).save(theirs)
    elif kind == "notes":
        theirs.write_text("notes")
    elif kind == "folder":
        theirs.mkdir()
    elif kind == "link":
        theirs.symlink_to(folder / "0000.png")
    else:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        folder.write_text("notes")
    before = {path: path.is_file() and path.read_bytes() for path in sorted(out.parent.rglob("*"))}
    (images / "0.png").unlink()
    with pytest.raises(DataError, match="not empty") as caught:
        predicted(target, images, out, monkeypatch)
    assert caught.value.code == "not-empty"
    assert {path: path.is_file() and path.read_bytes() for path in sorted(out.parent.rglob("*"))} == before
