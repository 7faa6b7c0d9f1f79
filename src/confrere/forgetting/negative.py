"""NegGrad+: learn on with what is kept, unlearn what is forgotten, in the same step."""

from __future__ import annotations

from torch import Tensor

from confrere.forgetting.frame import Frame, Loss
from confrere.forgetting.way import share, way
from confrere.learner import Learner
from confrere.tensors import Tensors, weighted_mean
from confrere.tokenset import Batch


@way(
    "neggrad",
    title="NegGrad+",
    paper="Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv 2302.09880 (as a baseline)",
)
def negative(frame: Frame, *, rounds: int = 2, beta: float = 0.95) -> Tensors:
    """Minimise ``beta CE(kept) - (1 - beta) CE(forgotten)``.

    A site with patients to forget takes both terms in every step. A site that leaves has nothing to keep: it ascends on
    its images alone, and the server counts it with ``1 - beta`` beside the mean of the others with ``beta``.

    Differences from the paper: rounds of local AdamW steps with clipped gradients instead of one optimiser over all
    data; ``beta`` was not tuned, and how far this forgets depends on it and on ``rounds``.
    """
    share("beta", beta)
    shared = frame.start
    for number in range(1, rounds + 1):
        made = {}
        for site in frame.sites:
            learner = frame.learner(site, number)
            loss = _both(frame, learner, number, beta) if site in frame.gone else None
            made[site] = frame.fit(learner, shared, "neggrad", loss=loss)
        kept = frame.mean(made)
        for site in frame.leaving:
            learner = frame.learner(site, number, forgotten=True)
            away = frame.fit(learner, shared, "neggrad", loss=_away(learner))
            kept = weighted_mean([(beta, kept), (1 - beta, away)])
        shared = kept
        frame.cost.rounds += 1
    return shared


def _away(learner: Learner) -> Loss:
    return lambda leaves, batch: -learner.loss(leaves, batch)


def _both(frame: Frame, learner: Learner, number: int, beta: float) -> Loss:
    steps = learner.settings.steps
    forgotten = frame.forgotten(learner.site, number, steps)

    def loss(leaves: Tensors, batch: Batch) -> Tensor:
        return beta * learner.loss(leaves, batch) - (1 - beta) * learner.loss(leaves, next(forgotten))

    return loss
