"""Named tensors, the only currency: in memory, on the wire, on disk and in an audit.

``Tensors`` maps a name to a tensor, ``State`` maps a group to ``Tensors``. A name is the same string
everywhere, e.g. ``encoder.layer.7.attention.q_proj.lora_A.general.weight``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
State = Mapping[str, Tensors]


def pick(tensors: Tensors, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors whose name satisfies ``keep``."""
    return {name: value for name, value in tensors.items() if keep(name)}


def sub(left: Tensors, right: Tensors) -> dict[str, Tensor]:
    """Return ``left - right``, name by name."""
    return {name: value - right[name] for name, value in left.items()}


def dot(left: Tensors, right: Tensors) -> Tensor:
    """Return the inner product over all names, a scalar in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in left.items():
        total = total + (value.double() * right[name].double()).sum()
    return total


def sq_dist(left: Tensors, right: Tensors) -> Tensor:
    """Return the squared Euclidean distance over all names of ``left``, a scalar with gradient."""
    parts = [(value - right[name]).square().sum() for name, value in left.items()]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def weighted_mean(items: Iterable[tuple[float, Tensors]]) -> dict[str, Tensor]:
    """Return ``sum_k w_k t_k / sum_k w_k``, accumulated in float64 in the order given.

    Raises:
        ValueError: no items, weights that sum to zero, or names or shapes that differ.
    """
    pairs = list(items)
    total = float(sum(weight for weight, _ in pairs))
    if not pairs or not total > 0:
        raise ValueError("a weighted mean needs at least one item of positive weight")
    names = pairs[0][1].keys()
    for _, tensors in pairs:
        if tensors.keys() != names:
            raise ValueError(f"names differ: {sorted(set(names) ^ set(tensors))[:4]}")
    mean = {}
    for name, first in pairs[0][1].items():
        parts = []
        for weight, tensors in pairs:
            if tensors[name].shape != first.shape:
                raise ValueError(f"shapes differ for {name}: {tuple(tensors[name].shape)}, {tuple(first.shape)}")
            parts.append(tensors[name].double() * (weight / total))
        mean[name] = torch.stack(parts).sum(0).to(first.dtype)
    return mean


def flatten(state: State) -> dict[str, Tensor]:
    """Return one mapping with ``group/name`` keys, as on disk and on the wire."""
    return {f"{group}/{name}": value for group, tensors in state.items() for name, value in tensors.items()}


def unflatten(flat: Tensors) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`flatten`; the group is what stands before the first slash."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, _, name = key.partition("/")
        state.setdefault(group, {})[name] = value
    return state


def n_bytes(state: State) -> int:
    """Return the number of payload bytes of all tensors of ``state``."""
    return sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors.values())


def digest(state: State) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes; equal states give equal digests."""
    sha = hashlib.sha256()
    for key, value in sorted(flatten(state).items()):
        sha.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.detach().cpu().numpy().tobytes())
    return sha.hexdigest()
