"""Data vectors: sites that never meet publish fine-tuned models once; their changes are summed (arXiv 2408.13038).

``theta = theta_pre + sum_j c_j (theta_j - theta_pre)``, then the statistics of batch norms are measured anew. Works on
whole models, batch norm included, as named tensors (a ``state_dict``).

The paper has no public code: coefficients, what is done with buffers and whose images restore are reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from confrere.errors import ConfigError
from confrere.tensors import Tensors


def fuse(
    models: Sequence[Tensors], coefficients: Sequence[float] | str, base: Tensors | None = None
) -> dict[str, Tensor]:
    """Return ``base + sum_j c_j (model_j - base)``, summed in float64.

    Numbers that count (integer buffers) are those of ``base``, or else of the first model; running variances are
    never negative. A head belongs in it only if all sites share its classes and its first values.

    Args:
        models: state dicts of equal names and shapes.
        coefficients: one for each model, ``mean`` (1/K each) or ``sum`` (1 each, which overshoots and needs
            :func:`restore_batch_norm`).
        base: what all were fine-tuned from; not needed when the coefficients sum to 1, as it then cancels out.

    Raises:
        ConfigError: no model, another number of coefficients, names or shapes that differ, or no base where needed.
    """
    if not models:
        raise ConfigError("there is no model to fuse", where="models")
    equal = {"mean": 1 / len(models), "sum": 1.0}
    if isinstance(coefficients, str):
        if coefficients not in equal:
            raise ConfigError(f"{coefficients!r} is not a choice", where="coefficients", fix="use mean, sum or numbers")
        coefficients = [equal[coefficients]] * len(models)
    if len(coefficients) != len(models):
        raise ConfigError(f"{len(coefficients)} coefficients for {len(models)} models", where="coefficients")
    rest = 1 - sum(coefficients)
    if base is None and abs(rest) > 1e-6:
        raise ConfigError("the coefficients do not sum to 1", where="base", fix="give the model that all started from")
    first = models[0] if base is None else base
    _check(first, models)
    return {name: _one(name, first[name], [m[name] for m in models], coefficients, rest) for name in first}


def _one(name: str, first: Tensor, parts: Sequence[Tensor], coefficients: Sequence[float], rest: float) -> Tensor:
    if not first.is_floating_point():
        return first.clone()
    total = first.double() * (rest if abs(rest) > 1e-6 else 0.0)
    for part, coefficient in zip(parts, coefficients, strict=True):
        total = total + coefficient * part.double()
    return (total.clamp_min(0) if name.endswith("running_var") else total).to(first.dtype)


def _check(first: Tensors, models: Sequence[Tensors]) -> None:
    shapes = {name: value.shape for name, value in first.items()}
    for index, model in enumerate(models):
        if {name: value.shape for name, value in model.items()} != shapes:
            wrong = sorted(n for n in shapes.keys() | model.keys() if n not in model or shapes.get(n) != model[n].shape)
            raise ConfigError(
                "names or shapes differ", where=f"model {index}, {wrong[0]}", fix="fuse equal models only"
            )


@torch.no_grad()
def restore_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure every batch norm's mean and variance anew, in place, and return the number of batches that were seen.

    The statistics become the plain average over the batches, while nothing is trained and all else (dropout, other
    norms) is in evaluation mode. They are statistics of somebody's images: say whose. After an error the model is as
    before.

    Args:
        model: called with each batch.
        batches: unlabelled inputs, at least one, each of several images.

    Raises:
        ConfigError: the model has no batch norm with running statistics, or there is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        raise ConfigError("the model has no batch norm with running statistics", where="model")
    modes = [(module, module.training) for module in model.modules()]
    kept = [({k: v.clone() for k, v in norm.named_buffers(recurse=False)}, norm.momentum) for norm in norms]
    model.eval()
    seen, whole = 0, False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative: every batch counts alike
            norm.train()
        for batch in batches:
            model(batch)
            seen += 1
        whole = seen > 0
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, (buffers, momentum) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if not whole:
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
    if not seen:
        raise ConfigError("there is no batch to restore from", where="batches", fix="give some unlabelled images")
    return seen
