"""Local optimisation for one request on one site; a learner lives for one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from confrere.backbones import Backbone
from confrere.errors import TrainingError
from confrere.objectives import Objective, class_weights, objective
from confrere.seeds import numpy_generator, torch_generator
from confrere.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a site trains in one round.

    Args:
        lr: AdamW learning rate. weight_decay: of AdamW.
        batch_size: images a step. steps: optimiser steps a round, the same for every method.
        balance: ``sampling`` draws classes equally often (with replacement), ``weights`` shuffles and weights the
            loss by inverse class counts, ``none`` shuffles.
        loss: ``cross-entropy`` or ``focal``.
        clip: largest gradient norm of a step.
        views: in how many orientations training images are seen: 2 mirrored, 4 also upside down, 8 also turned.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 16
    steps: int = 10
    balance: str = "sampling"
    loss: str = "cross-entropy"
    clip: float = 1.0
    views: int = 1


class Array(Protocol):
    """What gives copies of rows by number: an array, a file mapped while it is read, or several of them as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """One site's images after the frozen prefix, with labels, patients and split.

    Args:
        tokens: float32 array-like (N, tokens, width), usually memory-mapped; int16 holds the bits of bfloat16.
        views: other orientations of the training images, each (training images, tokens, width).
        labels: int64 (N,). groups: int64 (N,), opaque patient numbers. split: int8 (N,), 0 train, 1 val, 2 test.
    """

    tokens: Array
    labels: np.ndarray
    groups: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...]
    views: tuple[Array, ...] = ()

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers of ``train``, ``val`` or ``test``."""
        return np.flatnonzero(self.split == ("train", "val", "test").index(split))

    def batch(self, rows: np.ndarray, views: np.ndarray | None = None) -> Batch:
        """Return the rows as tensors, copied out of the memory map; training rows in the orientation of ``views``."""
        found = self.tokens[rows]
        if views is not None:
            at = np.searchsorted(self.rows("train"), rows)
            for view in np.unique(views[views > 0]):
                found[views == view] = self.views[view - 1][at[views == view]]
        tokens = torch.from_numpy(found)
        if tokens.dtype == torch.int16:
            tokens = tokens.view(torch.bfloat16)
        return Batch(tokens, torch.from_numpy(self.labels[rows]))


def as_numpy(tokens: Tensor) -> np.ndarray:
    """Return tokens as an array for :class:`TokenSet`; bfloat16, which NumPy lacks, as int16 of the same bits."""
    tokens = tokens.cpu()
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


@dataclass
class Batch:
    """Tokens (B, N, D), labels (B,), and the inputs of the adapted layers when they were captured."""

    tokens: Tensor
    labels: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Return a copy on ``device``, without waiting for it when this one is pinned."""
        return Batch(self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, from which a GPU reads by itself."""
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory())


def feed(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on ``device``: on CUDA from pinned memory over a stream of their own; on the CPU as they are.

    The CUDA path has not been measured: no machine of ours has one.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    kept: list[
        Batch
    ] = []  # pinned sources and copies of this batch and the next: alive until the step that uses them ends
    for batch in batches:
        pinned = batch.pinned()
        with torch.cuda.stream(stream):
            copy = pinned.to(device)
        if kept:
            yield kept[1]
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.current_stream(device).synchronize()  # the last step is done: its memory may be used again
        kept = [pinned, copy]
    if kept:
        yield kept[1]


class AdamW:
    """torch's AdamW by its functional form: the class imports the compiler, which every start would wait for.

    The same bits as ``torch.optim.AdamW`` with its default moments and epsilon; a tensor without gradient stays.
    """

    def __init__(self, params: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.state = [(torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in params]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every tensor that has a gradient."""
        moved = [(p, p.grad, *state) for p, state in zip(self.params, self.state, strict=True) if p.grad is not None]
        if not moved:
            return
        params, grads, means, squares, steps = map(list, zip(*moved, strict=True))
        adamw(
            params,
            grads,
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


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
        if self.settings.views == 1:
            views = None
        else:
            draw = numpy_generator(self.seed, "views", tag, self.round, self.site)
            views = draw.integers(self.settings.views, size=len(order))
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            yield self.data.batch(order[part], None if views is None else views[part])

    def fit(
        self,
        params: Tensors,
        *,
        train: Callable[[str], bool] | None = None,
        penalty: Callable[[Tensors, Batch], Tensor] | None = None,
        capture: bool = False,
        tag: str = "fit",
    ) -> dict[str, Tensor]:
        """Return ``params`` after this round's optimiser steps; the input is not changed.

        Args:
            params: every tensor the backbone needs.
            train: names to train; the others stay constant. Default: all.
            penalty: added to the task loss of each batch.
            capture: fill ``batch.inputs`` with the undropped input of each adapted layer.
            tag: address of the batches, for methods that fit twice a round.

        Raises:
            TrainingError: the loss is not finite; nothing of this round is kept.
        """
        # Sorted, because the order of a sum decides its last bit and a wire or a file may reorder names.
        device = self.backbone.device
        leaves = {n: params[n].detach().to(device, copy=True) for n in sorted(params)}
        trained = [t.requires_grad_() for n, t in leaves.items() if train is None or train(n)]
        cfg = self.settings
        optimiser = AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        task = self._objective()
        losses = []
        with self.backbone.dropout(torch_generator(self.seed, "dropout", tag, self.round, self.site)):
            for batch in feed(self.batches(cfg.steps, tag), device):
                logits = self.backbone.logits(leaves, batch.tokens, capture=batch.inputs if capture else None)
                loss = task(logits, batch.labels)
                losses.append(float(loss.detach()))
                if penalty is not None:
                    loss = loss + penalty(leaves, batch)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
                if not torch.isfinite(norm) or not math.isfinite(losses[-1]):
                    raise TrainingError(
                        "the training loss or its gradient is not finite",
                        where=f"site {self.site}, round {self.round}, step {len(losses)}",
                        fix="lower train.lr, or lower method.lam if the method has one",
                    )
                optimiser.step()
        self.metrics["loss"] = sum(losses) / max(1, len(losses))
        return {n: t.detach().cpu() for n, t in leaves.items()}

    def _objective(self) -> Objective:
        if self.settings.balance != "weights":
            return objective(self.settings.loss)
        counts = np.bincount(self.data.labels[self.data.rows("train")], minlength=len(self.data.classes))
        name = "weighted-cross-entropy" if self.settings.loss == "cross-entropy" else self.settings.loss
        return objective(name, class_weights(counts.tolist()).to(self.backbone.device))

    def features(self, params: Tensors, batch: Batch) -> Tensor:
        """Return pooled features (B, feature_dim) of a batch, without dropout."""
        with self.backbone.dropout(None):
            return self.backbone.features(params, batch.tokens)


def predict(backbone: Backbone, params: Tensors, data: TokenSet, rows: np.ndarray, *, batch_size: int = 64) -> Tensor:
    """Return logits (len(rows), classes) without gradient or dropout.

    Raises:
        TrainingError: a logit is not finite, which finite but exploded weights can give.
    """
    with torch.no_grad():
        parts = [
            backbone.logits(params, data.batch(rows[i : i + batch_size]).tokens).cpu()
            for i in range(0, len(rows), batch_size)
        ]
    return refuse_infinite(torch.cat(parts) if parts else torch.zeros(0, len(data.classes)))


def refuse_infinite(logits: Tensor) -> Tensor:
    """Return the logits, or raise TrainingError when one is not finite."""
    if not torch.isfinite(logits).all():
        raise TrainingError("what the adapters predict is not finite", fix="lower train.lr")
    return logits
