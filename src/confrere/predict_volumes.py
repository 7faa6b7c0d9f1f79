"""Predict volumes: the labels of every voxel on the file's own grid, as NIfTI, and each class's volume."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from confrere.data.decode import BadImageError
from confrere.data.grid import nifti_bytes
from confrere.data.options import Grid
from confrere.data.paths import fit_for_csv
from confrere.data.volume import Volume, prepared, read_volume, restored
from confrere.errors import DataError
from confrere.record.files import write_bytes

if TYPE_CHECKING:
    from confrere.predict import Predictor


def predict_volumes(predictor: Predictor, data: Mapping[str, Any], source: Path, out: Path) -> tuple[int, list[str]]:
    """Write a CSV of millilitres, a row a volume, and beside it a folder with the labels of each, in its order.

    Args:
        predictor: a site's model.
        data: the experiment's table ``data``, with the grid.
        source: a NIfTI file, or a folder (searched deep) of them and of folders with a DICOM series each.
        out: CSV.

    Returns the number of rows and one line per volume that could not be read; such volumes are left out.

    Raises:
        DataError: no volume could be read.
    """
    grid = Grid.model_validate(data["volume"])
    rows, problems = list[list[str]](), list[str]()
    for path in _volumes(source):
        name = path.name if path == source else str(path.relative_to(source))
        try:
            volume = read_volume(path)
            seen = prepared(volume, grid.spacing, grid.size)[None, ..., None]
        except BadImageError as error:
            problems.append(f"{name}: {error}")
            continue
        labels = predictor.probabilities(seen)[0].argmax(0).astype(np.uint8)
        whole = restored(labels, volume.voxels.shape, volume.spacing, grid.spacing)
        write_bytes(out.with_name(out.stem + "_masks") / f"{len(rows):04d}.nii.gz", nifti_bytes(whole, volume.affine))
        rows.append([fit_for_csv(name), *_millilitres(whole, volume, len(predictor.classes))])
    if not rows:
        raise DataError(
            "none of the files is a readable volume",
            where=str(source),
            fix="\n  ".join(problems[:5]),
            code="prediction",
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["file", *(f"{c} ml" for c in predictor.classes[1:])], *rows])
    write_bytes(out, text.getvalue().encode(errors="surrogateescape"))  # file names need not be UTF-8
    return len(rows), problems


def _millilitres(labels: np.ndarray, volume: Volume, classes: int) -> list[str]:
    of_voxel = float(np.prod(volume.spacing)) / 1000
    return [f"{count * of_voxel:.4f}" for count in np.bincount(labels.ravel(), minlength=classes)[1:]]


def _volumes(source: Path) -> list[Path]:
    """Return the NIfTI files and folders of slices below a folder, sorted, or what is given itself."""
    if not source.exists():
        raise DataError(
            "no such file or folder", where=str(source), fix="give a folder of volumes", code="no-such-path"
        )
    if source.is_file():
        return [source]
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    whole = {path for path in files if path.name.endswith((".nii", ".nii.gz"))}
    return sorted(whole | {path.parent for path in files if path not in whole})
