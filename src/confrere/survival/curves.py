"""Bins of time, and survival curves from what a network puts out.

Bin b of K is ``(e_b, e_{b+1}]``: an event at an edge belongs to the bin that ends there, and an event at time 0 to the
first. Somebody censored at time c has survived the bins that end at or before c; of the bin that c lies in nothing is
known. All that happens after the horizon is censored there.

Shapes: N patients, K bins, T times. Curves are float64 NumPy arrays, S(0) = 1, never rising, in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confrere.errors import ConfigError, DataError

Floats = NDArray[np.float64]
HOW = ("hazard", "density")
MOST_BINS = 1000


def equal_edges(horizon: float, bins: int) -> tuple[float, ...]:
    """Return ``bins`` equal steps from 0 up to a horizon that all sites agreed on.

    Raises:
        ConfigError: the horizon is not positive and finite, or not 1 to 1000 bins.

    >>> equal_edges(60.0, 4)
    (0.0, 15.0, 30.0, 45.0, 60.0)
    """
    if not (0 < horizon < math.inf and 1 <= bins <= MOST_BINS):
        what = f"no {bins} bins up to {horizon}"
        raise ConfigError(what, where="survival edges", fix=f"use a horizon > 0 and 1 to {MOST_BINS} bins")
    return check_edges([horizon * b / bins for b in range(bins + 1)])


def check_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """Return the edges, which must be finite and rise from 0, at least two of them.

    Raises:
        ConfigError: they do not.
    """
    found = tuple(float(edge) for edge in edges)
    rising = all(low < high for low, high in pairwise(found))
    if not (2 <= len(found) <= MOST_BINS + 1 and found[0] == 0 and rising and all(map(math.isfinite, found))):
        what = f"{len(found)} edges of bins do not rise from 0"
        raise ConfigError(what, where="survival edges", fix="give e.g. 0, 12, 24, 36, known before any data were seen")
    return found


def discretise(targets_B2: Tensor, edges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return bin index (B,) int64 in 0..K and event (B,) bool of times and events.

    With an event, the index is its bin; without one, that many bins were survived. No table is looked up, so that
    ``torch.func.vmap`` can pass through.
    """
    time_B, event_B = targets_B2[:, 0], targets_B2[:, 1] > 0
    ends_K = torch.tensor(edges[1:], dtype=time_B.dtype, device=time_B.device)
    event_B = event_B & (time_B <= ends_K[-1])
    before_B = (ends_K < time_B[:, None]).sum(1)
    return torch.where(event_B, before_B, (ends_K <= time_B[:, None]).sum(1)), event_B


def log_pmf(logits_BK: Tensor) -> Tensor:
    """Return log-probabilities (B, K + 1) of an event in each bin, the last beyond the horizon (its logit is 0)."""
    return torch.cat([logits_BK, torch.zeros_like(logits_BK[:, :1])], dim=1).log_softmax(1)


def edge_survival(name: str, logits_NK: NDArray[Any]) -> Floats:
    """Return survival at the edges (N, K + 1), the first column 1.

    Args:
        name: ``logistic-hazard`` or ``deephit``; for ``cox`` see :func:`cox_curves`.
        logits_NK: what the network put out, finite.

    Raises:
        DataError: another name, another shape, or numbers that are not finite.
    """
    z = np.asarray(logits_NK, dtype=np.float64)
    if name not in ("logistic-hazard", "deephit") or z.ndim != 2 or not z.shape[1] or not np.isfinite(z).all():
        what = f"no survival curves from {name!r} outputs of shape {z.shape}"
        raise DataError(what, where="survival", fix="give finite outputs (N, K) of a model of bins", code="prediction")
    tensor = torch.from_numpy(z)
    if name == "logistic-hazard":
        curve = torch.nn.functional.logsigmoid(-tensor).cumsum(1).exp()
    else:  # from the far end: sums of positive terms lose nothing
        curve = log_pmf(tensor).exp().flip(1).cumsum(1).flip(1)[:, 1:].clamp(max=1.0)
    return np.concatenate([np.ones((len(z), 1)), curve.numpy()], axis=1)


