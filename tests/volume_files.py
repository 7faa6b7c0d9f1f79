"""Hospitals with volumes, and their masks: synthetic."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from confrere.seeds import numpy_generator


def save(path: Path, voxels: np.ndarray, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels.astype(np.float32), np.diag([spacing, spacing, spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def hospitals(folder: Path, each: int = 6) -> Path:
    """Return two sites with a bright ball in each volume, and its mask."""
    for number, site in enumerate(("north", "south")):
        for index in range(each):
            rng = numpy_generator(number, "balls", index)
            centre = rng.uniform(5, 10, 3)
            ball = np.linalg.norm(np.indices((15, 16, 14)).T - centre, axis=3).T < 4
            save(
                folder / site / "images" / f"p{number}{index}__1.nii.gz", 50 + 100 * ball + 10 * rng.random(ball.shape)
            )
            save(folder / site / "masks" / f"p{number}{index}__1.nii.gz", ball)
    return folder
