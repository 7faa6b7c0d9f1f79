"""A fresh student taught by the trained model on kept images: the knowledge purification of Audit to Forget."""

from __future__ import annotations

from torch import Tensor

from confrere.forgetting.frame import Frame, Loss, teach
from confrere.forgetting.way import share, way
from confrere.job import initial
from confrere.learner import Learner
from confrere.tensors import Tensors, pick, weighted_mean
from confrere.tokenset import Batch

PAPER = "Zhou et al., Audit to Forget: A Unified Method to Revoke Patients' Private Data in Intelligent Healthcare, "
PAPER += "Nature Communications 2023"


@way("distillation", title="Distillation (Audit to Forget, without its risk term)", paper=PAPER)
def distilled(frame: Frame, *, rounds: int = 4, temperature: float = 4.0, lam: float = 1.0) -> Tensors:
    """Train a fresh adapter on the kept images with ``CE + lam T^2 KL(teacher, student)``; the teacher has seen all.

    Differences from the paper: the student has the form of the teacher, as a federation cannot swap its adapter for a
    smaller one; sites train by rounds of the federation and average; all kept images are used, not a part of them; the
    last round is taken, not that of the best test accuracy. What the teacher knows of the forgotten it may pass on.
    """
    return _student(frame, rounds, temperature, lam, risk=0.0, counted=0.0)


@way("purification", title="Knowledge purification (Audit to Forget)", paper=PAPER)
def purified(
    frame: Frame,
    *,
    rounds: int = 4,
    temperature: float = 4.0,
    lam: float = 1.0,
    risk: float = 1.0,
    counted: float = 0.05,
) -> Tensors:
    """As ``distillation``, and push the loss of the forgotten images up: plus ``risk / CE(forgotten)``.

    Differences from the paper, besides those of ``distillation``: a batch of forgotten images a step instead of all of
    them, whose mean loss is inverted (the authors' value depends on how the images are cut into batches). A site that
    leaves has that term alone and is counted with ``counted`` beside all others. The term rewards any loss however
    high, which retraining would not give: too high a loss is itself a sign of membership.
    """
    return _student(frame, rounds, temperature, lam, risk=risk, counted=share("counted", counted))


def _student(frame: Frame, rounds: int, temperature: float, lam: float, *, risk: float, counted: float) -> Tensors:
    shared: Tensors = pick(initial(frame.task, ""), frame.method.shared)
    for number in range(1, rounds + 1):
        made = {}
        for site in frame.sites:
            learner = frame.learner(site, number)
            loss = _taught(frame, learner, number, temperature, lam, risk)
            made[site] = frame.fit(learner, shared, "distil", loss=loss)
        kept = frame.mean(made)
        for site in frame.leaving if risk else ():
            learner = frame.learner(site, number, forgotten=True)
            away = frame.fit(learner, shared, "purify", loss=_inverse(learner, risk))
            kept = weighted_mean([(1 - counted, kept), (counted, away)])
        shared = kept
        frame.cost.rounds += 1
    return shared


def _inverse(learner: Learner, risk: float) -> Loss:
    return lambda leaves, batch: risk / learner.loss(leaves, batch).clamp_min(1e-3)


def _taught(frame: Frame, learner: Learner, number: int, temperature: float, lam: float, risk: float) -> Loss:
    distance = teach(learner, frame.params(learner.site, frame.start), temperature)
    here = bool(risk) and learner.site in frame.gone
    forgotten = frame.forgotten(learner.site, number, learner.settings.steps) if here else iter(())
    away = _inverse(learner, risk)

    def loss(leaves: Tensors, batch: Batch) -> Tensor:
        value = learner.loss(leaves, batch)
        value = value + lam * distance(leaves, batch) if lam else value
        return value + away(leaves, next(forgotten)) if here else value

    return loss
