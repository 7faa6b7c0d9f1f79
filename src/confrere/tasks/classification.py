"""One class an image: a linear head on the pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from confrere.metrics.calibration import ece, fit_temperature, reliability
from confrere.metrics.classification import confidence, evaluate, score
from confrere.objectives import objective
from confrere.tasks.task import Answers, Objective, Pooled


@dataclass(frozen=True, kw_only=True)
class Classification(Pooled):
    """Single-label classification."""

    name = "classification"
    title = "Classification"
    losses = ("cross-entropy", "focal")
    measures: ClassVar[dict[str, str]] = {
        "balanced_accuracy": "Balanced accuracy",
        "auroc": "AUROC",
        "f1": "F1",
        "accuracy": "Accuracy",
        "ece": "Expected calibration error",
    }
    weighted = True

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return the (class-weighted) cross-entropy or focal loss."""
        return objective("weighted-cross-entropy" if weights is not None and name == "cross-entropy" else name, weights)

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return the balanced accuracy, and the mean probability of the true class, averaged over classes."""
        chances = answers.outputs.double().softmax(1).numpy()
        return score(chances, answers.targets), confidence(chances, answers.targets)

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return metrics with intervals and calibration; probabilities, labels and patients stay.

        The temperature is fitted on validation images; probabilities are calibrated with it before they are judged.
        """
        temperature = fit_temperature(known.outputs.double().numpy(), known.targets)
        logits, labels, groups = asked.outputs.double(), asked.targets, asked.groups
        raw, calibrated = logits.softmax(1).numpy(), (logits / temperature).softmax(1).numpy()
        some = len(labels) > 0
        numbers = {
            "metrics": evaluate(calibrated, labels, groups, classes=classes, generator=generator) if some else None,
            "temperature": temperature,
            "reliability": reliability(calibrated, labels) if some else [],
            "ece_before": ece(raw, labels) if some else None,
        }
        predictions = {
            "probabilities": torch.from_numpy(calibrated),
            "labels": torch.from_numpy(labels.copy()),
            "groups": torch.from_numpy(groups.copy()),
        }
        return numbers, predictions
