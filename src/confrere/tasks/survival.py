"""The time to an event: hazards of the bins of time, DeepHit's probabilities, or Cox's relative hazard.

Shapes: B patients of a batch, N patients, K bins, F features, T times.
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
from confrere.metrics.survival import Curves, evaluate_survival, harrell
from confrere.survival.curves import breslow, cox_curves, edge_survival, equal_edges, interpolate, restricted_mean
from confrere.survival.losses import objective
from confrere.tasks.task import Answers, Objective, Pooled


@dataclass(frozen=True, kw_only=True)
class Survival(Pooled):
    """Survival analysis in equal bins up to a horizon that all sites know before any data were seen.

    Args:
        horizon: > 0, in the unit of ``time``; what happens later counts as censored there.
        bins: K, 2 to 1000.
        curve: ``logistic-hazard``, a hazard for each bin; ``deephit``, a probability for each bin and beyond; or
            ``cox``, one log relative hazard, whose risk sets and whose baseline are those of each site by itself.
        alpha: of DeepHit: 1 is its likelihood alone. sigma: of DeepHit's ranking.

    Cox's baseline (Breslow's) is made of a site's own training and validation patients whenever the site is examined;
    it is neither sent nor kept.
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
    curve: Literal["logistic-hazard", "deephit", "cox"] = "logistic-hazard"
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

    @property
    def how(self) -> str:
        """Return what is constant within a bin: the hazard, or of DeepHit's probabilities the density."""
        return "hazard" if self.curve == "logistic-hazard" else "density"

    @property
    def fitted_on(self) -> tuple[str, ...]:
        """Return the splits of a site that Cox's baseline is made of; the other curves need nothing after training."""
        return ("train", "val") if self.curve == "cox" else ("val",)

    def outputs(self, classes: int) -> int:
        """Return K, or 1 of a Cox model."""
        return 1 if self.curve == "cox" else self.bins

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return the likelihood of the chosen curve, with DeepHit's ranking; Cox's is partial, ties by Efron."""
        loss = objective(self.curve, self.edges, alpha=self.alpha, sigma=self.sigma)
        if self.curve != "cox":  # bins stop at the horizon by themselves
            return loss
        last = self.horizon

        def within(outputs: Tensor, targets: Tensor) -> Tensor:
            times = targets[:, 0]
            return loss(outputs, torch.stack([times.clamp(max=last), targets[:, 1] * (times <= last)], dim=1))

        return within

    def survival(self, outputs: Tensor) -> np.ndarray:
        """Return survival at the edges (N, K + 1), the first column 1; DataError of a Cox model."""
        return edge_survival(self.curve, outputs.double().numpy())

    def risk(self, outputs: Tensor) -> np.ndarray:
        """Return the risk (N,): minus the expected time up to the horizon, or Cox's log relative hazard."""
        if self.curve == "cox":
            return np.asarray(outputs.double().numpy()[:, 0])
        return -restricted_mean(self.survival(outputs), self.edges, how=self.how)

    def curves(self, outputs: Tensor, known: Answers) -> Curves:
        """Return survival (N, T) at any times up to the horizon; ``known`` patients make Cox's baseline."""
        if self.curve == "cox":
            risk = self.risk(outputs)
            baseline = breslow(self.risk(known.outputs), *self.judged(*_times_and_events(known)))
            return lambda at: cox_curves(risk, baseline, at)
        at_edges = self.survival(outputs)
        return lambda at: interpolate(at_edges, self.edges, at, how=self.how)

    def judged(self, times: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return times up to the horizon, and which events came by then: what lies beyond does not count."""
        return np.minimum(times, self.horizon), events & (times <= self.horizon)

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return survival at the ends of the bins (N, K), not calibrated; or Cox's log relative hazards (N, 1)."""
        return outputs.double().numpy() if self.curve == "cox" else self.survival(outputs)[:, 1:]

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return ``survival at T`` for the end of each bin, or ``log relative hazard``."""
        return (
            ("log relative hazard",)
            if self.curve == "cox"
            else tuple(f"survival at {edge:g}" for edge in self.edges[1:])
        )

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return Harrell's concordance, 0.5 without comparable pairs, and ``exp`` of the mean log-likelihood.

        Of Cox's partial likelihood, which depends on how many patients there are, instead the logistic function of what
        an event gains over a model that knows nothing: 0.5 without events.
        """
        times, events = _times_and_events(answers)
        risk, (cut, inside) = self.risk(answers.outputs), self.judged(times, events)
        found = float(harrell(cut, inside, risk, np.ones((1, len(risk))))[0])
        loss_of, outputs = self.objective("likelihood"), answers.outputs.double()
        targets = torch.from_numpy(answers.targets).double()
        loss = float(loss_of(outputs, targets))
        if self.curve == "cox":
            loss = float(np.logaddexp(0.0, loss - float(loss_of(torch.zeros_like(outputs), targets))))
        return 0.5 if np.isnan(found) else found, float(np.exp(-loss))

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return concordances, Brier scores and calibration with intervals; risks and times of patients stay."""
        times, events = _times_and_events(asked)
        if not len(times):
            none = torch.zeros(0)
            return {"metrics": None, "temperature": 1.0}, {"risk": none, "targets": none, "groups": none}
        risk = self.risk(asked.outputs)
        metrics = evaluate_survival(
            times,
            events,
            asked.groups,
            curves=self.curves(asked.outputs, known),
            horizon=self.horizon,
            grid=np.asarray(self.edges[1:]),
            generator=generator,
            risk=risk,
        )
        if self.curve == "cox" and not self.judged(*_times_and_events(known))[1].any():
            metrics["notes"].append("No event was seen in training: there is no baseline, and predicted survival is 1.")
        cut, inside = self.judged(times, events)
        predictions = {
            "risk": torch.from_numpy(risk),
            "targets": torch.from_numpy(np.stack([cut, inside.astype(np.float64)], axis=1)),
            "groups": torch.from_numpy(asked.groups.copy()),
        }
        return {"metrics": metrics, "temperature": 1.0}, predictions


def _times_and_events(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    return answers.targets[:, 0].astype(np.float64), answers.targets[:, 1] > 0
