"""The final examination of one model at one site: metrics with intervals, calibration, predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from confrere.metrics.calibration import ece, fit_temperature, reliability
from confrere.metrics.classification import evaluate
from confrere.seeds import numpy_generator
from confrere.tokenset import TokenSet


def examine(
    known: Tensor, logits: Tensor, data: TokenSet, seed: int, site: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the numbers that may leave the site, and the predictions that may not.

    ``known`` and ``logits`` (images, K) are of the validation and of the test images. The temperature is fitted on
    validation images; probabilities are calibrated with it before they are judged on test images.
    """
    validation, rows = data.rows("val"), data.rows("test")
    temperature = fit_temperature(known.double().numpy(), data.labels[validation])
    logits = logits.double()
    labels, groups = data.labels[rows], data.groups[rows]
    raw, calibrated = logits.softmax(1).numpy(), (logits / temperature).softmax(1).numpy()
    rng = numpy_generator(seed, "bootstrap", site)
    numbers = {
        "metrics": evaluate(calibrated, labels, groups, classes=data.classes, generator=rng) if len(rows) else None,
        "temperature": temperature,
        "reliability": reliability(calibrated, labels) if len(rows) else [],
        "ece_before": ece(raw, labels) if len(rows) else None,
    }
    predictions = {
        "probabilities": torch.from_numpy(calibrated),
        "labels": torch.from_numpy(labels.copy()),
        "groups": torch.from_numpy(groups.copy()),
    }
    return numbers, predictions
