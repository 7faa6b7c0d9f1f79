"""Draw heterogeneity.jpg: one generated picture as the scanners and stains of two simulated sites give it.

Run from anywhere: ``python docs/pictures/heterogeneity.py``. The same bytes each time, up to Pillow's version.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from confrere.data import appearance
from confrere.data.synthetic import make_microscopy

SIDE, LEFT, TOP, GAP = 112, 118, 22, 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = [(kind, site) for kind in ("stain", "scanner") for site in ("site a", "site b")]


def shifted(image: np.ndarray, kind: str, site: str, strength: float) -> np.ndarray:
    """Return the picture (1, H, W, 3) as ``site`` gives it."""
    if kind == "stain":
        return appearance.restain(image, appearance.stain_of(strength, 0, site))
    return appearance.scan(image, appearance.scanner_of(strength, 0, site), ["picture"], 0, site)


def main() -> None:
    """Write the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_microscopy(Path(folder) / "data", seed=3, sites=2, images=(30, 30), size=SIDE)
        with Image.open(min(root.glob("*/malignant/*.png"))) as opened:
            picture = np.asarray(opened.convert("RGB"))[None]
    step = SIDE + GAP
    page = Image.new("RGB", (LEFT + step * len(STRENGTHS), TOP + step * len(ROWS)), "white")
    pen = ImageDraw.Draw(page)
    for column, strength in enumerate(STRENGTHS):
        pen.text((LEFT + column * step + 2, 5), f"strength {strength:g}", fill="black")
    for row, (kind, site) in enumerate(ROWS):
        pen.text((4, TOP + row * step + SIDE // 2 - 6), f"{kind}, {site}", fill="black")
        for column, strength in enumerate(STRENGTHS):
            tile = Image.fromarray(shifted(picture, kind, site, strength)[0])
            page.paste(tile, (LEFT + column * step, TOP + row * step))
    page.save(Path(__file__).with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
