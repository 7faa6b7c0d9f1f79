"""The time to an event: hazards of the bins of time, or DeepHit's probabilities, from a linear head.

Shapes: B patients of a batch, N patients, K bins, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from confrere.errors import ConfigError
from confrere.metrics.survival import evaluate_survival, harrell
from confrere.survival.curves import edge_survival, equal_edges, interpolate, restricted_mean
from confrere.survival.losses import objective
from confrere.tasks.task import Answers, Objective, Pooled


@dataclass(frozen=True, kw_only=True)
class Survival(Pooled):
    """Survival analysis in equal bins up to a horizon that all sites know before any data were seen.

    Args:
        horizon: > 0, in the unit of ``time``; what happens later counts as censored there.
        bins: K, 2 to 1000.
        curve: ``logistic-hazard``, a hazard for each bin; or ``deephit``, a probability for each bin and beyond.
        alpha: of DeepHit: 1 is its likelihood alone. sigma: of DeepHit's ranking.
    """

    name = "survival"
    title = "Survival"
    losses = ("likelihood",)
    measures: ClassVar[dict[str, str]] = {
        "harrell": "Concordance (Harrell)",
        "antolini": "Concordance in time (Antolini)",
        "uno": "Concordance (Uno)",
        "auc": "AUC, mean over time",
        "ibs": "Integrated Brier score",
    }
    target = "time"

    horizon: Annotated[float, Field(gt=0, lt=1e30)] = 0.0
    bins: Annotated[int, Field(ge=2, le=1000)] = 12
    curve: Literal["logistic-hazard", "deephit"] = "logistic-hazard"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    sigma: Annotated[float, Field(gt=0, le=10)] = 0.1

    def __post_init__(self) -> None:
        if self.horizon == 0.0:  # the default is not checked
            what, fix = "survival needs a horizon", "set task.horizon to the last time that counts, agreed beforehand"
            raise ConfigError(what, where="task.horizon", fix=fix, code="missing-key")

    @property
    def edges(self) -> tuple[float, ...]:
        """Return the K + 1 ends of the bins."""
        return equal_edges(self.horizon, self.bins)

    def outputs(self, classes: int) -> int:
        """Return K."""
        return self.bins

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return the likelihood of the chosen curve, with DeepHit's ranking."""
        return objective(self.curve, self.edges, alpha=self.alpha, sigma=self.sigma)

    def survival(self, outputs: Tensor) -> np.ndarray:
        """Return survival at the edges (N, K + 1), the first column 1."""
        return edge_survival(self.curve, outputs.double().numpy())

    def judged(self, times: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return times up to the horizon, and which events came by then: what lies beyond does not count."""
        return np.minimum(times, self.horizon), events & (times <= self.horizon)

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return survival at the ends of the bins (N, K); nothing is calibrated after training."""
        return self.survival(outputs)[:, 1:]

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return ``survival at T`` for the end of each bin."""
        return tuple(f"survival at {edge:g}" for edge in self.edges[1:])

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return Harrell's concordance, 0.5 without comparable pairs, and ``exp`` of the mean log-likelihood."""
        times, events = answers.targets[:, 0].astype(np.float64), answers.targets[:, 1] > 0
        risk = -restricted_mean(self.survival(answers.outputs), self.edges)
        cut, inside = self.judged(times, events)
        found = float(harrell(cut, inside, risk, np.ones((1, len(risk))))[0])
        loss = float(self.objective("likelihood")(answers.outputs.double(), torch.from_numpy(answers.targets).double()))
        return 0.5 if np.isnan(found) else found, float(np.exp(-loss))

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return concordances, Brier scores and calibration with intervals; risks and times of patients stay."""
        times, events = asked.targets[:, 0].astype(np.float64), asked.targets[:, 1] > 0
        if not len(times):
            none = torch.zeros(0)
            return {"metrics": None, "temperature": 1.0}, {"risk": none, "targets": none, "groups": none}
        at_edges, edges = self.survival(asked.outputs), self.edges
        how = "hazard" if self.curve == "logistic-hazard" else "density"
        risk = -restricted_mean(at_edges, edges, how=how)
        metrics = evaluate_survival(
            times,
            events,
            asked.groups,
            curves=lambda at: interpolate(at_edges, edges, at, how=how),
            horizon=self.horizon,
            grid=np.asarray(edges[1:]),
            generator=generator,
            risk=risk,
        )
        cut, inside = self.judged(times, events)
        predictions = {
            "risk": torch.from_numpy(risk),
            "targets": torch.from_numpy(np.stack([cut, inside.astype(np.float64)], axis=1)),
            "groups": torch.from_numpy(asked.groups.copy()),
        }
        return {"metrics": metrics, "temperature": 1.0}, predictions
