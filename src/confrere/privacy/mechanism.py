"""One private step at a site: who is drawn, and the sum of what each of them adds to the gradient, clipped.

A unit is one training image (``record``) or all images of one patient (``patient``). Every step draws each unit by
itself with the same chance (Poisson sampling), clips each unit's gradient over all trained tensors together to norm C,
and releases ``(sum + N(0, (C sigma)^2)) / expected number of units``: also when nobody was drawn.

Shapes: U drawn units, m images of a unit at most, N images.

References:
    Abadi et al., CCS 2016, arXiv 1607.00133 (DP-SGD). Charles et al., 2024, arXiv 2407.07737 (whole users, with a
    bound on the examples of each).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from confrere.privacy.noise import Source
from confrere.tensors import Tensors

Unit = Literal["record", "patient"]
Loss = Callable[[Tensors, Tensor, Tensor], Tensor]
"""``(params, tokens (1, ...), targets (1, ...)) -> scalar``: the loss of one image."""
AT_ONCE = 32
"""Images whose gradients are held at a time."""
SAFE = 1 - 1e-6
"""Clipped gradients are this much shorter than the clip, so that rounding in float32 cannot make them longer."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The noise of a site's local steps.

    Args:
        unit: what one clip stands for. units: how many train at this site, which counts as known.
        rate: chance of a unit to be drawn in a step, in (0, 1].
        sigma: >= 0, noise in units of the clip; 0 is no privacy. clip: C > 0.
        images: at most so many of a patient's images a step, >= 1; of a record there is one.
        noise_seed: 0 draws from the operating system; else from this seed, which takes the noise off again.
        centred: some steps are spent on where features lie, so that the others are spent on how images differ.
    """

    unit: Unit
    units: int
    rate: float
    sigma: float
    clip: float
    images: int = 1
    noise_seed: int = 0
    centred: bool = False

    @property
    def expected(self) -> float:
        """Return the expected number of units a step: the fixed denominator."""
        return self.rate * self.units


def draw(mechanism: Mechanism, rows: np.ndarray, groups: np.ndarray, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a step, row numbers (U, m), and how much each counts, float32 (U, m); U may be 0.

    Args:
        mechanism: says how.
        rows: training rows (N,).
        groups: the patient of each row (N,).
        source: of randomness.

    A patient's images are drawn without replacement and count equally, together one; where a patient has fewer than m,
    the places left hold a copy of the first, which counts nothing.
    """
    if mechanism.unit == "record":
        drawn = rows[source.uniform(len(rows)) < mechanism.rate][:, None]
        return drawn, np.ones(drawn.shape, dtype=np.float32)
    patients = np.unique(groups)
    drawn = patients[source.uniform(len(patients)) < mechanism.rate]
    order = np.argsort(source.uniform(len(rows)), kind="stable")
    most = mechanism.images
    found, counts = np.zeros((len(drawn), most), dtype=rows.dtype), np.zeros((len(drawn), most), dtype=np.float32)
    for place, patient in enumerate(drawn):
        own = rows[order[groups[order] == patient]][:most]
        found[place], found[place, : len(own)] = own[0], own
        counts[place, : len(own)] = 1 / len(own)
    return found, counts


def clipped_sum(
    loss: Loss, fixed: Tensors, trained: Tensors, tokens: Tensor, targets: Tensor, counts: Tensor, clip: float
) -> dict[str, Tensor]:
    """Return the sum over units of their gradients, each clipped to norm ``clip`` over all tensors; float64, by name.

    Args:
        loss: of one image; a unit's is the sum of its images' losses times ``counts``.
        fixed: tensors that stay constant.
        trained: those whose gradients are wanted.
        tokens: (U, m, ...).
        targets: (U, m, ...).
        counts: (U, m).
        clip: > 0.

    A gradient that is not finite counts as zero: to stop there would tell that somebody has one.
    """
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trained.items()}
    moving = {name: value.detach() for name, value in trained.items()}

    def of_unit(given: Tensors, tokens_m: Tensor, targets_m: Tensor, counts_m: Tensor) -> Tensor:
        params = {**fixed, **given}
        parts = [
            counts_m[i] * loss(params, tokens_m[i : i + 1], targets_m[i : i + 1]) for i in range(tokens_m.shape[0])
        ]
        return torch.stack(parts).sum()

    # Fused attention has no batched form. The way round it, of which torch warns, is the fastest of three we timed.
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    size = max(1, AT_ONCE // max(1, tokens.shape[1]))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        each = _gradients(torch.func.grad(of_unit), moving, tokens[part], targets[part], counts[part])
        square = torch.stack([g.double().flatten(1).square().sum(1) for g in each.values()]).sum(0)
        norm = square.sqrt()
        finite = torch.isfinite(norm)
        factor = torch.where(finite, clip / norm.clamp_min(clip) * SAFE, 0.0)
        for name, gradient in each.items():
            sound = gradient if bool(finite.all()) else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
            total[name] += torch.tensordot(factor, sound.double(), 1).cpu()
    return total


def _gradients(of_unit: Callable[..., Tensors], moving: Tensors, *units: Tensor) -> Tensors:
    """Return every unit's gradient, stacked: all at once, or one by one where an operation has no batched form."""
    try:
        return torch.func.vmap(of_unit, in_dims=(None, 0, 0, 0), randomness="same")(moving, *units)
    except RuntimeError:
        found = [of_unit(moving, *one) for one in zip(*units, strict=True)]
        return {name: torch.stack([one[name] for one in found]) for name in moving}


def noisy_mean(total: Tensors, mechanism: Mechanism, source: Source) -> dict[str, Tensor]:
    """Return ``(sum + N(0, (C sigma)^2)) / expected`` as float32; the sum of an empty draw is zero."""
    loud = mechanism.clip * mechanism.sigma
    return {
        name: ((value + loud * source.normal(value.shape)) / mechanism.expected).float()
        for name, value in sorted(total.items())
    }
