"""Names, shapes and types of what is added up: the same at all sites, and said apart from the numbers."""

from __future__ import annotations

import json
import math
from hashlib import sha256

import torch
from torch import Tensor

from confrere.federation.robust import Layout
from confrere.federation.secure.messages import refused
from confrere.tensors import State, unflatten

TYPES = {f"{kind}".removeprefix("torch."): kind for kind in (torch.float32, torch.float64)}
MOST = 10**9
"""Most values that are added up: four gigabytes a site."""


def sizes(form: Layout) -> tuple[int, ...]:
    """Return the number of values of each tensor."""
    return tuple(math.prod(shape) for _, shape, _ in form)


def as_json(form: Layout) -> str:
    """Return a form as JSON; equal forms give equal texts."""
    return json.dumps([[name, [*shape], f"{kind}".removeprefix("torch.")] for name, shape, kind in form])


def digest_of(form: Layout) -> str:
    """Return the SHA-256 of a form."""
    return sha256(as_json(form).encode()).hexdigest()


def as_tensor(form: Layout) -> Tensor:
    """Return a form as bytes."""
    return torch.frombuffer(bytearray(as_json(form).encode()), dtype=torch.uint8)


def from_json(text: str | bytes, *, where: str = "") -> Layout:
    """Undo :func:`as_json`; refuse what is no form, or one of more than :data:`MOST` values."""
    try:
        said = [(str(name), [*shape], TYPES[kind]) for name, shape, kind in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise refused("a form cannot be read", where) from None
    lengths = [n for _, shape, _ in said for n in shape]
    if not all(type(n) is int and n > 0 for n in lengths) or sum(math.prod(shape) for _, shape, _ in said) > MOST:
        raise refused("a form names a tensor without values, or too many", where)
    return tuple((name, torch.Size(shape), kind) for name, shape, kind in said)


def empty(form: Layout) -> State:
    """Return tensors of this form without memory."""
    return unflatten({name: torch.empty(shape, dtype=kind, device="meta") for name, shape, kind in form})
