"""Local optimisation for one request on one site; a learner lives for one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from confrere.backbones import Backbone
from confrere.backbones.windows import centred
from confrere.errors import TrainingError
from confrere.optimiser import AdamW, accumulate, correct_gradients, scheduled
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks import Objective
from confrere.tensors import State, Tensors
from confrere.tokenset import Batch, TokenSet, feed


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a site trains in one round.

    Args:
        lr: AdamW learning rate, the highest of a run. weight_decay: of AdamW.
        schedule: ``constant`` or ``cosine``, and ``warmup``: share of the run in which the rate rises; see
            :func:`confrere.optimiser.scheduled`.
        batch_size: images a step. steps: optimiser steps a round, the same for every method.
        balance: ``sampling`` draws classes equally often (with replacement), ``weights`` shuffles and weights the
            loss by inverse class counts, ``none`` shuffles.
        class_weights: class -> weight in the loss, for all classes or none; chosen without a look at these images.
        loss: one of the task's; empty: its first.
        clip: largest gradient norm of a step.
        foreground: chance that the window of a volume is centred on its foreground, see
            :func:`confrere.backbones.windows.centred`.
        views: in how many orientations training images are seen: 2 mirrored, 4 also upside down, 8 also turned.
    """

    lr: float = 1e-3
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.01
    batch_size: int = 16
    steps: int = 10
    balance: str = "sampling"
    class_weights: Mapping[str, float] = field(default_factory=dict)
    loss: str = ""
    clip: float = 1.0
    views: int = 1
    foreground: float = 0.0


UNSCHEDULED = {"schedule": "constant", "warmup": 0.0}
"""Of trainings outside a run's rounds, which have no place on its curve."""


