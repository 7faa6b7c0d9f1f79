"""Fixed factors of a wide network that do what a narrow one's do: alignment on public samples, once (FedMosaic).

Shapes: n samples; the pivot's layer maps i1 to o1 numbers, the other's i2 to o2; r is the common rank. A sample is the
same public image (or token of it) seen by both networks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from confrere.adapters.colora import nearest_orthonormal


def row_cosines(weight: Tensor) -> Tensor:
    """Return the mean squared cosine between different rows of ``weight`` (r, i): 0 when they are orthogonal.

    The released code has it over columns, (i, i) cosines, which no matrix with fewer rows than columns can bring to 0.
    """
    unit = torch.nn.functional.normalize(weight, dim=1)
    cosines = unit @ unit.T
    apart = cosines - torch.diag(torch.diag(cosines))
    return apart.square().sum() / max(1, len(weight) * (len(weight) - 1))


def align_a(pivot: Tensor, pivot_inputs: Tensor, inputs: Tensor, *, steps: int = 200, lr: float = 1e-2) -> Tensor:
    """Return A (r, i2) with orthonormal rows whose outputs on ``inputs`` (n, i2) are near ``pivot_inputs`` ``pivot^T``.

    Gradient descent (Adam) on the mean squared error plus half of :func:`row_cosines`, from the least-squares solution,
    then the nearest matrix with orthonormal rows.

    Args:
        pivot: A of the smallest network, (r, i1).
        pivot_inputs: its layer's inputs, (n, i1).
        inputs: the other layer's inputs, (n, i2).
        steps: of the descent.
        lr: its learning rate.
    """
    target = (pivot_inputs @ pivot.T).double()
    x = inputs.double()
    ridge = 1e-4 * torch.eye(x.shape[1], dtype=x.dtype) * x.square().mean()
    a = torch.linalg.solve(x.T @ x / len(x) + ridge, x.T @ target / len(x)).T.contiguous().requires_grad_()
    optimiser = torch.optim.Adam([a], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (x @ a.T - target).square().mean() + 0.5 * row_cosines(a)
        torch.autograd.backward(loss)
        optimiser.step()
    return nearest_orthonormal(a.detach()).to(inputs.dtype)


def align_b(pivot: Tensor, pivot_outputs: Tensor, outputs: Tensor, *, ridge: float = 1e-4) -> Tensor:
    """Return B (o2, r) with orthonormal columns that points where ``pivot`` (o1, r) does, by canonical correlations.

    With X1 (n, o1) and X3 (n, o2) the centred outputs of both layers: ``S33^(-1/2) S31 S11^(-1/2) = U S V^T`` and
    ``B = (S11^(-1/2) V U^T S33^(1/2))^T pivot``, then the nearest matrix with orthonormal columns (this last step is
    ours: the formula alone keeps no orthonormality).
    """
    x1, x3 = (x.double() - x.double().mean(0) for x in (pivot_outputs, outputs))
    s11, s33 = (x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype) for x in (x1, x3))
    s31 = x3.T @ x1 / len(x1)
    u, _, v_t = torch.linalg.svd(_power(s33, -0.5) @ s31 @ _power(s11, -0.5), full_matrices=False)
    moved = (_power(s11, -0.5) @ v_t.T @ u.T @ _power(s33, 0.5)).T @ pivot.double()
    return nearest_orthonormal(moved).to(outputs.dtype)


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    """Return a power of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    power: Tensor = (vectors * values.clamp_min(1e-12) ** exponent) @ vectors.T
    return power
