"""SCRUB: away from the teacher on what is forgotten, towards it on what is kept, in turns."""

from __future__ import annotations

import math

from torch import Tensor

from confrere.forgetting.frame import Frame, Loss, teach
from confrere.forgetting.way import way
from confrere.learner import Learner
from confrere.tensors import Tensors
from confrere.tokenset import Batch


@way(
    "scrub",
    title="SCRUB",
    paper="Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv 2302.09880",
)
def scrub(
    frame: Frame, *, rounds: int = 3, msteps: int = 1, alpha: float = 0.5, gamma: float = 1.0, temperature: float = 2.0
) -> Tensors:
    """Maximise ``KL(teacher, student)`` on the forgotten, minimise ``gamma CE + alpha KL`` on the kept, in turns.

    The first is one pass over the forgotten images, in the first ``msteps`` rounds only; the second is one round. The
    teacher is the trained model.

    Differences from the paper: a pass over kept images is a round of the federation with as many steps as one of
    training; a fresh AdamW each; no rewinding (SCRUB+R), which needs held-out images of the forgotten classes.
    """
    shared = frame.start
    for number in range(1, rounds + 1):
        if number <= msteps:
            made = {}
            for site in sorted(frame.gone):
                learner = frame.learner(site, number, forgotten=True)
                steps = math.ceil(len(learner.data.labels) / learner.settings.batch_size)
                loss = _away(learner, frame.params(site, frame.start), temperature)
                made[site] = frame.fit(learner, shared, "scrub-max", steps=steps, loss=loss)
            shared = frame.mean(made)
        made = {}
        for site in frame.sites:
            learner = frame.learner(site, number)
            loss = towards(learner, frame.params(site, frame.start), alpha, gamma, temperature)
            made[site] = frame.fit(learner, shared, "scrub-min", loss=loss)
        shared = frame.mean(made)
        frame.cost.rounds += 1
    return shared


def _away(learner: Learner, teacher: Tensors, temperature: float) -> Loss:
    distance = teach(learner, teacher, temperature)
    return lambda leaves, batch: -distance(leaves, batch)


def towards(learner: Learner, teacher: Tensors, alpha: float, gamma: float, temperature: float) -> Loss:
    """Return ``gamma CE + alpha KL(teacher, student)`` of a batch."""
    distance = teach(learner, teacher, temperature)

    def loss(leaves: Tensors, batch: Batch) -> Tensor:
        return gamma * learner.loss(leaves, batch) + alpha * distance(leaves, batch)

    return loss