def interpolate(survival_NK1: Floats, edges: Sequence[float], times_T: Floats, *, how: str = "hazard") -> Floats:
    """Return survival (N, T) at any times up to the horizon.

    Args:
        survival_NK1: at the edges, see :func:`edge_survival`.
        edges: K + 1 of them.
        times_T: each in 0..horizon.
        how: within a bin the ``hazard`` is constant (log S is a straight line), or the ``density`` (S is).

    Raises:
        DataError: a time before 0 or after the horizon, where nothing is known.

    References:
        Kvamme and Borgan, "Continuous and discrete-time survival prediction with neural networks", Lifetime Data
        Analysis 27 (2021), section 4.
    """
    _one_of(how)
    at, cut = np.asarray(times_T, dtype=np.float64), np.asarray(edges)
    if not ((at >= 0) & (at <= cut[-1])).all():
        what = "a survival curve was asked for outside of 0 to its horizon"
        raise DataError(what, where="survival", fix=f"ask for times from 0 to {cut[-1]:g}", code="prediction")
    k = np.clip(np.searchsorted(cut, at, side="left") - 1, 0, len(cut) - 2)
    part = (at - cut[k]) / (cut[k + 1] - cut[k])
    left, right = survival_NK1[:, k], survival_NK1[:, k + 1]
    found: Floats = left ** (1 - part) * right**part if how == "hazard" else left + part * (right - left)
    return found


def restricted_mean(survival_NK1: Floats, edges: Sequence[float], *, how: str = "hazard") -> Floats:
    """Return the expected survival time (N,) up to the horizon: the area under each curve, in 0..horizon."""
    _one_of(how)
    width, left, right = np.diff(np.asarray(edges)), survival_NK1[:, :-1], survival_NK1[:, 1:]
    mean = (left + right) / 2
    if how == "hazard":  # the mean of an exponential between both is their logarithmic mean
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(left) - np.log(right)
            exact = (left - right) / logs
        mean = np.where(right <= 0, 0.0, np.where(logs > 1e-6, exact, mean))
    return np.asarray((mean * width).sum(1))


def _one_of(how: str) -> None:
    if how not in HOW:
        what = f"{how!r} is no way to interpolate"
        raise ConfigError(what, where="survival", fix=f"use one of: {', '.join(HOW)}", code="unknown-name")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Breslow's baseline of one site: event times (U,), rising, and the log of the cumulative hazard after each.

    It is made of one site's patients and shows when they died: it stays at the site.
    """

    times: Floats
    log_hazard: Floats


def breslow(scores_N: Floats, times_N: Floats, events_N: Floats) -> Baseline:
    """Return the baseline hazard of one site's own training patients: ``H(t) = sum_{t_i <= t} d_i / sum_{risk} e^s``.

    Args:
        scores_N: log relative hazards.
        times_N: of events or censoring.
        events_N: 1 or 0; without any event H is 0 everywhere.

    References:
        Breslow, "Covariance analysis of censored survival data", Biometrics 30 (1974).
    """
    scores, times, events = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (scores_N, times_N, events_N))
    order = np.argsort(-times, kind="stable")
    log_risk = np.logaddexp.accumulate(scores[order]) if len(order) else scores
    when, counts = np.unique(times[events > 0], return_counts=True)
    at_risk = np.searchsorted(-times[order], -when, side="right") - 1  # the last one with t >= when
    steps = np.log(counts) - log_risk[at_risk]
    return Baseline(times=when, log_hazard=np.logaddexp.accumulate(steps) if len(when) else steps)


def cox_curves(scores_N: Floats, baseline: Baseline, times_T: Floats) -> Floats:
    """Return survival (N, T) of a Cox model: ``exp(-H(t) e^s)``, with steps at the site's event times.

    After the last event the curve stays level: how long it holds there the site's data do not say.
    """
    before = np.searchsorted(baseline.times, np.asarray(times_T, dtype=np.float64), side="right")
    log_hazard = np.concatenate([[-np.inf], baseline.log_hazard])[before]
    with np.errstate(over="ignore"):  # an infinite hazard is a survival of 0
        hazard = np.exp(np.asarray(scores_N, dtype=np.float64).reshape(-1, 1) + log_hazard)
    found: Floats = np.exp(-hazard)
    return found
