"""Boxes around lesions: a light head without anchors on the patch tokens.

Every cell of a grid, half a patch wide, says how much it belongs to each class, how far the four sides of its box are
away, and how near it is to the middle. Shapes: B images, N images, K classes (0 is the background), C channels, h and w
cells, M true boxes, D found ones. Boxes are left, top, right, bottom in 0..1 of the image.
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
from confrere.metrics.boxes import OPERATING, evaluate_boxes, f1_of_images, soft_f1
from confrere.tasks.task import Answers, Objective, Task
from confrere.tensors import Tensors

CHANNELS = 48
RADIUS = 1.5
"""In cells: how near to the middle of a box a cell must be to answer for it."""
RARE = 0.01
"""Probability of a class at the start: few cells hold a lesion."""
REACH = 0.2
"""Distance to a side at the start, in images."""
ALPHA, GAMMA = 0.25, 2.0
CANDIDATES, FOUND, LEAST, OVERLAP = 100, 32, 0.05, 0.5
"""Cells looked at, boxes kept, least score of a box, and the IoU from which the weaker of two boxes goes."""
SIDES = 5  # four distances and how near the middle is


@dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """Detection; see docs/boxes.md.

    After Tian et al., FCOS, ICCV 2019. Differences: one grid instead of a pyramid, one tower for classes and sides; the
    cell nearest to a box's middle answers for it however small it is; losses are divided by the cells of an image, not
    of a batch; a score is the square root of class times centredness.
    """

    name = "detection"
    title = "Detection"
    losses = ("focal-giou", "focal-l1")
    measures: ClassVar[dict[str, str]] = {
        "box_f1": "F1 of boxes",
        "ap50": "Average precision at IoU 0.50",
        "ap": "Average precision, mean over IoU 0.50 to 0.95",
        "best_iou": "Intersection over union of the best boxes",
    }
    target = "boxes"
    dense = True

    def outputs(self, classes: int) -> int:
        """Return K - 1 scores, four sides and one centredness."""
        return classes - 1 + SIDES

    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the head: D -> C for every patch, double the size, two 3 x 3 convolutions, C -> K - 1 + 5.

        Kaiming's normal weights; the last layer has zero weights, and biases of rare classes and boxes of middle size.
        """

        def drawn(*shape: int) -> Tensor:
            scale: float = (2 / math.prod(shape[1:])) ** 0.5
            return torch.randn(shape, generator=generator) * scale

        found = {"head.reduce.weight": drawn(CHANNELS, features), "head.reduce.bias": torch.zeros(CHANNELS)}
        for layer in range(2):
            found[f"head.tower{layer}.weight"] = drawn(CHANNELS, CHANNELS, 3, 3)
            found[f"head.tower{layer}.bias"] = torch.zeros(CHANNELS)
        last = head.init(outputs, CHANNELS)
        last[head.BIAS][: outputs - SIDES] = math.log(RARE / (1 - RARE))
        return found | last

    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return raw maps (B, K - 1 + 5, 2 h, 2 w) of patches (B, h, w, D)."""
        given = {name: value.to(features.device) for name, value in params.items() if name.startswith("head.")}
        reduced = nn.functional.linear(features, given["head.reduce.weight"], given["head.reduce.bias"])
        maps = nn.functional.gelu(reduced).permute(0, 3, 1, 2)
        maps = nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")
        for layer in range(2):
            weight, bias = given[f"head.tower{layer}.weight"], given[f"head.tower{layer}.bias"]
            maps = nn.functional.gelu(nn.functional.conv2d(maps, weight, bias, padding=1))
        return nn.functional.conv2d(maps, given[head.WEIGHT][:, :, None, None], given[head.BIAS])

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return focal loss, cross-entropy of centredness, and GIoU or L1 of the boxes.

        Raises:
            ConfigError: class weights, which this task has not.
        """
        if weights is not None:
            raise ConfigError("boxes have no class weights", where="train.balance", fix='use "sampling" or "none"')
        of_boxes = {"focal-giou": lambda a, b: 1 - giou(a, b), "focal-l1": lambda a, b: 4 * (a - b).abs().mean(-1)}[
            name
        ]
        return lambda maps, truth: _loss(maps, truth, of_boxes)

    def pack(self, outputs: Tensor) -> Tensor:
        """Return what was found (B, D, 6): box, score and class, the highest score first; -1 fills up."""
        return decode(outputs)

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return box, score and class (B, 6, D) of raw maps; from a score of 0.5 on, a box counts as found."""
        return heated(decode(outputs).numpy(), temperature).transpose(0, 2, 1)

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return what is said of a box."""
        return ("x0", "y0", "x1", "y1", "score", "class")

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return the mean F1 of images at the score that is best for them, and a smooth F1 of all boxes."""
        found, truth = answers.outputs.double().numpy(), answers.targets.astype(np.float64)
        best = f1_of_images(heated(found, best_temperature(found, truth)), truth)
        return float(best.mean()), soft_f1(found, truth)

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return metrics with intervals over patients; every test image's F1 stays at the site.

        Scores are calibrated on validation images, so that 0.5 is where their F1 is best.
        """
        groups = torch.from_numpy(asked.groups.copy())
        heat = best_temperature(known.outputs.double().numpy(), known.targets) if len(known.targets) else 1.0
        if not len(asked.targets):
            return {"metrics": None, "temperature": heat}, {"values": torch.zeros(0), "groups": groups}
        found = heated(asked.outputs.numpy(), heat)
        metrics, values = evaluate_boxes(
            found, asked.targets.astype(np.float64), asked.groups, classes=classes, generator=generator
        )
        return {"metrics": metrics, "temperature": heat}, {"values": torch.from_numpy(values), "groups": groups}


