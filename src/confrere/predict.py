"""Predict new images with what a site took home: its merged adapter, its head, its temperature."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from confrere import intake
from confrere.adapters import lora
from confrere.adapters.folder import import_
from confrere.backbones import Backbone, load
from confrere.config import read
from confrere.data.decode import BadImageError, decode, read_picture
from confrere.data.options import DataOptions
from confrere.data.paths import Root, fit_for_csv
from confrere.errors import BackboneError, DataError, RunError
from confrere.export import read_info
from confrere.method import Method, make
from confrere.picture_folders import picture_folders
from confrere.pictures import outlined, placed, png
from confrere.predict_boxes import predict_boxes
from confrere.predict_volumes import predict_volumes
from confrere.record.files import write_bytes
from confrere.tasks import make_task
from confrere.tensors import Tensors


class Predictor:
    """A site's model, loaded from ``RUN/adapters/<site>``."""

    def __init__(self, run: Path, site: str) -> None:
        folder = _below(run / "adapters", site)
        if not (folder / "head.json").exists():
            known = sorted(p.parent.name for p in (run / "adapters").glob("*/head.json"))
            if any((run / "adapters").glob("*/backbone")):
                fix = "give its backbone to `confrere run` (docs/pretraining.md)"
                raise RunError("this run learnt no labels", where=str(run), fix=fix, code="prediction")
            raise RunError(
                f"the run holds no adapters of site {site!r}",
                where=str(run),
                fix=f"use one of: {', '.join(known)}" if known else "finish the run first: confrere resume RUN",
                code="unknown-site",
            )
        self.info = read_info(folder / "head.json")
        self.classes: list[str] = self.info["classes"]
        slots: list[str] = self.info["slots"]
        params: dict[str, torch.Tensor] = {}
        for slot in slots:
            params |= import_(_below(folder, slot), slot=slot, scale=self.info["scale"])
        self.params: Tensors = {**params, **read_head(folder / "head.safetensors")}
        chosen = self.info["method"]
        self.method = make(chosen["name"], {key: value for key, value in chosen.items() if key != "name"})
        experiment = read(run / "experiment.toml")
        given, data = experiment.get("backbone"), experiment.get("data")
        self.volumes = data if isinstance(data, dict) and data.get("volume") else None
        patch = given.get("patch") if isinstance(given, dict) else None
        self.backbone: Backbone = load(
            str(given.get("name", self.info["backbone"]) if isinstance(given, dict) else self.info["backbone"]),
            lora=lora.LoraSpec(
                slots=tuple(slots),
                blocks=self.info["blocks"],
                targets=self.info["targets"],
                scale=self.info["scale"],
                dropout=0.0,
                **self.method.extensions,
            ),
            depth=self.info["depth"],
            image_size=self.info["image_size"],
            patch=tuple(patch) if patch else None,
            pool=self.info["pool"],
            precision=self.info["precision"],
            sha256=self.info["backbone_sha256"],
            task=make_task(self.info["task"]),
        )
        self._try(folder)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of what is predicted: the classes, or times."""
        return self.backbone.task.columns(self.classes)

    def _try(self, folder: Path) -> None:
        """Refuse tensors that do not fit the backbone or the classes: one empty image must get finite scores."""
        size, table = self.backbone.image_size, self.backbone.anatomy.accept is not None
        empty = np.zeros((1, *size) if table else (1, *size, 3), np.float32 if table else np.uint8)
        if self.volumes is not None:
            empty = np.zeros((1, *size, 1), np.float32)
        try:
            found = self.probabilities(empty)
        except BackboneError as error:
            raise RunError(
                error.what, where=str(folder), fix="put the exported files back together", code="prediction"
            ) from error
        except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:  # torch's and the methods' own
            raise _unfit(folder) from error
        if found.shape[:2] != (1, len(self.columns)) or not np.isfinite(found).all():
            raise _unfit(folder)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (B, K), of masks (B, K, H, W), of decoded images (B, H, W, 3) uint8."""
        seen = torch.from_numpy(images) if self.backbone.anatomy.trained else self.backbone.prefix(images)
        with torch.no_grad():
            logits = self.method.scores(self.backbone, self.params, seen).double()
        return self.backbone.task.chances(logits, self.info["temperature"])

    def overlay(self, image: np.ndarray) -> bytes:
        """Return a PNG of one decoded image (H, W, 3) beside where the model looks.

        Raises:
            RunError: the method predicts by more than one pass, and a map of one would show another model.
        """
        self.refuse_overlays()
        with torch.no_grad():
            looks = self.backbone.attention(self.params, self.backbone.prefix(image[None]))[0]
        heat = torch.nn.functional.interpolate(looks[None, None], size=image.shape[:2], mode="bilinear")[0, 0].numpy()
        heat = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-9)
        tint = np.array([230.0, 85.0, 13.0])
        alpha = 0.75 * heat[..., None]
        mixed = (image.mean(-1, keepdims=True) * (1 - alpha) + tint * alpha).clip(0, 255).astype(np.uint8)
        return png(np.concatenate([image, mixed], axis=1))

    def refuse_overlays(self) -> None:
        """Raise RunError unless what predicts is one pass of one model, which a map can show."""
        if not (type(self.method).scores is Method.scores or self.method.additive()):
            raise RunError(
                f"{self.method.name} weighs several passes or adapters for each image: no map shows what it looks at",
                where="overlays",
                fix="predict without --overlay",
                code="prediction",
            )


def _below(folder: Path, name: str) -> Path:
    """Return the folder ``name`` of ``folder``, which no name may leave."""
    try:
        return Root(folder).join(name)
    except ValueError as error:
        raise RunError(
            f"{name!r:.80} names no folder here: {error}", where=str(folder), fix="mend the name", code="run-file"
        ) from error


