"""Predict boxes: a line for each in a CSV, in pixels of the image's own file, and pictures with outlines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from confrere.data.boxes import uncut
from confrere.metrics.boxes import OPERATING
from confrere.picture_folders import picture_folders
from confrere.pictures import framed, png
from confrere.record.files import write_bytes

if TYPE_CHECKING:
    from confrere.predict import Predictor


def predict_boxes(
    predictor: Predictor,
    images: Sequence[np.ndarray],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    out: Path,
    *,
    overlays: int = 0,
    batch_size: int = 32,
) -> None:
    """Write a CSV with a line a box, an image's best first; an image without any has a line with its name alone.

    Args:
        predictor: a site's model.
        images: decoded, each (H, W, 3).
        names: of their files, fit for a CSV.
        sizes: (height, width) of each file.
        out: CSV.
        overlays: so many first images are drawn with the boxes of score 0.5 or more.
        batch_size: images at once.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "score", "x0", "y0", "x1", "y1"])
    with picture_folders(out, masks=False, overlays=overlays > 0) as folders:
        for start in range(0, len(images), batch_size):
            found = predictor.probabilities(np.stack(images[start : start + batch_size]))
            for i, one in enumerate(found, start):
                boxes, image = one.T[one[5] > 0], images[i]
                if i < overlays:
                    seen = png(framed(image, boxes[boxes[:, 4] >= OPERATING]))
                    write_bytes(folders["overlays"] / f"{i:04d}.png", seen)
                lines = [
                    [predictor.classes[int(box[5])], f"{box[4]:.6f}", *(f"{side:.1f}" for side in box[:4])]
                    for box in uncut(boxes, sizes[i], (image.shape[0], image.shape[1]))
                ]
                writer.writerows([names[i], *line] for line in lines or [[""] * 6])
    write_bytes(out, text.getvalue().encode(errors="surrogateescape"))