def heated(found: np.ndarray, temperature: float) -> np.ndarray:
    """Return found boxes (N, D, 6) with their log-scores divided by ``temperature``."""
    out = found.astype(np.float64)
    there = out[..., 5] > 0
    out[..., 4][there] **= 1 / temperature
    return out


def best_temperature(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the temperature that puts at 0.5 the score from which the mean F1 of images is best.

    Of 19 scores, 0.05 to 0.95; of equally good ones the middle. 1 without images.
    """
    if not len(truth):
        return 1.0
    steps = np.arange(1, 20) / 20
    heats = np.log(steps) / math.log(OPERATING)
    values = np.array([f1_of_images(heated(found, heat), truth).mean() for heat in heats])
    best = np.flatnonzero(values >= values.max() - 1e-12)
    return float(heats[best[len(best) // 2]])


def centres(size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the middles (h w, 2) of the cells of a grid, x and y in 0..1, row by row."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in size)
    return torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=1)


def assign(truth: Tensor, size: Sequence[int]) -> Tensor:
    """Return the number of the box (B, h w) that each cell answers for, -1 for none.

    A cell answers for a box if its middle lies in it and within ``RADIUS`` cells of the box's middle, or if it is the
    nearest of all to that; of several boxes for the smallest.

    Args:
        truth: (B, M, 5); boxes of class -1 are none.
        size: (h, w) of the grid.
    """
    points, there = centres(size, truth.device), truth[..., 4] > 0
    low, high = truth[:, None, :, :2], truth[:, None, :, 2:4]
    inside = ((points[:, None] > low) & (points[:, None] < high)).all(-1)
    cells = torch.tensor([size[1], size[0]], device=truth.device)
    away = ((points[:, None] - (low + high) / 2) * cells).abs().amax(-1)
    nearest = torch.zeros_like(inside).scatter_(1, away.argmin(1, keepdim=True), torch.ones_like(inside[:, :1]))
    able = ((inside & (away <= RADIUS)) | nearest) & there[:, None]
    area = (high - low).prod(-1).expand_as(away).masked_fill(~able, math.inf)
    best = area.min(2)
    return torch.where(best.values < math.inf, best.indices, -1)


def giou(one: Tensor, two: Tensor) -> Tensor:
    """Return the generalised IoU (...), in -1..1, of boxes (..., 4); Rezatofighi et al., CVPR 2019."""
    low, high = torch.maximum(one[..., :2], two[..., :2]), torch.minimum(one[..., 2:], two[..., 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (one, two)]
    either = areas[0] + areas[1] - inner
    outer_low, outer_high = torch.minimum(one[..., :2], two[..., :2]), torch.maximum(one[..., 2:], two[..., 2:])
    hull = (outer_high - outer_low).prod(-1)
    return inner / either.clamp(min=1e-9) - (hull - either) / hull.clamp(min=1e-9)


def boxes_of(maps: Tensor) -> Tensor:
    """Return the box (B, h w, 4) of each cell of raw maps (B, K - 1 + 5, h, w), which hold logs of distances."""
    sides = REACH * maps[:, -SIDES:-1].flatten(2).transpose(1, 2).clamp(-8, 2).exp()
    points = centres(maps.shape[2:], maps.device)
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def _loss(maps: Tensor, truth: Tensor, of_boxes: Any) -> Tensor:
    """Return the mean over images of focal loss, box loss and the cross-entropy of centredness.

    Each is a sum over an image's cells (the last two over those that answer for a box) by how many answer.
    """
    truth = truth.to(maps)
    owner = assign(truth, maps.shape[2:])
    mine, number = owner >= 0, (owner >= 0).sum(1).clamp(min=1)
    own = truth.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 5))
    scores = maps[:, :-SIDES].flatten(2).transpose(1, 2)
    wanted = (own[..., 4:] == torch.arange(1, scores.shape[2] + 1, device=maps.device)) & mine[..., None]
    points = centres(maps.shape[2:], maps.device)
    before, after = points - own[..., :2], own[..., 2:4] - points
    short, long = torch.minimum(before, after).clamp(min=0), torch.maximum(before, after).clamp(min=1e-9)
    middle = (short / long).prod(-1).sqrt()
    near = nn.functional.binary_cross_entropy_with_logits(maps[:, -1].flatten(1), middle, reduction="none")
    of_sides = of_boxes(boxes_of(maps), own[..., :4])
    terms: Tensor = _focal(scores, wanted.to(scores)).sum((1, 2)) + ((of_sides + near) * mine).sum(1)
    return (terms / number).mean()


def _focal(scores: Tensor, wanted: Tensor) -> Tensor:
    """Return focal loss (B, cells, K - 1); Lin et al., ICCV 2017."""
    plain = nn.functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    right = torch.where(wanted > 0, scores, -scores).sigmoid()
    return torch.where(wanted > 0, ALPHA, 1 - ALPHA) * (1 - right) ** GAMMA * plain


@torch.no_grad()
def decode(maps: Tensor) -> Tensor:
    """Return found boxes (B, D, 6) of raw maps: box, score, class; overlapping ones of a class once; -1 fills up."""
    chance = maps[:, :-SIDES].flatten(2).sigmoid() * maps[:, -1:].flatten(2).sigmoid()
    score, at = chance.sqrt().flatten(1).topk(min(CANDIDATES, chance[0].numel()), dim=1)
    cells = chance.shape[2]
    boxes = boxes_of(maps).clamp(0, 1).gather(1, (at % cells)[..., None].expand(-1, -1, 4))
    found = torch.cat([boxes, score[..., None], (at // cells + 1)[..., None].to(boxes)], dim=-1)
    kept = suppressed(found) & (score >= LEAST) & ((boxes[..., 2:] - boxes[..., :2]) > 0).all(-1)
    order = kept.int().sort(dim=1, descending=True, stable=True).indices[:, :FOUND, None].expand(-1, -1, 6)
    out = torch.where(kept[..., None], found, -1.0).gather(1, order)
    return nn.functional.pad(out, (0, 0, 0, FOUND - out.shape[1]), value=-1.0)


def suppressed(found: Tensor) -> Tensor:
    """Return which boxes (B, D) of falling score stay: no better one of their class that stays overlaps them."""
    low, high = (torch.stack(ends) for ends in ((found[..., 0], found[..., 1]), (found[..., 2], found[..., 3])))
    inner = torch.minimum(high[..., None], high[..., None, :]) - torch.maximum(low[..., None], low[..., None, :])
    both, area = inner.clamp(min=0).prod(0), (high - low).clamp(min=0).prod(0)
    either = area[..., None] + area[..., None, :] - both
    rival = (both > OVERLAP * either) & (found[..., None, 5] == found[..., None, :, 5])
    keep = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    for i in range(found.shape[1] - 1):
        keep[:, i + 1 :] &= ~(rival[:, i, i + 1 :] & keep[:, i, None])
    return keep