def _unfit(folder: Path) -> RunError:
    fix = "put the exported files of one run back together"
    return RunError(
        "the tensors do not fit the backbone or the classes", where=str(folder), fix=fix, code="adapter-folder"
    )


def read_head(path: Path) -> Tensors:
    """Return what an exported ``head.safetensors`` holds; RunError if it is missing or damaged."""
    try:
        return intake.load_weights(path, intake.WEIGHTS | intake.NUMBERS)  # a head may hold an index, too
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        fix = "put the exported file back"
        raise RunError(
            f"the head is missing or damaged: {why}", where=str(path), fix=fix, code="adapter-folder"
        ) from error


def image_files(source: Path) -> list[Path]:
    """Return the files of a folder (searched deep, sorted, hidden ones left out), or the one file given."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError("no such file or folder", where=str(source), fix="give a folder of images", code="no-such-path")
    files = [f for f in sorted(source.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    if not files:
        raise DataError(
            "the folder holds no files", where=str(source), fix="give a folder of images", code="prediction"
        )
    return files


def predict_folder(
    run: Path,
    site: str,
    source: Path,
    out: Path,
    *,
    overlays: int = 0,
    batch_size: int = 32,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[int, list[str]]:
    """Write a CSV of calibrated probabilities, one row an image, and overlays of the first images.

    Of a model for masks: a CSV with each class's share of the pixels, and beside it a folder of masks, as large as the
    images; what the model did not see, as it was cut off, is background. An overlay shows the mask's outline. Of a
    model for volumes: see :mod:`confrere.predict_volumes`; for boxes: :mod:`confrere.predict_boxes`. Folders
    of an earlier prediction are replaced.

    ``note`` is told what a reader of the CSV should know. Returns the number of rows and one line per file that could
    not be read; such files are left out.

    Raises:
        DataError: no image could be read, or a folder of pictures holds something else.
        RunError: the site has no adapters, or its method no overlays.
    """
    predictor = Predictor(run, site)
    dense = predictor.backbone.task.dense
    if overlays and not dense:
        predictor.refuse_overlays()
    if predictor.backbone.anatomy.accept is not None:
        raise DataError(
            "the model reads rows of numbers, which `confrere predict` cannot",
            where=str(source),
            fix="in Python: Predictor(run, site).probabilities(standardise(rows, ...)), see docs/tables.md",
            code="prediction",
        )
    if predictor.volumes is not None:
        return predict_volumes(predictor, predictor.volumes, source, out, note=note)
    files = image_files(source)
    height, width = predictor.backbone.image_size
    images, names, sizes, problems = _decode(files, source, (height, width))
    if not images:
        raise DataError(
            "none of the files is a readable image", where=str(source), fix="\n  ".join(problems[:5]), code="prediction"
        )
    if predictor.backbone.task.target == "boxes":
        given = [fit_for_csv(name) for name in names]
        predict_boxes(predictor, images, given, sizes, out, overlays=overlays, batch_size=batch_size)
        return len(images), problems
    with picture_folders(out, masks=dense, overlays=overlays > 0) as folders:
        rows = _predicted(predictor, images, sizes, folders, dense=dense, overlays=overlays, batch_size=batch_size)
    write_bytes(out, _csv(names, rows, predictor.columns, named=predictor.backbone.task.target == "label"))
    return len(images), problems


def _predicted(
    predictor: Predictor,
    images: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    folders: Mapping[str, Path],
    *,
    dense: bool,
    overlays: int,
    batch_size: int,
) -> list[np.ndarray]:
    """Return each image's line of the CSV, and write its pictures."""
    rows: list[np.ndarray] = []
    for start in range(0, len(images), batch_size):
        found = predictor.probabilities(np.stack(images[start : start + batch_size]))
        for i, chances in enumerate(found, start):
            if dense:
                mask = chances.argmax(0).astype(np.uint8)
                write_bytes(folders["masks"] / f"{i:04d}.png", png(placed(mask, sizes[i])))
                chances = np.bincount(mask.ravel(), minlength=len(predictor.classes)) / mask.size
            if i < overlays:
                seen = png(outlined(images[i], mask)) if dense else predictor.overlay(images[i])
                write_bytes(folders["overlays"] / f"{i:04d}.png", seen)
            rows.append(chances)
    return rows


def _decode(
    files: Sequence[Path], root: Path, size: tuple[int, int]
) -> tuple[list[np.ndarray], list[str], list[tuple[int, int]], list[str]]:
    images, names, sizes, problems = [], [], [], []
    limit, guard = DataOptions().max_pixels, Root(root)
    for file in files:
        name = file.name if file == root else str(file.relative_to(root))
        try:
            if file != root and not guard.holds(file):
                raise BadImageError("link leading out of the folder")
            found = decode(read_picture(file, max_pixels=limit), size, max_pixels=limit)
            images.append(found.pixels)
            sizes.append((found.height, found.width))
            names.append(name)
        except BadImageError as error:
            problems.append(f"{name}: {error}")
    return images, names, sizes, problems


def _csv(names: Sequence[str], rows: Sequence[np.ndarray], columns: Sequence[str], *, named: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(["predicted"] if named else []), *columns])
    for name, row in zip(names, rows, strict=True):
        best = [columns[int(row.argmax())]] if named else []
        writer.writerow([fit_for_csv(name), *best, *(f"{p:.6f}" for p in row)])
    return text.getvalue().encode(errors="surrogateescape")  # file names need not be UTF-8
