"""FedRot-LoRA: sites turn their factors towards a common reference before these are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from confrere.adapters.algebra import Pair, named, pairs
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, register
from confrere.tensors import State, Tensors


@register(
    "fedrot-lora",
    title="Factors turned before averaging (FedRot-LoRA)",
    paper="Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML 2026, "
    "arXiv 2602.23638",
)
@dataclass(frozen=True, kw_only=True)
class FedRotLoRA(Method):
    """Send ``(Q A_k, B_k Q^T)`` with an orthogonal Q (r, r): the same product, nearer to the other sites' factors.

    With last round's averages A*, B* as reference, Q minimises ``||Q A_k - A*||_F`` in even rounds and
    ``||B_k Q^T - B*||_F`` in odd ones (orthogonal Procrustes: ``Q = U V^T`` of the SVD of ``A* A_k^T`` or
    ``B*^T B_k``). Round 1 has no reference and turns nothing. Turning one side may misalign the other: where all A_k
    are equal, FedIT's mean is exact and that of an odd round need not be.

    Args:
        soft: how far to turn, in [0, 1]; 1, all the way, is what the authors configure. Below 1, Q is the best proper
            rotation, and the orthogonal matrix nearest to ``(1 - soft) I + soft Q`` is used; 0 is FedIT.

    Differences from the paper: language tasks there, images here; a head beside the adapters, averaged; a fresh
    optimiser in every round. Reconstructed: which parity turns which side, and the form of soft turning (there is no
    way halfway to a reflection, hence the proper rotation). Directions in which the reference is empty stay.
    """

    search: ClassVar[dict[str, tuple[Any, ...]]] = {"soft": ("choice", 0.5, 1.0)}

    soft: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.soft <= 1.0:
            raise ConfigError(f"{self.soft} is out of range", where="method.soft", fix="use 0 <= soft <= 1")

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train as FedIT does, then turn what is sent."""
        fitted = learner.fit(self.personal(received, state))
        if learner.round > 1:
            fitted |= self.turned(fitted, received["shared"], learner.round)
        return self.split(fitted)

    def turned(self, fitted: Tensors, reference: Tensors, round_: int) -> dict[str, Tensor]:
        """Return the adapter of every layer turned towards ``reference``."""
        targets, found = pairs(reference, "general"), {}
        for layer, (a, b) in pairs(fitted, "general").items():
            q = rotation((a, b), targets[layer], "B" if round_ % 2 else "A", self.soft)
            found[layer] = ((q @ a.double()).to(a), (b.double() @ q.T).to(b))
        return named(found, "general")


def rotation(pair: Pair, target: Pair, side: str, soft: float = 1.0) -> Tensor:
    """Return the orthogonal Q (r, r), float64, that turns one side of ``pair`` towards ``target``."""
    (a, b), (to_a, to_b) = ((x.double(), y.double()) for x, y in (pair, target))
    cross = to_a @ a.T if side == "A" else to_b.T @ b
    eye = torch.eye(len(a), dtype=a.dtype)
    # Where the reference says nothing any Q would do; each site's own accident would misalign them.
    cross = cross + (1e-6 * float(cross.norm()) or 1.0) * eye
    if soft == 1:
        return polar(cross)
    return polar((1 - soft) * eye + soft * polar(cross, proper=True))


def polar(matrix: Tensor, *, proper: bool = False) -> Tensor:
    """Return the orthogonal matrix nearest to ``matrix``; ``proper``: the nearest of determinant 1."""
    u, _, v_t = torch.linalg.svd(matrix)
    if proper and torch.linalg.det(u @ v_t) < 0:
        u = torch.cat([u[:, :-1], -u[:, -1:]], dim=1)  # the direction that gives up least
    nearest: Tensor = u @ v_t
    return nearest