@dataclass
class Learner:
    """What a method's ``update`` may use: training, features and the round it is in."""

    backbone: Backbone
    data: TokenSet
    settings: TrainSettings
    seed: int
    site: str
    round: int
    rounds: int
    metrics: dict[str, float] = field(default_factory=dict)
    beside: State = field(default_factory=dict)  # groups that stay with the site beside those of the method

    def batches(self, steps: int, tag: str) -> Iterator[Batch]:
        """Yield ``steps`` training batches drawn at the address (tag, round, site)."""
        rows = self.data.rows("train")
        rng = numpy_generator(self.seed, "batches", tag, self.round, self.site)
        size = self.settings.batch_size
        if self.settings.balance == "sampling":
            labels = self.data.labels[rows]
            chances = 1.0 / np.bincount(labels)[labels]
            order = rng.choice(rows, size=steps * size, p=chances / chances.sum())
        else:
            epochs = math.ceil(steps * size / len(rows))
            order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])[: steps * size]
        draw = numpy_generator(self.seed, "views", tag, self.round, self.site)
        views = draw.integers(self.settings.views, size=len(order)) if self.settings.views > 1 else None
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            yield self.data.batch(order[part], None if views is None else views[part])

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of ``step``, counted from 0, of a training of ``steps`` steps in this round.

        A step stands at its middle, so that no rate is 0, not even that of a single step of a single round. Every
        training of a round spans the whole round, whatever its number of steps.
        """
        progress = (self.round - 1 + (step + 0.5) / steps) / self.rounds
        return scheduled(self.settings.lr, self.settings.schedule, self.settings.warmup, progress)

    def fit(
        self,
        params: Tensors,
        *,
        train: Callable[[str], bool] | None = None,
        penalty: Callable[[Tensors, Batch], Tensor] | None = None,
        loss: Callable[[Tensors, Batch], Tensor] | None = None,
        correct: Tensors | None = None,
        mean_gradient: dict[str, Tensor] | None = None,
        steps: int | None = None,
        capture: bool = False,
        tag: str = "fit",
        released: bool = True,
    ) -> dict[str, Tensor]:
        """Return ``params`` after this round's optimiser steps; the input is not changed.

        Args:
            params: every tensor the backbone needs.
            train: names to train; the others stay constant. Default: all.
            penalty: added to the task loss of each batch.
            loss: used instead of the task loss of ``params`` themselves, e.g. :meth:`loss` of a mixture with others.
            correct: added to the gradient, by name, before it is clipped.
            mean_gradient: receives the mean over the steps of the gradient without ``correct``.
            steps: instead of ``settings.steps``, for methods that divide a round's steps.
            capture: fill ``batch.inputs`` with the undropped input of each adapted layer.
            tag: address of the batches, for methods that fit twice a round.
            released: whether anything sent, now or later, depends on the result; :mod:`confrere.noisy` asks.

        Raises:
            TrainingError: the loss is not finite; nothing of this round is kept.
        """
        # Sorted, because the order of a sum decides its last bit and a wire or a file may reorder names.
        device = self.backbone.device
        leaves = {n: params[n].detach().to(device, copy=True) for n in sorted(params)}
        trained = {n: t.requires_grad_() for n, t in leaves.items() if train is None or train(n)}
        cfg, steps = self.settings, self.settings.steps if steps is None else steps
        optimiser = AdamW(list(trained.values()), lr=cfg.lr, weight_decay=cfg.weight_decay)
        losses = []
        with self.backbone.dropout(torch_generator(self.seed, "dropout", tag, self.round, self.site)):
            for batch in feed(self.batches(steps, tag), device):
                value = loss(leaves, batch) if loss else self.loss(leaves, batch, capture=capture)
                losses.append(float(value.detach()))
                if penalty is not None:
                    value = value + penalty(leaves, batch)
                optimiser.zero_grad()
                torch.autograd.backward(value)
                if mean_gradient is not None:
                    accumulate(mean_gradient, trained, 1 / steps)
                if correct is not None:
                    correct_gradients(trained, correct)
                norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), cfg.clip)
                if not torch.isfinite(norm) or not math.isfinite(losses[-1]):
                    what, fix = "the loss or its gradient is not finite", "lower train.lr, or method.lam if it has one"
                    where = f"site {self.site}, round {self.round}, step {len(losses)}"
                    raise TrainingError(what, where=where, fix=fix, code="diverged")
                optimiser.lr = self.rate(len(losses) - 1, steps)
                optimiser.step()
        self.metrics["loss"] = sum(losses) / max(1, len(losses))
        return {n: t.detach().cpu() for n, t in leaves.items()}

    def loss(self, params: Tensors, batch: Batch, *, capture: bool = False) -> Tensor:
        """Return the task loss of a batch, a scalar with gradient with respect to ``params``."""
        with centred(self.backbone.anatomy, batch.labels, self.settings.foreground):
            logits = self.backbone.logits(params, batch.tokens, capture=batch.inputs if capture else None)
        return self._task(logits, batch.labels)

    def sweep(self, split: str, *, batch_size: int = 64, limit: int | None = None) -> Iterator[Batch]:
        """Yield all images of ``train`` or ``val`` once, in order (or the first ``limit``), on the device."""
        if split == "test":
            what, where = "test images do not train", f"site {self.site}"
            raise TrainingError(what, where=where, fix="use train or val", code="diverged")
        rows = self.data.rows(split)[:limit]
        parts = (self.data.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
        yield from feed(parts, self.backbone.device)

    @torch.no_grad()
    def mean_loss(self, params: Tensors, split: str, *, limit: int | None = None) -> float:
        """Return the mean task loss over a split, without dropout; NaN for an empty one.

        It is the loss that training minimises: unless ``balance`` is ``none``, all classes of these images count the
        same, whether batches are drawn so or weighted so.
        """
        rows = self.data.rows(split)[:limit]
        if not len(rows):
            return math.nan
        loss, total = self._objective(rows), 0.0
        with self.backbone.dropout(None):
            for batch in self.sweep(split, limit=limit):
                total += float(loss(self.backbone.logits(params, batch.tokens), batch.labels)) * len(batch.labels)
        return total / len(rows)

    @cached_property
    def _task(self) -> Objective:
        """The loss of training batches: with class weights, counted once and not at every step."""
        return self._objective()

    def _objective(self, rows: np.ndarray | None = None) -> Objective:
        """Return the loss of a training batch, or that whose mean over ``rows`` is what training minimises."""
        task, given = self.backbone.task, self.settings.class_weights
        name = self.settings.loss or task.losses[0]
        weighted = ("weights",) if rows is None or task.target != "label" else ("weights", "sampling")
        if not given and (self.settings.balance not in weighted or not task.weighted):
            return task.objective(name)
        rows = self.data.rows("train") if rows is None else rows
        counted = task.weights(self.data.targets(rows), len(self.data.classes)).tolist()
        weights = torch.tensor([given.get(name, own) for name, own in zip(self.data.classes, counted, strict=True)])
        return task.objective(name, weights.to(self.backbone.device))

    def features(self, params: Tensors, batch: Batch) -> Tensor:
        """Return pooled features (B, feature_dim) of a batch, without dropout; dense ones as their mean."""
        with self.backbone.dropout(None):
            found = self.backbone.features(params, batch.tokens)
        return found.mean((1, 2)) if self.backbone.task.dense else found


Scores = Callable[[Backbone, Tensors, Tensor], Tensor]


def predict(
    backbone: Backbone,
    params: Tensors,
    data: TokenSet,
    rows: np.ndarray,
    *,
    batch_size: int = 64,
    scores: Scores = Backbone.logits,
) -> Tensor:
    """Return outputs (len(rows), classes, ...), packed as the task does; ``scores`` is a method's way to predict.

    Raises:
        TrainingError: a logit is not finite, which finite but exploded weights can give.
    """
    parts = []
    with torch.no_grad():
        for i in range(0, len(rows), batch_size):
            found = scores(backbone, params, data.batch(rows[i : i + batch_size]).tokens).cpu()
            parts.append(backbone.task.pack(refuse_infinite(found)))
    size = backbone.image_size if backbone.task.dense else ()
    return torch.cat(parts) if parts else torch.zeros(0, backbone.task.outputs(len(data.classes)), *size)


def refuse_infinite(logits: Tensor) -> Tensor:
    """Return the logits, or raise TrainingError when one is not finite."""
    if not torch.isfinite(logits).all():
        raise TrainingError("what the adapters predict is not finite", fix="lower train.lr", code="diverged")
    return logits
