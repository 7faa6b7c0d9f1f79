"""How far a model is from never having seen the forgotten: beside models that never have, and how far those differ.

Training again without the forgotten gives another model with every seed. So a way to forget is judged by its distance
to several of them, and that distance by how far they are from each other. What matters is being like them: a model that
does worse on the forgotten than they do has not forgotten better, it has been marked.

Shapes: N images, K classes, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confrere.adapters import head
from confrere.adapters.algebra import inner, pairs
from confrere.backbones import Backbone
from confrere.forgetting.attack import Side, Sureness, attacked, each_left_out, sureness
from confrere.learner import predict
from confrere.metrics import score
from confrere.metrics.bootstrap import draw, percentile, reach
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors
from confrere.tokenset import TokenSet

Floats = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The images a model is judged on.

    Attributes:
        kept: site -> its data, of which the test images are asked.
        gone: site -> forgotten training images. unseen: site -> its test images, which nobody trained on.
    """

    kept: Mapping[str, TokenSet]
    gone: Mapping[str, TokenSet]
    unseen: Mapping[str, tuple[TokenSet, NDArray[np.int64]]]
    backbone_of: Callable[[str], Backbone]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model says: probabilities (N, K) of test and of forgotten images, its score, its weights.

    ``auc``: by loss, of forgotten against unseen, by patient, with resamples; ``loss``: mean over forgotten images;
    ``sure``: of forgotten and unseen images, for the attack that compares with the retrained.
    """

    test: Floats
    gone: Floats
    score: float
    loss: float
    accuracy: float
    auc: float
    resampled: Floats
    patients: int
    sure: Sureness
    weights: Mapping[str, Tensors]


def answer(asked: Asked, model: Callable[[str], Tensors]) -> Answer:
    """Return what a model, given as site -> tensors, says of all images."""
    parts, scores = [], []
    for site, data in asked.kept.items():
        rows = data.rows("test")
        parts.append(_chances(_logits(asked, site, model, data, rows)))
        if len(rows):
            scores.append(score(parts[-1], data.labels[rows]))
    sides = _all(asked, model, {s: (d, np.arange(len(d.labels))) for s, d in asked.gone.items()})
    beside = _all(asked, model, asked.unseen)
    gone, labels, groups = _chances(sides[0]), *sides[1:]
    unseen, other, strangers = _chances(beside[0]), *beside[1:]
    lost = -np.log(np.clip(gone[np.arange(len(labels)), labels], 1e-12, 1))
    fresh = -np.log(np.clip(unseen[np.arange(len(other)), other], 1e-12, 1))
    value, resampled, patients = membership(lost, groups, fresh, strangers, asked.seed)
    return Answer(
        test=np.concatenate(parts),
        gone=gone,
        score=float(np.mean(scores)),
        loss=float(lost.mean()),
        accuracy=float((gone.argmax(1) == labels).mean()),
        auc=value,
        resampled=resampled,
        patients=patients,
        sure=sureness(sides, beside),
        weights={site: model(site) for site in asked.kept},
    )


def _all(asked: Asked, model: Callable[[str], Tensors], sets: Mapping[str, tuple[TokenSet, NDArray[np.int64]]]) -> Side:
    """Return logits, labels and patients of the rows of several sites."""
    found = [(_logits(asked, s, model, d, rows), d.labels[rows], d.groups[rows]) for s, (d, rows) in sets.items()]
    logits, labels, groups = zip(*found, strict=True)
    return torch.cat(logits), np.concatenate(labels), np.concatenate(groups)


def _logits(
    asked: Asked, site: str, model: Callable[[str], Tensors], data: TokenSet, rows: NDArray[np.int64]
) -> Tensor:
    return predict(asked.backbone_of(site), model(site), data, rows).double()


def _chances(logits: Tensor) -> Floats:
    return np.asarray(logits.softmax(1))


def membership(
    member_N: Floats, groups_N: NDArray[np.int64], stranger_N: Floats, others_N: NDArray[np.int64], seed: int
) -> tuple[float, Floats, int]:
    """Return the chance that a forgotten patient's mean loss is below an unseen one's, resamples of it, and patients.

    0.5: the loss tells nothing. Patients are resampled on both sides; the number is that of the smaller side.
    """
    ours, theirs = _by_patient(member_N, groups_N), _by_patient(stranger_N, others_N)
    wins = (ours[:, None] < theirs[None]) + 0.5 * (ours[:, None] == theirs[None])
    left = draw(len(ours), numpy_generator(seed, "forgetting", "members"), RESAMPLES)
    right = draw(len(theirs), numpy_generator(seed, "forgetting", "strangers"), RESAMPLES)
    found = ((left @ wins) * right).sum(1) / (len(ours) * len(theirs))
    return float(found[0]), found[1:], min(len(ours), len(theirs))


def _by_patient(values_N: Floats, groups_N: NDArray[np.int64]) -> Floats:
    _, at = np.unique(groups_N, return_inverse=True)
    return np.asarray(np.bincount(at, weights=values_N) / np.bincount(at))


def distances(one: Answer, other: Answer, slots: Sequence[str]) -> dict[str, float]:
    """Return how far two models are from each other.

    ``test`` and ``forgotten``: mean total variation between their probabilities, 0..1. ``weights``: of the
    sums of adapter products ``B A`` of all layers and the head's weights, as one vector: ``||x - y||`` over
    ``sqrt(||x|| ||y||)``, mean over sites.
    """
    return {
        "test": float(0.5 * np.abs(one.test - other.test).sum(1).mean()),
        "forgotten": float(0.5 * np.abs(one.gone - other.gone).sum(1).mean()),
        "weights": float(np.mean([_apart(one.weights[s], other.weights[s], slots) for s in one.weights])),
    }


def _apart(left: Tensors, right: Tensors, slots: Sequence[str]) -> float:
    of = [[pairs(params, slot) for slot in slots] for params in (left, right)]

    def between(x: int, y: int) -> float:
        both = [(a[layer], b[layer]) for a in of[x] for b in of[y] for layer in a if layer in b]
        heads = [params[head.WEIGHT].double() for params in (left, right)]
        return sum((float(inner(a, b)) for a, b in both), float((heads[x] * heads[y]).sum()))

    xx, yy, xy = between(0, 0), between(1, 1), between(0, 1)
    size = (max(xx, 0.0) * max(yy, 0.0)) ** 0.25
    return float(max(xx + yy - 2 * xy, 0.0) ** 0.5 / size) if size > 0 else 0.0


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and 95 % Student t interval; no interval from fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = reach(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def judge(after: Answer, before: Answer, retrained: Sequence[Answer], slots: Sequence[str]) -> dict[str, Any]:
    """Return the judgement of a model ``after`` forgetting.

    For each distance: ``after`` and ``before`` to the retrained models, and ``retrained``, of each of those to all
    others. Intervals are over the retrained models; those of the last kind depend on each other. ``closer``
    counts the retrained models that are at least as far from the others as ``after`` is.
    """
    found: dict[str, Any] = {"retrained": len(retrained), "distances": {}}
    own = [[distances(one, other, slots) for other in retrained if other is not one] for one in retrained]
    for kind in ("test", "forgotten", "weights"):
        spread = [float(np.mean([each[kind] for each in others])) for others in own]
        far = {name: [distances(model, r, slots)[kind] for r in retrained] for name, model in _two(after, before)}
        found["distances"][kind] = {
            **{name: interval(values) for name, values in far.items()},
            "retrained": interval(spread),
            "closer": sum(value >= float(np.mean(far["after"])) for value in spread),
        }
    found["membership"] = {
        **{name: percentile(m.auc, m.resampled, m.patients) for name, m in _two(after, before)},
        "retrained": interval([r.auc for r in retrained]),
        "patients": after.patients,
    }
    sure = [r.sure for r in retrained]
    found["attack"] = {
        **{name: attacked(m.sure, sure) for name, m in _two(after, before)},
        "retrained": interval(each_left_out(sure)),
    }
    for key in ("score", "loss", "accuracy"):
        found[key] = {name: getattr(model, key) for name, model in _two(after, before)}
        found[key]["retrained"] = interval([getattr(r, key) for r in retrained])
    return found


def _two(after: Answer, before: Answer) -> tuple[tuple[str, Answer], ...]:
    return ("after", after), ("before", before)
