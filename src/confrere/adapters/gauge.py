"""One form for every pair of factors, so that a rescaled pair changes nothing.

For any invertible ``G`` (r, r) the pair ``(G A, B G^-1)`` is the same adapter as ``(A, B)``: its product ``B A`` is
equal. The mean of factors is not: one of eight sites that sends ``(10 A, B / 10)`` moves it by nine tenths, and no look
at products finds that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from confrere.adapters.names import pair_names
from confrere.errors import UpdateRefusedError
from confrere.tensors import Tensors

LIMIT = 1e3
"""Largest condition number of S: float32 factors then still give the aggregate to about 1e-4."""


def canonical(tensors: Tensors, reference: Tensors) -> dict[str, Tensor]:
    """Return ``tensors`` with every pair ``(A, B)`` in the gauge of the ``A_ref`` of the same name in ``reference``.

    With ``S = A A_ref^+``, the matrix for which ``S A_ref`` is nearest to A (least squares), ``(A, B)`` becomes
    ``(S^-1 A, B S)``: the same product, and the same for every ``(G A, B G^-1)``, for which S is ``G S``. Then
    ``S^-1 A = A_ref + X`` with X orthogonal to the rows of A_ref, so the mean of sites keeps A_ref and averages what
    is new. (``R = A_ref A^+`` would be invariant as well, but ``R A`` is A_ref projected: shorter, every round.)
    A vector s between the factors (shift) becomes ``S^-1 s``. In float64; results have the types they came in.

    A pair of which one factor is not sent, or whose ``A_ref`` is missing or of another shape, stays as it is: then
    factors are not averaged in pairs.

    Args:
        tensors: what a site sent, one group.
        reference: the same group of what it received.

    Raises:
        UpdateRefusedError: S is singular or its condition number exceeds :data:`LIMIT`, naming the layer.
    """
    result = dict(tensors)
    for name, other, shift in pair_names(tensors):
        if name not in reference or reference[name].shape != tensors[name].shape:
            continue
        a, b = tensors[name].double(), tensors[other].double()
        s = _gauge(a, reference[name].double(), name)
        result[name] = torch.linalg.solve(s, a).to(tensors[name].dtype)
        result[other] = (b @ s).to(tensors[other].dtype)
        if shift in tensors:
            result[shift] = torch.linalg.solve(s, tensors[shift].double()).to(tensors[shift].dtype)
    return result


def _gauge(a: Tensor, reference: Tensor, name: str) -> Tensor:
    """Return S (r, r) of one pair."""
    if not (torch.isfinite(a).all() and torch.isfinite(reference).all()):
        raise UpdateRefusedError(
            "a factor holds a value that is not finite", where=name, fix="lower train.lr", code="update-values"
        )
    s: Tensor = a @ torch.linalg.pinv(reference)
    sizes = torch.linalg.svdvals(s)
    if not sizes[0] <= LIMIT * sizes[-1]:
        raise UpdateRefusedError(
            f"a factor A is too far from the one that was broadcast: no common form (condition above {LIMIT:g})",
            where=name,
            fix="leave the site out, or set federation.canonical=false if the method lets A lose rank",
            code="update-gauge",
        )
    return s
