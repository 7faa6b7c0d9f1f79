"""What a network can learn of images without labels: to fill in hidden patches, or to tell an image's other view.

The network computes the losses itself (:mod:`confrere.backbones.pretraining`), as they need its inside; its outputs
are (B, K): the loss of each image, and K - 1 further numbers that say what the loss is worth; here K is 2.

Shapes: B images of a batch, N images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from confrere.metrics.bootstrap import draw
from confrere.metrics.masks import mean_of
from confrere.tasks.task import Answers, Objective, Task
from confrere.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class Pretext(Task):
    """A task that needs images alone; the network, trained whole, is what is wanted of it."""

    losses = ("own",)
    target = "image"
    heads = ()

    def outputs(self, classes: int) -> int:
        """Return 2."""
        return 2

    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return nothing: all that is trained belongs to the network."""
        return {}

    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the network's own outputs (B, K)."""
        return features

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return the mean of the first output."""
        return lambda outputs, targets: outputs[:, 0].mean()

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the headline's name: one number an image."""
        return (self.headline,)

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return the headline of each image (B, 1)."""
        return self.worth(outputs)[:, None]

    @abstractmethod
    def worth(self, outputs: Tensor) -> np.ndarray:
        """Return the headline of each image (N,), in 0..1, of outputs (N, K)."""

    def numbers(self, outputs: Tensor) -> tuple[np.ndarray, ...]:
        """Return each of ``measures`` of each image (N,), of outputs (N, K): the headline and the loss."""
        return self.worth(outputs), outputs[:, 0].double().numpy()

    def judge(self, answers: Answers) -> tuple[float, float]:
        """Return the mean headline, and ``exp`` of minus the mean loss."""
        loss = float(answers.outputs[:, 0].double().mean())
        return float(self.worth(answers.outputs).mean()), float(np.exp(-loss))

    def examine(
        self, known: Answers, asked: Answers, *, classes: Sequence[str], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the means of all measures with intervals over patients; each test image's value stays at the site."""
        values = self.worth(asked.outputs)
        predictions = {"values": torch.from_numpy(values), "groups": torch.from_numpy(asked.groups.copy())}
        if not len(values):
            return {"metrics": None, "temperature": 1.0}, predictions
        patient_N = np.unique(asked.groups, return_inverse=True)[1].astype(np.int64)
        weights = draw(int(patient_N.max()) + 1, generator, 2000)
        metrics: dict[str, Any] = {"n": len(values), "patients": weights.shape[1], "by_class": {}, "notes": []}
        metrics |= {
            key: mean_of(one, patient_N, weights)
            for key, one in zip(self.measures, self.numbers(asked.outputs), strict=True)
        }
        return {"metrics": metrics, "temperature": 1.0}, predictions


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Pretext):
    """A masked autoencoder (MAE): see some patches, draw the others.

    The loss is the mean squared error over hidden patches; beside it stands that of who draws each patch evenly, in the
    mean of its own numbers (about 1 with ``normalised``).

    Args:
        masked: share of patches that are hidden, in 0..1.
        normalised: what is drawn is each patch less its mean, over its standard deviation.
        decoder_width: channels of the decoder; 0: half the encoder's, a multiple of 32.
        decoder_depth: its blocks.

    References:
        He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv 2111.06377.
    """

    name = "reconstruction"
    title = "Masked reconstruction"
    measures: ClassVar[dict[str, str]] = {"explained": "Explained share of hidden patches", "error": "Error"}

    masked: Annotated[float, Field(gt=0, lt=1)] = 0.6
    normalised: bool = True
    decoder_width: Annotated[int, Field(ge=0, le=2048, multiple_of=32)] = 0
    decoder_depth: Annotated[int, Field(ge=1, le=24)] = 2

    def worth(self, outputs: Tensor) -> np.ndarray:
        """Return 1 - error / error of the mean pixel, 0 where that is less."""
        error, control = outputs.double().numpy().T
        return np.asarray(np.clip(1 - error / np.maximum(control, 1e-12), 0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Contrast(Pretext):
    """MoCo v3: say which of the batch's images is this one, cut and coloured otherwise.

    Args:
        temperature: divides similarities, > 0.
        momentum: of the second encoder, which follows the first in every step, in [0, 1).
        projection: numbers in which views are compared.

    References:
        Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021, arXiv 2104.02057.
    """

    name = "contrast"
    title = "Contrast of views"
    measures: ClassVar[dict[str, str]] = {"matched": "Views matched", "loss": "Loss"}

    temperature: Annotated[float, Field(gt=0, le=10)] = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    projection: Annotated[int, Field(ge=2, le=4096)] = 128

    def worth(self, outputs: Tensor) -> np.ndarray:
        """Return 1 where the other view was the most similar one, 0 elsewhere; between, where one of two ways was."""
        return np.asarray(outputs[:, 1].double().numpy())
