"""Several findings an image: a linear head on the pooled vector, a probability for each finding by itself.

Shapes: B images of a batch, N images, K findings. A target is 1 (there), 0 (not there) or -1 (nobody said).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from confrere.metrics.bootstrap import mean_defined
from confrere.metrics.calibration import fit_temperature
from confrere.metrics.findings import auroc, evaluate_findings, of_findings
from confrere.tasks.task import Answers, Objective, Pooled

MOST = 100.0
"""Largest weight of an image that has a finding: a rarer one would drown the rest."""


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Pooled):
    """Multi-label classification; see docs/multi-label.md."""

    name = "multi-label"
    title = "Multi-label classification"
    losses = ("cross-entropy",)
    measures: ClassVar[dict[str, str]] = {
        "auroc": "AUROC, mean over findings",
        "average_precision": "Average precision, mean over findings",
        "f1": "F1 at 0.5, mean over findings",
        "brier": "Brier score, mean over findings",
    }
    target = "labels"
    weighted = True

    def weights(self, targets: np.ndarray, classes: int) -> Tensor:
        """Return how often each finding (K,) is absent for one time it is there, up to ``MOST``; 1 if it never is."""
        there, absent = (targets == 1).sum(0), (targets == 0).sum(0)
        known = np.where((there > 0) & (absent > 0), absent / np.maximum(there, 1), 1.0)
        return torch.from_numpy(np.minimum(known, MOST).astype(np.float32))

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return the mean over images of the mean binary cross-entropy over known findings, in nats.

        With ``weights`` (K,), images that have a finding count so much more for it.
        """

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            known = (targets >= 0).to(logits)
            terms = nn.functional.binary_cross_entropy_with_logits(
                logits, targets.clamp(min=0).to(logits), reduction="none", pos_weight=weights
            )
            return ((terms * known).sum(1) / known.sum(1).clamp(min=1)).mean()

        return loss

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return the calibrated probability of each finding (N, K)."""
        return np.asarray((outputs.double() / temperature).sigmoid())

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return the mean AUROC, 0.5 where it is undefined; and the mean probability of what is true.

        The latter is averaged over the images with and those without a finding, then over findings.
        """
        chances, truth = self.chances(answers.outputs, 1.0), answers.targets.astype(np.int64)
        rows = np.arange(len(truth))
        found = mean_defined(of_findings(auroc, chances, truth, rows, np.ones((1, len(rows)))))[0]
        right = [np.where(truth == v, chances if v else 1 - chances, np.nan).T for v in (0, 1)]
        sure = mean_defined(mean_defined(np.stack([mean_defined(one) for one in right], axis=1)))
        return 0.5 if np.isnan(found) else float(found), 0.5 if np.isnan(sure) else float(sure)

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return metrics with intervals over patients; probabilities, findings and patients stay.

        One temperature for all findings is fitted on validation images; probabilities are calibrated before judged.
        """
        said = known.targets >= 0
        logits = known.outputs.double().numpy()[said] if len(said) else np.zeros(0)
        two = np.stack([np.zeros_like(logits), logits], axis=1)
        temperature = fit_temperature(two, known.targets[said].astype(np.int64) if len(said) else np.zeros(0, np.int64))
        chances, truth = self.chances(asked.outputs, temperature), asked.targets.astype(np.int64)
        some, groups = len(truth) > 0, asked.groups
        metrics = evaluate_findings(chances, truth, groups, classes=classes, generator=generator) if some else None
        predictions = {
            "probabilities": torch.from_numpy(chances),
            "labels": torch.from_numpy(truth),
            "groups": torch.from_numpy(groups.copy()),
        }
        return {"metrics": metrics, "temperature": temperature}, predictions
