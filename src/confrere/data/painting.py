"""One generated field of view: nuclei, cytoplasm and fibres as absorbance maps, then a photograph of them.

Light is absorbed as in a stained slide: ``intensity = white * 10^-(c_h h + c_e e)`` with the absorbance
vectors h and e of the two stains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from confrere.seeds import numpy_generator

Floats = NDArray[np.floating[Any]]
_OVERSAMPLING = 1.5


@dataclass(frozen=True, kw_only=True)
class Morphology:
    """What the cells of a class look like; lengths in pixels of a 112-pixel image.

    Attributes:
        cells: mean number of nuclei in the field.
        radius: mean radius of a nucleus.
        spread: standard deviation of log radius.
        elongation: mean ratio of the axes, >= 1.
        irregular: relative amplitude of the outline's waves.
        dark: mean absorbance of haematoxylin in the nucleus.
        coarse: contrast of the chromatin's grains.
        nucleolus: chance that a nucleus shows one.
        clusters: 0 evenly spaced .. 1 in clumps.
    """

    cells: float
    radius: float
    spread: float
    elongation: float
    irregular: float
    dark: float
    coarse: float
    nucleolus: float
    clusters: float


CLASSES: dict[str, Morphology] = {
    "normal": Morphology(
        cells=34, radius=4.6, spread=0.12, elongation=1.15, irregular=0.04, dark=0.80, coarse=0.15,
        nucleolus=0.10, clusters=0.0,
    ),
    "inflamed": Morphology(
        cells=72, radius=3.3, spread=0.16, elongation=1.08, irregular=0.05, dark=1.10, coarse=0.15,
        nucleolus=0.0, clusters=0.7,
    ),
    "dysplastic": Morphology(
        cells=48, radius=5.2, spread=0.20, elongation=1.65, irregular=0.08, dark=0.95, coarse=0.24,
        nucleolus=0.20, clusters=0.15,
    ),
    "malignant": Morphology(
        cells=42, radius=5.8, spread=0.32, elongation=1.40, irregular=0.13, dark=0.98, coarse=0.34,
        nucleolus=0.55, clusters=0.25,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """How a hospital stains and photographs."""

    haematoxylin: Floats
    eosin: Floats
    strength: tuple[float, float]
    white: Floats
    shading: float
    blur: float
    noise: float
    magnification: float
    mix: Floats


def paint(label: str, laboratory: Laboratory, *, patient: int, number: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Return one field of view, (size, size, 3) uint8."""
    person = numpy_generator(seed, "synthetic", "patient", patient)
    severity = float(np.clip(person.normal(0.57, 0.22), 0.15, 1.0))
    tint = np.exp(person.normal(0, 0.10, size=2))
    large = float(np.exp(person.normal(0, 0.08)))
    field = numpy_generator(seed, "synthetic", "field", patient, number)
    side = round(size * _OVERSAMPLING)
    scale = laboratory.magnification * large * side / 112
    nuclei, cytoplasm = _cells(CLASSES[label], severity, scale, side, field)
    grains = _smooth_noise(side, max(2.0, 1.1 * scale), field)
    cloud = 0.13 * _smooth_noise(side, 9 * scale, field) + 0.06 * _smooth_noise(side, 2 * scale, field)
    tissue = 0.55 + cloud + 0.10 * _fibres(side, scale, field)
    blue = nuclei * (1 + grains * _mixed(CLASSES[label], severity, "coarse")) + 0.05 * tissue
    pink = np.clip(tissue, 0.05, None) * (1 - 0.55 * np.clip(nuclei, 0, 1)) + 0.45 * cytoplasm
    return _photograph(blue * tint[0], pink * tint[1], laboratory, size, field)


def _mixed(shape: Morphology, severity: float, name: str) -> float:
    """Return a property between that of normal tissue (severity 0) and that of the class (1)."""
    own, normal = getattr(shape, name), getattr(CLASSES["normal"], name)
    return float(normal + severity * (own - normal))


