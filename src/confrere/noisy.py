"""A learner whose steps are private: DP-SGD inside one site, for the unit of an image or a patient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from confrere import centre
from confrere.errors import TrainingError
from confrere.learner import Learner
from confrere.optimiser import AdamW
from confrere.privacy.mechanism import Loss, Mechanism, clipped_sum, draw, noisy_mean
from confrere.privacy.noise import Source
from confrere.tensors import Tensors
from confrere.tokenset import Batch

BESIDE = {centre.GROUP}
"""Groups of a site's state that noisy steps keep for themselves."""


@dataclass
class NoisyLearner(Learner):
    """What a method's ``update`` gets where a site hides its images or patients.

    What it trains sees training images through :meth:`fit` alone, whose every step is one release of ``mechanism``;
    whatever is made of such releases stays private. The training loss, which nobody made private, is not recorded.

    Args:
        mechanism: of each step.
        steps_left: noisy steps that were debited for this round, and no more are made.
    """

    mechanism: Mechanism | None = None
    steps_left: int = 0

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
        """Return ``params`` after this round's optimiser steps on noisy gradients, see :meth:`Learner.fit`.

        Instead of ``settings.batch_size`` images a step draws each unit by itself, that many expected; instead of
        ``settings.clip`` the mechanism clips. A ``penalty`` must read tensors alone: it is given no images. There is no
        dropout: how many units were drawn would decide which numbers are dropped for the others, and what one unit
        adds would not be its own gradient alone. Where ``mechanism.centred``, the head is trained on features less
        their noisy mean; as long as that is too noisy, the first of ``steps`` goes there (:mod:`confrere.centre`).

        ``released=False`` trains without noise, as the base does, what neither leaves nor ever touches what will. Where
        that diverges it stays as it was: a failure would leave, and tell of images.

        Raises:
            TrainingError: another loss, a correction or a mean gradient would use images without noise; more steps
                than were debited; or the tensors are not finite.
        """
        if not released:
            fit = partial(super().fit, params, train=train, penalty=penalty, loss=loss, steps=steps, capture=capture)
            return self._apart(partial(fit, tag=tag), params)
        if loss is not None or correct is not None or mean_gradient is not None or capture:
            raise self._refused("a loss or a correction of its own")
        steps = self.settings.steps if steps is None else steps
        self.steps_left -= steps
        if self.steps_left < 0:
            raise self._refused("more noisy steps than were debited")
        device, cfg = self.backbone.device, self.settings
        names = [n for n in sorted(params) if train is None or train(n)]
        spent, at = self._centre(params, names, tag, steps)
        leaves = {n: t.detach().to(device, copy=True) for n, t in sorted(at.enter(params).items())}
        trained = {n: leaves[n].requires_grad_() for n in names}
        fixed = {n: t for n, t in leaves.items() if n not in trained}

        optimiser, nothing = AdamW(list(trained.values()), lr=cfg.lr, weight_decay=cfg.weight_decay), torch.zeros(0)
        for step in range(spent, steps):
            for name, gradient in self._gradient(
                fixed, trained, tag, step, lambda given, *one: self._of_image(at.leave(given), *one)
            ).items():
                trained[name].grad = gradient.to(device)
            if penalty is not None:  # of tensors that are private already: it needs no noise
                torch.autograd.backward(penalty(at.leave(leaves), Batch(nothing, nothing)))
            optimiser.lr = self.rate(step, steps)
            optimiser.step()
        if not all(bool(torch.isfinite(t).all()) for t in trained.values()):
            where, fix = f"site {self.site}, round {self.round}", "lower train.lr"
            raise TrainingError("noise has made a tensor infinite", where=where, fix=fix, code="diverged")
        return {n: t.detach().cpu() for n, t in at.leave(leaves).items()}

    def _apart(self, fit: Callable[[], dict[str, Tensor]], params: Tensors) -> dict[str, Tensor]:
        """Return what ``fit`` makes without noise, which stays here; ``params`` where it diverges."""
        try:
            return fit()
        except TrainingError as error:
            warnings.warn(f"what this site keeps stays as it was: {error.reason}", RuntimeWarning, stacklevel=3)
            return {name: value.detach().clone() for name, value in params.items()}
        finally:
            self.metrics.pop("loss", None)

    def _centre(self, params: Tensors, names: Collection[str], tag: str, steps: int) -> tuple[int, centre.Coordinates]:
        """Return how many of the steps were spent on where features lie, and coordinates for the others."""
        mechanism = self._mechanism()
        if not mechanism.centred or not centre.applies(self.backbone, names):
            return 0, centre.Coordinates()
        width = self.backbone.feature_dim
        kept = centre.of(self.beside, width)
        spent = int(steps > 1 and centre.wanted(kept))
        if spent:
            far = centre.reach(self.backbone, params)

            def towards(given: Tensors, tokens: Tensor, _: Tensor) -> Tensor:
                features = self.backbone.features(params, tokens)
                return -(features @ given[centre.GROUP]).sum() * (mechanism.clip / far)

            start = {centre.GROUP: torch.zeros(width, device=self.backbone.device)}
            found = -self._gradient({}, start, tag, 0, towards)[centre.GROUP] * (far / mechanism.clip)
            kept = centre.added(kept, found, mechanism, far)
            self.beside = {**self.beside, centre.GROUP: kept}
        return spent, centre.Coordinates(centre.mean(kept))

    def _gradient(
        self, fixed: Tensors, trained: Tensors, tag: str, step: int, loss: Loss | None = None
    ) -> dict[str, Tensor]:
        """Return the noisy gradient of one step, of the task's loss if no other is given."""
        mechanism, rows = self._mechanism(), self.data.rows("train")
        source = Source(mechanism.noise_seed, tag, self.round, self.site, step)
        drawn, counts = draw(mechanism, rows, self.data.groups[rows], source)
        views = None
        if self.settings.views > 1:
            views = (source.uniform(drawn.size) * self.settings.views).astype(np.int64)
        if not len(drawn):
            total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trained.items()}
            return noisy_mean(total, mechanism, source)
        batch, form = self.data.batch(drawn.ravel(), views).to(self.backbone.device), drawn.shape
        tokens, targets = (t.reshape(*form, *t.shape[1:]) for t in (batch.tokens, batch.labels))
        shares = torch.from_numpy(counts).to(self.backbone.device)
        total = clipped_sum(loss or self._of_image, fixed, trained, tokens, targets, shares, mechanism.clip)
        return noisy_mean(total, mechanism, source)

    def _of_image(self, params: Tensors, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the task's loss of one image."""
        return self._task(self.backbone.logits(params, tokens), targets)

    def sweep(self, split: str, *, batch_size: int = 64, limit: int | None = None) -> Iterator[Batch]:
        """Refuse: images that are read without noise could get into what is sent."""
        raise self._refused("images outside of noisy steps")

    def mean_loss(self, params: Tensors, split: str, *, limit: int | None = None) -> float:
        """Refuse: a loss on images would be one more release."""
        raise self._refused("the loss of images")

    def _mechanism(self) -> Mechanism:
        if self.mechanism is None:
            raise self._refused("steps without a mechanism")
        return self.mechanism

    def _refused(self, what: str) -> TrainingError:
        where, fix = f"site {self.site}, round {self.round}", "use a method that docs/privacy.md names"
        return TrainingError(f"epsilon does not cover {what}", where=where, fix=fix, code="privacy")
