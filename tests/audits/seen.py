"""What an attacker knows of an invented model: a chosen leak, and none."""

from __future__ import annotations

import numpy as np

from confrere.audits.references import Evidence


def seen(
    leak: float, *, members: int = 150, others: int = 150, references: int = 4, share: float = 1.0, seed: int = 0
) -> Evidence:
    """Return evidence in which training on a patient raises ``phi`` by ``leak`` standard deviations of the model.

    Patients differ in difficulty, by more than any leak; ``share`` of the members were really trained on.
    """
    rng, n = np.random.default_rng(seed), members + others
    hard = rng.normal(0, 3, n)
    inside = np.arange(n) < members
    trained = np.empty((references, n), bool)
    for pair in range(references // 2):
        half = rng.permutation(n) % 2 == 0
        trained[2 * pair], trained[2 * pair + 1] = half, ~half
    really = inside & (rng.random(n) < share)
    phi = hard + leak * really + rng.normal(0, 1, n)
    phis = hard + leak * trained + rng.normal(0, 1, (references, n))
    beside = rng.normal(0, 3, 60)
    return Evidence(
        model="general",
        site="a",
        patients=np.arange(n),
        labels=np.arange(n) % 3,
        inside=inside,
        most=1,
        right=-np.logaddexp(0, -phi),
        other=-np.logaddexp(0, phi),
        rights=-np.logaddexp(0, -phis),
        others=-np.logaddexp(0, phis),
        trained=trained,
        right_beside=-np.logaddexp(0, -(beside + rng.normal(0, 1, 60))),
        rights_beside=-np.logaddexp(0, -(beside + rng.normal(0, 1, (references, 60)))),
    )
