"""Groups of sites by similarity, without a random start, and models that begin apart for groups that form later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from confrere.adapters.algebra import Pair, column_overlap, concat, refactor
from confrere.seeds import torch_generator
from confrere.tensors import Tensors, digest, sq_dist


def update_basis(new: Mapping[str, Pair], old: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Return the B of the best pair, of the rank of ``new``, for ``B A`` of ``new`` less that of ``old``, by layer.

    Its columns span what an update wrote to; a layer that ``old`` lacks counts as zero there.
    """
    bases = {}
    for layer, pair in new.items():
        if layer in old:
            pair = refactor(concat([pair, old[layer]], [1.0, -1.0]), len(pair[0]))
        bases[layer] = pair[1]
    return bases


def subspace_similarity(bases: Sequence[Tensors]) -> Tensor:
    """Return how much the column spaces of each two sites' tensors lie in one another, (K, K) float64 in [0, 1].

    Mean over the names of ``||U_i^T U_j||_F^2 / r`` with orthonormal bases U: one less the subspace distance of
    HiLoRA. A tensor of zeros has no column space and says nothing; where all are, sites count as alike.
    """
    count = len(bases)
    similar = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            overlaps = [column_overlap(bases[i][name], bases[j][name]) for name in sorted(bases[i])]
            known = [value for value in overlaps if value is not None]
            similar[i, j] = similar[j, i] = sum(known) / len(known) if known else 1.0
    return similar


def spectral_groups(similarity: Tensor, clusters: int = 0) -> list[int]:
    """Return the group of each point, numbered by first appearance.

    Normalised spectral clustering (Ng, Jordan and Weiss 2001); points are assigned by pivoted QR of the leading
    eigenvectors (Damle, Minden and Ying 2019), which needs no k-means and no random start.

    Args:
        similarity: (K, K), symmetric, none negative.
        clusters: how many groups, at most K; 0 finds the number at the largest gap between eigenvalues.
    """
    from scipy.linalg import qr

    degree = similarity.double().sum(1).clamp_min(1e-12).rsqrt()
    values, vectors = torch.linalg.eigh(degree[:, None] * similarity.double() * degree)
    values, vectors = values.flip(0), vectors.flip(1)
    count = len(values)
    if not clusters:
        gaps = values[:-1] - values[1:]
        clusters = int(gaps.argmax()) + 1 if count > 1 else 1
    leading = vectors[:, : min(clusters, count)]
    _, _, pivots = qr(leading.T.numpy(), pivoting=True, mode="economic")
    u, _, v_t = torch.linalg.svd(leading[pivots[: leading.shape[1]].tolist()].T)
    nearest = (leading @ (u @ v_t)).abs().argmax(1).tolist()
    order = list(dict.fromkeys(nearest))
    return [order.index(group) for group in nearest]


def founders(models: Sequence[Tensors], mean: Tensors, count: int) -> list[Tensors]:
    """Return ``count`` models, each as far as can be from those before, the first from the mean (ties: the first)."""
    models = [dict(sorted(model.items())) for model in models]  # the order of a sum decides its last bit
    chosen: list[Tensors] = []
    while len(chosen) < count:
        gaps = [min(float(sq_dist(model, other)) for other in chosen or [mean]) for model in models]
        chosen.append(models[gaps.index(max(gaps))])
    return chosen


def redrawn(params: Tensors, cluster: int) -> dict[str, Tensor]:
    """Return ``params`` with a head of deviation ``1/sqrt(features)``, drawn anew for each cluster and run."""
    weight, seed = params["head.weight"], int(digest({"": params})[:15], 16)
    generator = torch_generator(seed, "head", cluster)
    return {**params, "head.weight": torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5}
