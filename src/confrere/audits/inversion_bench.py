"""What a site sends of images that an attacker wants: trials of the run's own method, for ``inversion``.

Shapes: B images, M public images, N tokens, D channels, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from confrere.adapters import head
from confrere.audits.tapped import AuditedRun
from confrere.errors import ConfigError
from confrere.job import initial
from confrere.learner import Learner, TrainSettings
from confrere.tensors import State, Tensors, sub
from confrere.tokenset import TokenSet

PUBLIC = 64
"""Images from which means are known."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """One training of one site on images that the attacker wants: what was known before, and the gradient it showed.

    ``images``: (B, N, D), the truth. ``gradient``: by name, up to a factor.
    """

    before: Tensors
    gradient: Tensors
    images: Tensor


def gradient_of(change: Tensors, before: Tensors, rate: float, weight_decay: float) -> dict[str, Tensor]:
    """Return what the change of AdamW says of the gradient: its sign, nearly, after one step; then a mixture.

    ``rate``: of that step, or that in the middle of several.
    """
    return {n: -value / rate - weight_decay * before[n] for n, value in change.items()}


@dataclass(frozen=True)
class Bench:
    """A site as the attacker meets it: its model before a round, and public images (M, N, D) of the same kind.

    ``received``: what the site was sent. ``kept``: what it holds itself, as a newcomer would.
    """

    run: AuditedRun
    site: str
    received: State
    kept: State
    before: Tensors
    public: Tensor

    @classmethod
    def of(cls, run: AuditedRun, site: str) -> Bench:
        """Return the bench of one site, before the round whose models were chosen; held-out images are public."""
        received = run.broadcast(site, run.round)
        if received is None:
            what, fix = "the state before the chosen round is not kept", "run with record.keep=0"
            raise ConfigError(what, where="record.keep", fix=fix, code="audit")
        kept = run.method.init_site(initial(run.task, site))
        rows = np.flatnonzero(run.data[site].split != 0)[:PUBLIC]
        public = run.data[site].batch(rows).tokens.float()
        return cls(run, site, received, kept, run.method.personal(received, kept), public)

    def feature(self, tokens: Tensor) -> Tensor:
        """Return the features (B, F) of tokens, before the round."""
        with torch.no_grad():
            return self.run.task.backbone_of(self.site).features(self.before, tokens)

    def predict(self, params: Tensors, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.run.task.backbone_of(self.site).logits(params, tokens)

    def plain(self, row: int, names: Sequence[str]) -> Victim:
        """Return the plain gradient of one image, without dropout, of the tensors ``names``."""
        batch = self.run.data[self.site].batch(np.array([row]))
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.before.items()}
        loss = torch.nn.functional.cross_entropy(self.predict(leaves, batch.tokens), batch.labels)
        found = torch.autograd.grad(loss, [leaves[n] for n in names], materialize_grads=True)
        return Victim(before=self.before, gradient=dict(zip(names, found, strict=True)), images=batch.tokens.float())

    def sent(self, rows: np.ndarray, steps: int, batch_size: int, seed: int) -> Victim:
        """Return what the site would send after so many steps on some images: by its method, whatever that trains.

        Tensors that the server did not send, whose beginning it does not know, or that do not move, tell nothing.

        Raises:
            ConfigError: in this round the method sends no head, or the site chose which of several models to train.
        """
        data = self.run.data[self.site]
        own = _only(data, rows)
        choice = {**self.run.experiment.train.model_dump(), "views": 1, "steps": steps, "batch_size": batch_size}
        settings = TrainSettings(**choice)
        learner = Learner(
            backbone=self.run.task.backbone_of(self.site),
            data=own,
            settings=settings,
            seed=seed,
            site=self.site,
            round=self.run.round,
            rounds=self.run.experiment.rounds,
        )
        payload, _ = self.run.method.update(learner, self.received, self.kept)
        sent, known = payload.get("shared", {}), self.received.get("shared", {})
        change = sub({n: value for n, value in sent.items() if n in known and known[n].shape == value.shape}, known)
        change = {n: value for n, value in change.items() if value.any()}
        if "choice" in payload or not set(head.NAMES) <= change.keys():
            what, fix = "no head whose beginning is known is sent in the chosen round", "audit a run of another method"
            raise ConfigError(what, where="method.name", fix=fix, code="audit")
        return Victim(
            before=self.before,
            gradient=gradient_of(change, self.before, learner.rate(0, 1), settings.weight_decay),
            images=own.batch(np.arange(len(rows))).tokens.float(),
        )


def _only(data: TokenSet, rows: np.ndarray) -> TokenSet:
    """Return some images as a training set of their own."""
    split = np.zeros(len(rows), dtype=np.int8)
    return replace(
        data, tokens=data.tokens[rows], labels=data.labels[rows], groups=data.groups[rows], split=split, views=()
    )


def fewest_steps(run: AuditedRun) -> int:
    """Return the least number of local steps of a round that the method can divide among what it trains."""
    most = run.experiment.train.steps
    for steps in range(1, most):
        with suppress(ConfigError):
            run.method.check(steps, run.experiment.rounds)
            return steps
    return most
