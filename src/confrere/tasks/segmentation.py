"""A class for every pixel: a light decoder on the patch tokens.

Shapes: B images, N images, K classes (0 is the background), C channels of the decoder, h and w patches, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from confrere.adapters import head
from confrere.errors import ConfigError
from confrere.metrics.masks import evaluate_masks
from confrere.tasks.task import Answers, Objective, Task
from confrere.tensors import Tensors

CHANNELS, STAGES = 48, 2
SMOOTH = 1.0
"""Pixels added to both sides of a soft Dice, so that an empty class has a gradient."""


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Pixel-wise classification; see docs/segmentation.md."""

    name = "segmentation"
    title = "Segmentation"
    losses = ("dice-cross-entropy", "dice", "cross-entropy")
    measures: ClassVar[dict[str, str]] = {
        "dice": "Dice",
        "iou": "Intersection over union",
        "hd95": "Hausdorff distance, 95 %, in diagonals",
        "box_iou": "Intersection over union of boxes",
    }
    target = "mask"
    dense = True

    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the decoder: D -> C for every patch, twice (double the size, 3 x 3 convolution), C -> K.

        Kaiming's normal weights, zero biases; the last layer starts at zero, so all classes are equally probable.
        """

        def drawn(*shape: int) -> Tensor:
            scale: float = (2 / math.prod(shape[1:])) ** 0.5
            return torch.randn(shape, generator=generator) * scale

        found = {"head.reduce.weight": drawn(CHANNELS, features), "head.reduce.bias": torch.zeros(CHANNELS)}
        for stage in range(STAGES):
            found[f"head.up{stage}.weight"] = drawn(CHANNELS, CHANNELS, 3, 3)
            found[f"head.up{stage}.bias"] = torch.zeros(CHANNELS)
        return found | head.init(outputs, CHANNELS)

    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return scores (B, K, H, W) of patches (B, h, w, D)."""
        given = {name: value.to(features.device) for name, value in params.items() if name.startswith("head.")}
        reduced = nn.functional.linear(features, given["head.reduce.weight"], given["head.reduce.bias"])
        maps = nn.functional.gelu(reduced).permute(0, 3, 1, 2)
        for stage in range(STAGES):
            maps = nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")
            weight, bias = given[f"head.up{stage}.weight"], given[f"head.up{stage}.bias"]
            maps = nn.functional.gelu(nn.functional.conv2d(maps, weight, bias, padding=1))
        scores = nn.functional.conv2d(maps, given[head.WEIGHT][:, :, None, None], given[head.BIAS])
        return nn.functional.interpolate(scores, size=size, mode="bilinear")

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return soft Dice loss, cross-entropy over pixels, or their sum.

        Raises:
            ConfigError: class weights, which this task has not.
        """
        if weights is not None:
            raise ConfigError("pixels have no class weights", where="train.balance", fix='use "sampling" or "none"')
        return {"dice": dice_loss, "cross-entropy": pixel_loss, "dice-cross-entropy": _both}[name]

    def pack(self, outputs: Tensor) -> Tensor:
        """Return probabilities in half precision: scores of a site's images fill gigabytes otherwise."""
        return outputs.softmax(1).half()

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return the mean Dice of the predicted masks over images, and the mean soft Dice."""
        guess, truth = answers.outputs.float(), torch.from_numpy(answers.targets).long()
        hard = nn.functional.one_hot(guess.argmax(1), guess.shape[1]).movedim(-1, 1).float()
        return float(1 - dice_terms(hard, truth).mean()), float(1 - dice_terms(guess, truth).mean())

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return metrics with intervals over patients; every test image's Dice stays at the site."""
        guess = asked.outputs.argmax(1).to(torch.uint8).numpy()
        metrics, dice = evaluate_masks(guess, asked.targets, asked.groups, classes=classes, generator=generator)
        numbers = {"metrics": metrics if len(guess) else None, "temperature": 1.0}
        predictions = {"values": torch.from_numpy(dice), "groups": torch.from_numpy(asked.groups.copy())}
        return numbers, predictions


def dice_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Return the mean over images of 1 - soft Dice, itself a mean over the classes but the background; a scalar.

    Args:
        scores: (B, K, H, W).
        masks: (B, H, W), classes 0..K-1.

    References:
        Milletari et al., "V-Net", 3DV 2016, with unsquared sums; ``SMOOTH`` pixels are added to both.
    """
    return dice_terms(scores.softmax(1), masks.long()).mean()


def pixel_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross-entropy over pixels in nats, a scalar."""
    return nn.functional.cross_entropy(scores, masks.long())


def _both(scores: Tensor, masks: Tensor) -> Tensor:
    return dice_loss(scores, masks) + pixel_loss(scores, masks)


def dice_terms(chances: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - soft Dice of every image or volume and foreground class (B, K - 1); chances (B, K, ...)."""
    truth = nn.functional.one_hot(masks, chances.shape[1]).movedim(-1, 1)[:, 1:].to(chances.dtype)
    found, space = chances[:, 1:], tuple(range(2, chances.ndim))
    both, total = (found * truth).sum(space), (found + truth).sum(space)
    return 1 - (2 * both + SMOOTH) / (total + SMOOTH)
