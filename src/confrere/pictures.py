"""Pictures that predictions are shown in: PNG files, masks in the place of their images, outlines, boxes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

ORANGE = (230, 85, 13)
MADE_HERE = b"tEXtSoftware\0confrere predict"
"""By which a picture is known as ours: near the beginning of the file, before its pixels."""
LEGIBLE = 336  # pixels: small pictures are drawn larger


def png(pixels: np.ndarray) -> bytes:
    """Return a PNG of pixels (H, W, 3), enlarged to be legible, or of a mask (H, W), pixel by pixel; marked as ours."""
    picture = Image.fromarray(pixels)
    scale = max(1, LEGIBLE // pixels.shape[0]) if pixels.ndim == 3 else 1
    buffer, mark = io.BytesIO(), PngInfo()
    mark.add(b"tEXt", MADE_HERE.removeprefix(b"tEXt"))
    larger = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    larger.save(buffer, format="PNG", pnginfo=mark)
    return buffer.getvalue()


def placed(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (h, w) of the centre of an image at the image's ``size``: undoes how images are cut to a model's.

    Outside of what was cut out there is background.
    """
    height, width = size
    scale = min(height / mask.shape[0], width / mask.shape[1])
    inner = (min(height, round(mask.shape[0] * scale)), min(width, round(mask.shape[1] * scale)))
    large = Image.fromarray(mask).resize((inner[1], inner[0]), Image.Resampling.NEAREST)
    out = np.zeros(size, np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    out[top : top + inner[0], left : left + inner[1]] = np.asarray(large)
    return out


def framed(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) beside itself with boxes (M, 4+), in 0..1, drawn on it."""
    marked = Image.fromarray(image)
    pen, (height, width) = ImageDraw.Draw(marked), image.shape[:2]
    for box in boxes:
        low, high = box[:2] * (width, height), box[2:4] * (width, height) - 1
        pen.rectangle([*map(round, low.tolist()), *map(round, np.maximum(low, high).tolist())], outline=ORANGE)
    return np.concatenate([image, np.asarray(marked)], axis=1)


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) beside itself with the outline of a mask (H, W) on it."""
    marked = image.copy()
    edge = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        differs = np.diff(mask, axis=axis) != 0
        edge |= np.pad(differs, [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)])
    marked[edge] = ORANGE
    return np.concatenate([image, marked], axis=1)
