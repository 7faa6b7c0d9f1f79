"""What a task is to the rest: it owns everything that depends on the kind of answer.

Shapes: B images of a batch, N images, K outputs (classes), F features, h and w patches, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from confrere.adapters import head
from confrere.data.options import Target
from confrere.objectives import class_weights
from confrere.tensors import Tensors

Objective = Callable[[Tensor, Tensor], Tensor]
"""``(outputs, targets) -> scalar``: a plain mean over the batch of per-image terms."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's outputs for some images beside what they should be.

    Args:
        outputs: (N, K, ...), as :meth:`Task.pack` left them. targets: (N, ...). groups: (N,) patients.
    """

    outputs: Tensor
    targets: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One kind of answer: a value, with options where a task has some."""

    name: ClassVar[str]
    title: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]
    """What ``train.loss`` may be; the first is the default."""
    measures: ClassVar[Mapping[str, str]]
    """Key and title of every metric, each in 0..1; the first is the headline, of which more is better."""
    target: ClassVar[Target] = "label"
    """What the data must hold."""
    dense: ClassVar[bool] = False
    """Whether the head reads every patch (B, h, w, D) instead of one vector (B, F)."""
    heads: ClassVar[tuple[str, ...]] = head.NAMES
    """Tensors without which :meth:`apply` has no meaning."""
    weighted: ClassVar[bool] = False
    """Whether the loss can weigh classes."""

    @property
    def fitted_on(self) -> tuple[str, ...]:
        """Return the splits whose answers :meth:`examine` knows, for what is fitted after training."""
        return ("val",)

    @property
    def headline(self) -> str:
        """Return the key of the metric that stands for all: verdicts and comparisons are about it."""
        return next(iter(self.measures))

    def choice(self) -> dict[str, Any]:
        """Return name and options, of which :func:`confrere.tasks.make_task` makes this task again."""
        return {"name": self.name, **asdict(self)}

    def outputs(self, classes: int) -> int:
        """Return K, how many outputs the head has."""
        return classes

    def describe(self) -> dict[str, Any]:
        """Return what results.json says of the task."""
        return {"name": self.name, "title": self.title, "measures": dict(self.measures), "headline": self.headline}

    @abstractmethod
    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the head before training: tensors named ``head.*``, among them ``head.weight`` and ``head.bias``."""

    @abstractmethod
    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return outputs (B, K, ...) of features (B, F) or (B, h, w, D); ``size`` is that of the images, in pixels."""

    @abstractmethod
    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return a loss by name, with class weights (K,) where the task is ``weighted``."""

    def weights(self, targets: np.ndarray, classes: int) -> Tensor:
        """Return weights (K,) for :meth:`objective` of training targets (N, ...)."""
        return class_weights(np.bincount(targets, minlength=classes).tolist())

    def pack(self, outputs: Tensor) -> Tensor:
        """Return outputs in the form in which those of a whole site are kept in memory."""
        return outputs

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return what is predicted, in 0..1: calibrated probabilities (B, K, ...)."""
        return np.asarray((outputs.double() / temperature).softmax(1))

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the names of what is predicted, along the second axis of :meth:`chances`."""
        return tuple(classes)

    @abstractmethod
    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return (score, criterion) of a round on N >= 1 validation images, both in 0..1.

        The score is shown; the criterion, its smooth sibling, chooses the round.
        """

    @abstractmethod
    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the numbers that may leave the site, and the predictions that may not.

        Args:
            known: images of the splits in ``fitted_on``, for what is fitted after training.
            asked: test images, N >= 0.
            classes: names.
            generator: source of the resamples.
        """


class Pooled(Task):
    """A task whose head is one linear layer on the pooled vector."""

    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a head of zeros: before training all images are alike."""
        return head.init(outputs, features)

    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return ``features @ head.weight.T + head.bias`` (B, K) of features (B, F)."""
        weight, bias = (params[name].to(features.device) for name in head.NAMES)
        return nn.functional.linear(features, weight, bias)
