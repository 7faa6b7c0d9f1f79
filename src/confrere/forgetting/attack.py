"""Is a model surer of the forgotten than models that never had them: the audits' LiRA, calibrated on the retrained.

Every retrained model is one that did not see the image, for the forgotten as for the unseen, so each is a reference of
offline LiRA (``audits.membership``). U-LiRA (Hayes et al., 2024) attacks forgetting example by example, too, but with
many models that were trained and then forgot as the other side, which would take as many runs.

Shapes: N images, forgotten ones first; R retrained models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from confrere.audits.membership import calibrated
from confrere.audits.references import by_patient, confidence
from confrere.audits.statistics import auc

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """How sure a model is: ``phi = log p - log(1 - p)`` (N,) of the right class.

    ``patients``: int (N,), numbered apart on the two sides; ``inside``: bool (N,), forgotten.
    """

    phi: Floats
    patients: NDArray[np.int64]
    inside: NDArray[np.bool_]


Side = tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]
"""Logits (N, K), labels (N,) and patients (N,)."""


def sureness(gone: Side, unseen: Side) -> Sureness:
    """Return how sure a model is of forgotten and of unseen images."""
    phi = [np.subtract(*confidence(logits, labels)) for logits, labels, _ in (gone, unseen)]
    strangers = unseen[2] + gone[2].max() + 1  # the two sides may count their patients from the same number
    inside = np.arange(len(gone[1]) + len(unseen[1])) < len(gone[1])
    return Sureness(phi=np.concatenate(phi), patients=np.concatenate([gone[2], strangers]), inside=inside)


def attacked(model: Sureness, references: Sequence[Sureness]) -> dict[str, float | None]:
    """Return the AUC by patient, 0.5 is chance, of LiRA on ``model``; no model of ``references`` had the images.

    With the interval of ``audits.statistics.auc``.
    """
    phis = np.stack([one.phi for one in references])
    score = calibrated(model.phi, phis, np.ones(phis.shape, dtype=bool))
    return asdict(auc(*by_patient(score, model.patients, model.inside)))


def each_left_out(retrained: Sequence[Sureness]) -> list[float]:
    """Return the AUC on each retrained model by the others, where there is nothing to find."""
    found = []
    for number, one in enumerate(retrained):
        rest: list[Any] = [*retrained[:number], *retrained[number + 1 :]]
        found.append(float(attacked(one, rest)["value"] or 0.0))
    return found
