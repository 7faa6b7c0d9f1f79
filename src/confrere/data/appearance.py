"""Simulated scanners and stains: what they do to decoded pixels.

A site's character is drawn once; the strength only scales it, so that a stronger shift is more of the same one.
Images are (B, H, W, 3) uint8. At strength 0 both functions return what they were given, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.seeds import numpy_generator

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Character = Mapping[str, float]

# Absorbances of haematoxylin, eosin and DAB in red, green and blue: Ruifrok and Johnston, "Quantification of
# histochemical staining by color deconvolution", Analyt. Quant. Cytol. Histol. 23 (2001). Rows of unit length.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_NAMES, _PARTS = ("haematoxylin", "eosin", "dab"), ("factor", "offset")
# What strength 1 reaches at most: log gamma, log contrast, blur (sd, share of the height), noise (sd of 0..1).
_SCANNER = {"log_gamma": 0.6, "log_contrast": 0.4, "blur": 0.012, "noise": 0.06}
_SIGNED = ("log_gamma", "log_contrast")
_SCALE, _OFFSET = 0.5, 0.1  # of stains, and absorbance added everywhere


def scanner_of(strength: float, seed: int, site: str) -> Character:
    """Return the scanner of a site: each effect between half and all of what ``strength`` in 0..1 allows."""
    generator = numpy_generator(seed, "shift", "scanner", site)
    drawn = {}
    for name, most in _SCANNER.items():
        size, sign = generator.uniform(0.5, 1.0), 1 - 2 * int(generator.integers(2))
        drawn[name] = float(strength * most * size * (sign if name in _SIGNED else 1))
    return drawn


def stain_of(strength: float, seed: int, site: str) -> Character:
    """Return the stain of a site: the factor and the offset of each of three stains."""
    generator = numpy_generator(seed, "shift", "stain", site)
    size, sign = generator.uniform(0.5, 1.0, (2, 3)), 1 - 2 * generator.integers(2, size=(2, 3))
    scale, offset = size * sign * strength * np.array([[_SCALE], [_OFFSET]])
    factors = {f"{name}_factor": float(1 + value) for name, value in zip(_NAMES, scale, strict=True)}
    return factors | {f"{name}_offset": float(value) for name, value in zip(_NAMES, offset, strict=True)}


def scan(images: Pixels, scanner: Character, keys: Sequence[str], seed: int, site: str) -> Pixels:
    """Return the images as the scanner gives them: blurred, with its contrast about mid-grey, its gamma and its noise.

    Args:
        images: (B, H, W, 3).
        scanner: from :func:`scanner_of`.
        keys: B strings, one an image; an image's noise follows from its own, not from its neighbours.
        seed: of the shifts.
        site: whose scanner.
    """
    from scipy.ndimage import gaussian_filter

    values = images.astype(np.float64) / 255
    if scanner["blur"]:
        sigma = scanner["blur"] * images.shape[1]
        values = gaussian_filter(values, (0, sigma, sigma, 0), mode="nearest")
    values = np.clip(0.5 + (values - 0.5) * np.exp(scanner["log_contrast"]), 0, 1) ** np.exp(scanner["log_gamma"])
    if scanner["noise"]:
        for value, key in zip(values, keys, strict=True):
            generator = numpy_generator(seed, "shift", "scanner", site, key)
            value += scanner["noise"] * generator.standard_normal(value.shape)
    return _bytes(values * 255)


def restain(images: Pixels, stain: Character) -> Pixels:
    """Return the images with their stains scaled and offset in optical density.

    With the density ``D = -ln((I + 1) / 256)`` and stain vectors M (rows), the amounts ``c = D M^-1`` become
    ``c' = a c + b`` and ``I' = 256 exp(-c' M) - 1``: the HED augmentation of Tellez et al. (IEEE Trans. Med. Imaging
    37, 2018), drawn once a site instead of once an image.
    """
    factor, offset = (np.array([stain[f"{name}_{part}"] for name in _NAMES]) for part in _PARTS)
    density: Floats = -np.log((images.astype(np.float64) + 1) / 256)
    amounts = density @ np.linalg.inv(_STAINS)
    return _bytes(256 * np.exp(-(amounts * factor + offset) @ _STAINS) - 1)


def mark(images: Pixels, which: NDArray[np.bool_]) -> Pixels:
    """Return the images with a chequered square in the lower right corner of those in ``which`` (B,): a trigger.

    Its side is a tenth of the height. Gu et al., BadNets (2017).
    """
    if not which.any():
        return images
    marked, side = images.copy(), max(2, images.shape[1] // 10)
    squares = np.indices((side, side)).sum(0) * 2 // side % 2
    marked[which, -side:, -side:] = (255 * squares[..., None]).astype(np.uint8)
    return marked


def _bytes(values: Any) -> Pixels:
    clipped: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return clipped