def _cells(
    shape: Morphology, severity: float, scale: float, side: int, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return absorbance maps (side, side) of nuclei and of cytoplasm.

    A share of the cells is normal in every class, more of them in mild cases.
    """
    area = (side / scale / 112) ** 2
    count = int(generator.poisson(_mixed(shape, severity, "cells") * area * float(np.exp(generator.normal(0, 0.15)))))
    x, y = _places(count, side, shape.clusters * severity, generator).T
    typical = generator.random(count) < 0.25 + 0.65 * severity

    def each(name: str) -> Floats:
        own, normal = float(getattr(shape, name)), float(getattr(CLASSES["normal"], name))
        return np.where(typical, own, normal)

    radius = each("radius") * scale * np.exp(generator.normal(size=count) * each("spread"))
    angle = generator.uniform(0, np.pi) + generator.normal(0, 0.5, size=count)
    stretch = np.maximum(1.0, each("elongation") + generator.normal(0, 0.15, size=count))
    dark = np.clip(each("dark") + generator.normal(0, 0.15, size=count), 0.3, 1.5)
    spots = generator.random(count) < each("nucleolus")
    bodies = _outlines(x, y, radius * 2.0, stretch**0.5, np.full(count, 0.10), angle, generator)
    outlines = _outlines(x, y, radius, stretch, each("irregular"), angle, generator)
    dx, dy = generator.normal(0, 0.25, size=(2, count)) * radius
    plain = np.ones(count)
    nucleoli = _outlines(x + dx, y + dy, radius * 0.27, plain, 0.05 * plain, angle, generator)
    nuclei, cytoplasm = Image.new("L", (side, side)), Image.new("L", (side, side))
    ink, wash = ImageDraw.Draw(nuclei), ImageDraw.Draw(cytoplasm)
    for i in range(count):
        wash.polygon(bodies[i], fill=int(90 + 40 * dark[i]))
        tone = int(dark[i] * 150)
        # The darker rim is the nuclear membrane; it also keeps touching nuclei apart.
        ink.polygon(outlines[i], fill=int(0.80 * tone), outline=tone, width=max(1, round(0.7 * scale)))
        if spots[i]:
            ink.polygon(nucleoli[i], fill=min(255, tone + 70))
    soft = nuclei.filter(ImageFilter.GaussianBlur(0.3 * scale))
    pale = cytoplasm.filter(ImageFilter.GaussianBlur(1.2 * scale))
    return np.asarray(soft, dtype=np.float32) / 150, np.asarray(pale, dtype=np.float32) / 255


def _places(count: int, side: int, clusters: float, generator: np.random.Generator) -> Floats:
    """Return (count, 2) centres: each the loneliest of a few candidates, or drawn to a clump."""
    placed = np.empty((count, 2))
    centres = generator.uniform(0, side, size=(4, 2))
    for i in range(count):
        candidates = generator.uniform(-0.03 * side, 1.03 * side, size=(6, 2))
        if generator.random() < clusters:
            candidates = centres[generator.integers(4)] + generator.normal(0, 0.13 * side, size=(6, 2))
        if i:
            gaps = np.square(candidates[:, None] - placed[None, :i]).sum(-1).min(1)
            placed[i] = candidates[gaps.argmax()]
        else:
            placed[i] = candidates[0]
    return placed


def _outlines(
    x: Floats,
    y: Floats,
    radius: Floats,
    stretch: Floats,
    waves: Floats,
    angle: Floats,
    generator: np.random.Generator,
) -> list[list[float]]:
    """Return N closed, wavy ellipses of mean radius ``radius``, each as 22 corners ``x0, y0, x1, ...``."""
    turn = np.linspace(0, 2 * np.pi, 22, endpoint=False)
    phase = generator.uniform(0, 2 * np.pi, size=(3, len(x), 1))
    height = generator.normal(size=(3, len(x), 1)) * waves[:, None]
    order = np.arange(2, 5)[:, None, None]
    wavy = radius[:, None] * (1 + (height * np.cos(order * turn + phase)).sum(0))
    root = np.sqrt(stretch)[:, None]
    long, short = wavy * np.cos(turn) * root, wavy * np.sin(turn) / root
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    corners = np.stack([x[:, None] + long * cos - short * sin, y[:, None] + long * sin + short * cos], axis=-1)
    return [row.ravel().tolist() for row in corners]


def _smooth_noise(side: int, grain: float, generator: np.random.Generator) -> Floats:
    """Return (side, side) noise of about unit variance whose spots are ``grain`` pixels wide."""
    coarse = max(2, int(side / grain) + 2)
    small = Image.fromarray(generator.standard_normal((coarse, coarse), dtype=np.float32))
    noise = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return noise * np.float32(1.3)


def _fibres(side: int, scale: float, generator: np.random.Generator) -> Floats:
    """Return wavy parallel bands in -1..1, like connective tissue."""
    half = side // 2
    ys, xs = np.mgrid[0:half, 0:half] * (2 / scale)
    angle = generator.uniform(0, np.pi)
    bend = 1.6 * _smooth_noise(half, 11 * scale, generator)
    bands = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) / 1.7 + bend).astype(np.float32)
    return np.asarray(Image.fromarray(bands).resize((side, side), Image.Resampling.BILINEAR))


def _photograph(
    blue: Floats, pink: Floats, laboratory: Laboratory, size: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return what the hospital's camera sees of two absorbance maps."""
    absorbed = (blue * laboratory.strength[0])[..., None] * laboratory.haematoxylin.astype(np.float32) + (
        pink * laboratory.strength[1]
    )[..., None] * laboratory.eosin.astype(np.float32)
    light = laboratory.white * np.exp(-np.log(10.0) * absorbed)
    image = Image.fromarray((np.clip(light, 0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(laboratory.blur * blue.shape[0] / 112))
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255
    ys, xs = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    corner = generator.normal(0, 0.15, size=2)
    shade = 1 - laboratory.shading * ((xs - 0.6 - corner[0]) ** 2 + (ys - 0.4 - corner[1]) ** 2) / 2
    noisy = small * shade[..., None] + generator.normal(0, laboratory.noise, size=small.shape)
    levels: NDArray[np.uint8] = np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)
    return levels
