"""Predict volumes: the labels of every voxel on the file's own grid, as NIfTI, and each class's volume."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from confrere.data.decode import BadImageError
from confrere.data.grid import as_stored, nifti_bytes
from confrere.data.options import Grid
from confrere.data.paths import Root, fit_for_csv
from confrere.data.volume import Volume, prepared, read_volume, restored
from confrere.errors import DataError
from confrere.picture_folders import picture_folders
from confrere.record.files import write_bytes

if TYPE_CHECKING:
    from confrere.predict import Predictor

OUTSIDE = "outside the grid ml"


def predict_volumes(
    predictor: Predictor,
    data: Mapping[str, Any],
    source: Path,
    out: Path,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[int, list[str]]:
    """Write a CSV of millilitres, a row a volume, and beside it a folder with the labels of each, in its order.

    Labels have the axes, shape and affine of the volume's own file. What lies outside the grid was not looked at: it is
    background, and its millilitres stand in a column of their own. A folder of an earlier prediction is replaced.

    Args:
        predictor: a site's model.
        data: the experiment's table ``data``, with the grid.
        source: a NIfTI file, or a folder (searched deep) of them and of folders with a DICOM series each.
        out: CSV.
        note: is told how many volumes the grid cuts, where it does.

    Returns the number of rows and one line per volume that could not be read; such volumes are left out.

    Raises:
        DataError: no volume could be read, or a folder of an earlier prediction holds something else. RunError: it
            cannot be written.
    """
    grid, guard = Grid.model_validate(data["volume"]), Root(source)
    rows, problems, cut = list[list[str]](), list[str](), 0
    files = _volumes(source)
    with picture_folders(out, masks=True, overlays=False) as folders:
        for path in files:
            name = path.absolute().name if path == source else str(path.relative_to(source))
            try:
                if path != source and not guard.holds(path):
                    raise BadImageError("link leading out of the folder")
                volume, labels, outside = _labelled(predictor, path, grid)
            except BadImageError as error:
                problems.append(f"{name}: {error}")
                continue
            content = nifti_bytes(as_stored(labels, volume.stored_affine), volume.stored_affine)
            write_bytes(folders["masks"] / f"{len(rows):04d}.nii.gz", content)
            counts = [*np.bincount(labels.ravel(), minlength=len(predictor.classes))[1:], outside]
            rows.append([fit_for_csv(name), *(f"{n * np.prod(volume.spacing) / 1000:.4f}" for n in counts)])
            cut += outside > 0
        if not rows:
            raise DataError(
                "none of the files is a readable volume",
                where=str(source),
                fix="\n  ".join(problems[:5]),
                code="prediction",
            )
    text = io.StringIO()
    header = ["file", *(f"{name} ml" for name in predictor.classes[1:]), OUTSIDE]
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(out, text.getvalue().encode(errors="surrogateescape"))  # file names need not be UTF-8
    if cut:
        note(f"{cut} of {len(rows)} volumes reach beyond data.volume.size, where all is background: column '{OUTSIDE}'")
    return len(rows), problems


def _labelled(predictor: Predictor, path: Path, grid: Grid) -> tuple[Volume, NDArray[np.uint8], int]:
    """Return a volume, the labels of its voxels, and how many of them lie outside the grid."""
    volume = read_volume(path)
    seen = prepared(volume, grid.spacing, grid.size)[None, ..., None]
    labels = predictor.probabilities(seen)[0].argmax(0).astype(np.uint8)
    return volume, *restored(labels, volume.voxels.shape, volume.spacing, grid.spacing)


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
