"""Orthogonality terms between a general and a personal adapter: the regularisers of FedOPAL.

Shapes: A is (r, i), B is (o, r), so an adapter changes a layer's weight by ``s B A``, (o, i). All terms are means
over the adapted layers, scalars with gradient, and finite with a finite gradient at B = 0.

=======  =========================================================  ==========================================
id       raw form per layer (``normalise=False``)                   normalised form (default)
=======  =========================================================  ==========================================
W-A1     sum of ``|A_g A_k^T|`` (O-LoRA, arXiv 2310.14152)          mean of ``|cos(row of A_g, row of A_k)|``
W-A2     ``||A_g A_k^T||_F^2``; r^2/(9 i) at initialisation         mean of ``cos^2`` between rows
W-B      ``||B_g^T B_k||_F^2`` (HiLoRA, CVPR 2026)                  mean of ``cos^2`` between columns of B
W-D      ``<D_g, D_k>^2`` with ``D = B A``                          ``cos^2`` between the products D
R-cos    mean over tokens of ``cos^2(B_g A_g x, B_k A_k x)``, the   the same
         layer's input x being constant
R-feat   mean over the batch of ``|cos(f_g(x), f_k(x))|``, f the    the same
         pooled feature with only one adapter active
=======  =========================================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from confrere.adapters.algebra import pairs
from confrere.errors import ConfigError
from confrere.tensors import Tensors

REGULARISERS = ("W-A1", "W-A2", "W-B", "W-D", "R-cos", "R-feat", "none")
ROUTES = ("both", "personal_only", "general_only")
TINY = 1e-12  # keeps norms differentiable at zero


def penalty(
    kind: str,
    params: Tensors,
    *,
    routing: str = "both",
    normalise: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
    features: Callable[[Tensors], Tensor] | None = None,
) -> Tensor:
    """Return the term ``kind`` between the slots ``general`` and ``personal`` of ``params``.

    Args:
        kind: one of ``REGULARISERS``.
        params: tensors by canonical name, holding both slots.
        routing: which side receives the gradient; the other one is detached.
        normalise: scale-free form of the weight terms.
        inputs: ``R-cos``: the undropped input of each adapted layer, (..., i).
        features: ``R-feat``: maps params to pooled features, (batch, d).

    Raises:
        ConfigError: ``R-cos`` without ``inputs`` or ``R-feat`` without ``features``.
    """
    params = _route(params, routing)
    if kind == "none":
        return torch.zeros(())
    if kind == "R-feat":
        if features is None:
            raise ConfigError("R-feat needs the features of the backbone", where="method.regulariser")
        ours, theirs = features(_only(params, "general")), features(_only(params, "personal"))
        return _cosine(ours, theirs).abs().mean()
    general, personal = pairs(params, "general"), pairs(params, "personal")
    if kind == "R-cos":
        if not inputs:
            raise ConfigError("R-cos needs the inputs of the adapted layers", where="method.regulariser")
        terms = [_cosine(_output(general[k], x), _output(personal[k], x)).square().mean() for k, x in inputs.items()]
    else:
        terms = [_weight_term(kind, general[k], personal[k], normalise) for k in general]
    return torch.stack(terms).mean()


def _weight_term(kind: str, general: tuple[Tensor, Tensor], personal: tuple[Tensor, Tensor], normalise: bool) -> Tensor:
    (a_g, b_g), (a_k, b_k) = general, personal
    if kind == "W-D":  # <B_g A_g, B_k A_k> = trace((B_g^T B_k)(A_k A_g^T)): r x r only
        inner = ((b_g.T @ b_k) * (a_g @ a_k.T)).sum()
        if not normalise:
            return inner.square()
        square_g = ((b_g.T @ b_g) * (a_g @ a_g.T)).sum()
        square_k = ((b_k.T @ b_k) * (a_k @ a_k.T)).sum()
        return inner.square() / (square_g * square_k + TINY)
    left, right = (a_g, a_k) if kind.startswith("W-A") else (b_g.T, b_k.T)
    if normalise:
        left, right = _unit(left), _unit(right)
    gram = left @ right.T
    entries = gram.abs() if kind == "W-A1" else gram.square()
    return entries.mean() if normalise else entries.sum()


def _unit(rows: Tensor) -> Tensor:
    return rows / (rows.square().sum(-1, keepdim=True) + TINY).sqrt()


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    return (_unit(left) * _unit(right)).sum(-1)


def _output(pair: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    a, b = pair
    return x @ a.T @ b.T


def _route(params: Tensors, routing: str) -> dict[str, Tensor]:
    stopped = {"both": None, "personal_only": ".general.", "general_only": ".personal."}[routing]
    return {name: t.detach() if stopped and stopped in name else t for name, t in params.items()}


def _only(params: Tensors, slot: str) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(t) if ".lora_B." in name and f".{slot}." not in name else t for name, t in params.items()
    }
