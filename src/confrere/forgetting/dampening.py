"""SSD: weights that matter much more for the forgotten images than for all are made smaller; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.forgetting.frame import Frame
from confrere.forgetting.way import way
from confrere.learner import Learner
from confrere.tensors import Tensors


@way(
    "ssd",
    title="Selective synaptic dampening (SSD)",
    paper="Foster et al., Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, AAAI 2024, "
    "arXiv 2308.07707",
)
def dampened(frame: Frame, *, alpha: float = 10.0, lam: float = 1.0) -> Tensors:
    """Multiply a weight by ``min(lam I_all / I_forgotten, 1)`` where ``I_forgotten > alpha I_all``.

    I is the diagonal of the empirical Fisher information: the mean over images of the squared gradient of their
    cross-entropy. Every site sends its own sum once.

    Differences from the paper: only the shared adapter and head have importances; a gradient is that of one image (the
    authors' code squares those of batches). alpha and lam are the authors' defaults for pictures, not tuned.
    """
    if not alpha > 0:
        raise ConfigError("alpha must be positive", where="--by", fix="the default is 10", code="value")
    forgotten = _mean(frame, [frame.learner(site, 1, forgotten=True) for site in sorted(frame.gone)])
    kept = [frame.learner(site, 1) for site in frame.sites]
    n_gone = sum(len(data.labels) for data in frame.gone.values())
    n_kept = sum(len(learner.data.rows("train")) for learner in kept)
    rest = _mean(frame, kept)
    frame.cost.rounds += 1
    made = {}
    for name, value in frame.start.items():
        everything = (n_kept * rest[name] + n_gone * forgotten[name]) / (n_kept + n_gone)
        chosen = forgotten[name] > alpha * everything
        factor = (lam * everything / forgotten[name].clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        made[name] = torch.where(chosen, value * factor, value)
    return made


def _mean(frame: Frame, learners: Iterable[Learner]) -> dict[str, Tensor]:
    """Return the mean squared gradient over the training images of some sites."""
    total = {name: torch.zeros_like(value) for name, value in frame.start.items()}
    count = 0
    for learner in learners:
        params = {n: t.detach().clone() for n, t in frame.params(learner.site, frame.start).items()}
        names = [name for name in params if name in total]
        for name in names:
            params[name].requires_grad_()
        with learner.backbone.dropout(None):
            for batch in learner.sweep("train", batch_size=1):
                loss = torch.nn.functional.cross_entropy(learner.backbone.logits(params, batch.tokens), batch.labels)
                found = torch.autograd.grad(loss, [params[name] for name in names], allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient.cpu().square()
                count += 1
    frame.cost.passes += count
    return {name: value / max(1, count) for name, value in total.items()}
