"""Losses of a time to an event, by name: ``(outputs (B, K) or (B, 1), targets (B, 2)) -> scalar``.

Targets are float: time, then 1 for an event or 0 for a censored patient. Logistic hazard and DeepHit's likelihood are
plain means of terms of one patient each, so a patient's gradient does not depend on its company; they hold under
``torch.func.vmap``, too. DeepHit's ranking and Cox's partial likelihood compare patients of one batch: per-example
gradients do not exist, and over sites they are stratified by site, i.e. no patient is compared with one of another
site. K bins, see :mod:`confrere.survival.curves`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from confrere.errors import ConfigError, nearest
from confrere.survival.curves import check_edges, discretise, log_pmf

Objective = Callable[[Tensor, Tensor], Tensor]
DECOMPOSES = ("logistic-hazard",)
"""Objectives that per-example gradients (differential privacy) can train, besides ``deephit`` with ``alpha`` 1."""
TIES = ("efron", "breslow")


def logistic_hazard(logits_BK: Tensor, targets_B2: Tensor, edges: Sequence[float]) -> Tensor:
    """Return the mean negative log-likelihood of hazards ``h = sigmoid(logit)``, a scalar in nats a patient.

    An event in bin k gives ``-log h_k - sum_{b<k} log(1 - h_b)``; who is censored after k whole bins gives
    ``-sum_{b<k} log(1 - h_b)``, and a bin in which somebody is censored counts for nothing.

    References:
        Gensheimer and Narasimhan, "A scalable discrete-time survival model for neural networks", PeerJ 7 (2019).
    """
    index_B, event_B = discretise(targets_B2, edges)
    bins_K = torch.arange(logits_BK.shape[-1], device=logits_BK.device)
    survived_BK = bins_K < index_B[:, None]
    died_BK = (bins_K == index_B[:, None]) & event_B[:, None]
    gain_BK = survived_BK * logsigmoid(-logits_BK) + died_BK * logsigmoid(logits_BK)
    return -gain_BK.sum(1).mean()


def deephit_likelihood(logits_BK: Tensor, targets_B2: Tensor, edges: Sequence[float]) -> Tensor:
    """Return DeepHit's first loss, the mean of ``-log p_k`` or, where censored after k bins, ``-log sum_{b>=k} p_b``.

    ``p`` is the softmax over K bins and a last one beyond the horizon, whose logit is 0.
    """
    index_B, event_B = discretise(targets_B2, edges)
    log_p = log_pmf(logits_BK)  # (B, K + 1)
    bins = torch.arange(log_p.shape[-1], device=log_p.device)
    wanted = torch.where(event_B[:, None], bins == index_B[:, None], bins >= index_B[:, None])
    return -log_p.masked_fill(~wanted, -torch.inf).logsumexp(1).mean()


def deephit(
    logits_BK: Tensor, targets_B2: Tensor, edges: Sequence[float], *, alpha: float = 0.2, sigma: float = 0.1
) -> Tensor:
    """Return ``alpha likelihood + (1 - alpha) ranking``, a scalar.

    The ranking is the mean over all B^2 ordered pairs of ``exp((F_j(k_i) - F_i(k_i)) / sigma)`` where i has an event
    and j is known to live longer (a later time, or the same one and censored), else 0; F is the probability of an
    event up to the end of the bin of i.

    Args:
        logits_BK: scores of the bins.
        targets_B2: time, event.
        edges: K + 1 of them.
        alpha: 0..1; 1 is the likelihood alone, which is a plain mean over patients.
        sigma: > 0; the smaller, the harder wrong orders count.

    References:
        Lee et al., "DeepHit: A Deep Learning Approach to Survival Analysis with Competing Risks", AAAI 2018, eq. 4.
        The weighing by ``alpha`` and the mean over all pairs are those of Kvamme et al., JMLR 20 (2019).
    """
    likelihood = deephit_likelihood(logits_BK, targets_B2, edges)
    if alpha == 1.0:
        return likelihood
    index_B, event_B = discretise(targets_B2, edges)
    time_B, happened_B = targets_B2[:, 0], targets_B2[:, 1] > 0
    incidence_BK = log_pmf(logits_BK).exp().cumsum(1)
    # Row i, column j: F_j at the bin of i.
    at_BB = incidence_BK[:, index_B.clamp(max=incidence_BK.shape[1] - 1)].T
    longer_BB = (time_B[:, None] < time_B) | ((time_B[:, None] == time_B) & ~happened_B)
    counted_BB = longer_BB & event_B[:, None]
    harm_BB = torch.where(counted_BB, (at_BB - at_BB.diagonal()[:, None]) / sigma, -torch.inf).exp()
    return alpha * likelihood + (1 - alpha) * harm_BB.mean()


def cox(scores_B1: Tensor, targets_B2: Tensor, *, ties: str = "efron") -> Tensor:
    """Return Cox's negative log partial likelihood of this batch, a mean over its events; 0 without any.

    The risk sets are those of the batch, so over several sites the likelihood is stratified by site: each has a
    baseline hazard of its own.

    Args:
        scores_B1: log relative hazards, (B, 1) or (B,).
        targets_B2: time, event.
        ties: ``efron``, or ``breslow`` (every tied event is at risk for all the others).

    References:
        Cox, JRSS B 34 (1972). Breslow, Biometrics 30 (1974). Efron, JASA 72 (1977).
    """
    scores_B = scores_B1.reshape(len(scores_B1))
    time_B, order_B = targets_B2[:, 0].sort(descending=True, stable=True)
    scores_B, event_B = scores_B[order_B], targets_B2[order_B, 1] > 0
    if not bool(event_B.any()):
        return scores_B.sum() * 0.0
    _, tie_B = torch.unique_consecutive(time_B, return_inverse=True)
    last_B = torch.searchsorted(tie_B, tie_B, right=True) - 1  # all of the same time are at risk together
    log_risk_B = scores_B.logcumsumexp(0)[last_B]
    if ties == "efron":
        log_risk_B = log_risk_B + _efron(scores_B, event_B, tie_B, log_risk_B)
    return (log_risk_B - scores_B)[event_B].sum() / event_B.sum()


def _efron(scores_B: Tensor, event_B: Tensor, tie_B: Tensor, log_risk_B: Tensor) -> Tensor:
    """Return ``log(1 - r/m T/D)`` of each event: the r-th of m tied ones, T the hazards of those, D of all at risk."""
    B = len(tie_B)
    deaths = torch.zeros(B, dtype=torch.long, device=tie_B.device).index_add(0, tie_B, event_B.long())
    many_B = deaths[tie_B]
    first = event_B.cumsum(0) - event_B.long()  # events before, over all times
    start = torch.full((B,), B, device=tie_B.device).scatter_reduce(0, tie_B, first, "amin")
    rank_B = first - start[tie_B]
    # A sum over the tied ones relative to D: every exponent is at most 0, whatever the scores.
    share_B = torch.where(event_B, scores_B - log_risk_B, -torch.inf).exp()
    tied = torch.zeros_like(scores_B).index_add(0, tie_B, share_B)
    return torch.log1p(-rank_B.to(scores_B.dtype) / many_B.clamp(min=1) * tied[tie_B].clamp(max=1.0))


def names() -> tuple[str, ...]:
    """Return the names that :func:`objective` knows; the first is the default."""
    return ("logistic-hazard", "deephit", "cox")


def outputs(name: str, edges: Sequence[float]) -> int:
    """Return how many outputs the head of an objective has: one a bin, or a single score."""
    return 1 if name == "cox" else len(edges) - 1


def objective(
    name: str = "logistic-hazard",
    edges: Sequence[float] = (),
    *,
    alpha: float = 0.2,
    sigma: float = 0.1,
    ties: str = "efron",
) -> Objective:
    """Return the loss ``(outputs (B, K) or (B, 1), targets (B, 2)) -> scalar`` of that name.

    Args:
        name: one of :func:`names`.
        edges: of the bins; ``cox`` takes none.
        alpha: of ``deephit``, 0..1.
        sigma: of ``deephit``, > 0.
        ties: of ``cox``, ``efron`` or ``breslow``.

    Raises:
        ConfigError: an unknown name, edges that do not rise from 0, or a value out of range.
    """
    if name not in names():
        what = f"unknown survival objective {name!r}"
        raise ConfigError(what, where="objective", fix=nearest(name, names()), code="unknown-name")
    if ties not in TIES:
        raise ConfigError(f"unknown ties {ties!r}", where="objective", fix=nearest(ties, TIES), code="unknown-name")
    if not (0.0 <= alpha <= 1.0 and 0.0 < sigma < float("inf")):
        what = f"alpha {alpha} or sigma {sigma} is out of range"
        raise ConfigError(what, where="objective deephit", fix="use 0 <= alpha <= 1 and sigma > 0")
    if name == "cox":
        return lambda scores, targets: cox(scores, targets, ties=ties)
    cut = check_edges(edges)
    if name == "deephit":
        return lambda logits, targets: deephit(logits, targets, cut, alpha=alpha, sigma=sigma)
    return lambda logits, targets: logistic_hazard(logits, targets, cut)
