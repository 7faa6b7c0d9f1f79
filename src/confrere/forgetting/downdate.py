"""The closed-form head without the forgotten: their part is subtracted from sums, and the head is solved for again.

With ``z = (features, 1)`` the head follows from ``G = sum_n w_n z z^T`` and ``M = sum_n w_n z y^T``, so what is left
after forgetting is a difference: no image that stays is looked at again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.forgetting.frame import Frame
from confrere.method import Reply
from confrere.methods.ridge import Ridge, solve
from confrere.tensors import Tensors, weighted_mean

SUMS = ("gram", "moment")


def downdate(frame: Frame, site: str = "") -> Tensors:
    """Return the head after ``site``, or the patients of ``frame.gone``, were subtracted; adapters are untouched.

    The sum of all sites is made of the round's answers. A site's own answer is subtracted with its weight. Of patients
    the moments of their images alone are computed at their site, where every image has to count the same
    (``train.balance="none"``): weights by class would change with every patient.

    Raises:
        ConfigError: another method than ridge; answers that are not kept; images that count differently.
    """
    method = frame.method
    if not isinstance(method, Ridge):
        what, fix = f"{method.name} has no closed-form head", "use --by rebuild"
        raise ConfigError(what, where="--by", fix=fix, code="forgetting")
    if not site and frame.task.experiment.train.balance != "none":
        what = "images count by their class, which changes with every patient"
        fix = "use --by rebuild, which costs one pass; or train with train.balance=none"
        raise ConfigError(what, where="--by", fix=fix, code="forgetting")
    answers = _answers(frame)
    total, weight = _sum(answers)
    if site:
        terms = {site: answers[site].state["statistics"]} if site in answers else {}
        shares = {name: answers[name].weight for name in terms}
        left = _subtracted(total, weight, terms, shares)
    else:
        left = _without_patients(frame, answers)
    return {**frame.start, **solve(left, method.lam)}


def _answers(frame: Frame) -> dict[str, Reply]:
    """Return what each site sent in the chosen round."""
    event = next(e for e in frame.old.events() if e["event"] == "round" and e["round"] == frame.round)
    stores = {site: frame.old.store(site) for site in event["sites"]}
    missing = [site for site, store in stores.items() if not store.file(frame.round).exists()]
    if missing or frame.task.experiment.masked:
        what, fix = "the sites' answers are not here", "use --by rebuild, which costs one pass over the images"
        raise ConfigError(what, where="--by", fix=fix, code="forgetting")
    return {site: store.read(frame.round)[1] for site, store in stores.items()}


def _sum(answers: Mapping[str, Reply]) -> tuple[dict[str, Tensor], float]:
    """Return the weighted sums over sites, which are all that a server needs to keep, and the sum of weights."""
    kept = {n: torch.stack([r.weight * r.state["statistics"][n] for r in answers.values()]).sum(0) for n in SUMS}
    return kept, sum(reply.weight for reply in answers.values())


def _subtracted(
    total: Tensors, weight: float, terms: Mapping[str, Tensors], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the weighted mean of what is left of a sum.

    Raises:
        ConfigError: nothing is left.
    """
    rest = weight - sum(shares.values())
    if rest <= 0:
        raise _alone()
    return {n: (total[n] - sum((shares[s] * t[n] for s, t in terms.items()), torch.zeros(()))) / rest for n in SUMS}


def _alone() -> ConfigError:
    what, fix = "in the chosen round nobody else has sent statistics", "train a new run without the forgotten"
    return ConfigError(what, where="--by downdate", fix=fix, code="forgetting")


def _without_patients(frame: Frame, answers: Mapping[str, Reply]) -> dict[str, Tensor]:
    """Return the weighted mean over sites after each site subtracted its forgotten images from its own moments."""
    sums, weights = [], []
    for site, reply in answers.items():
        moments = dict(reply.state["statistics"])
        if site in frame.gone:
            count, left = len(frame.gone[site].labels), len(frame.task.data[site].rows("train"))
            if not left:
                continue
            own = _moments(frame, site)
            moments = {n: ((count + left) * moments[n] - own[n]) / left for n in SUMS}
        images = frame.task.experiment.federation.weights == "images"
        weights.append(float(len(frame.task.data[site].rows("train"))) if images else 1.0)
        sums.append(moments)
    if not sums:
        raise _alone()
    return weighted_mean(zip(weights, sums, strict=True))


@torch.no_grad()
def _moments(frame: Frame, site: str) -> dict[str, Tensor]:
    """Return the sums of ``z z^T`` and ``z y^T`` over a site's forgotten images."""
    learner = frame.learner(site, 1, forgotten=True)
    params = frame.params(site, frame.start)
    gram, moment = torch.zeros(()), torch.zeros(())
    for batch in learner.sweep("train"):
        features = learner.features(params, batch).cpu().double()
        z = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
        y = torch.nn.functional.one_hot(batch.labels.cpu(), len(learner.data.classes)).double()
        gram, moment = gram + z.T @ z, moment + z.T @ y
        frame.cost.passes += len(z)
    return {"gram": gram, "moment": moment}
