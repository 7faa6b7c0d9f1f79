"""What the name of an adapter tensor says: ``<layer>.lora_<A|B>.<slot>.weight``, as PEFT has it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<slot>[^.]+)\.weight")


def slot_of(name: str) -> str | None:
    """Return the slot a tensor belongs to, None when it is no adapter tensor.

    >>> slot_of("encoder.layer.7.attention.q_proj.lora_A.general.weight")
    'general'
    """
    match = _NAME.fullmatch(name)
    return match["slot"] if match else None


def layer_of(name: str) -> str | None:
    """Return the path of the adapted layer, None when ``name`` is no adapter tensor."""
    match = _NAME.fullmatch(name)
    return match["layer"] if match else None


def side_of(name: str) -> Literal["A", "B"] | None:
    """Return which factor a tensor is, None when it is no adapter tensor."""
    match = _NAME.fullmatch(name)
    return ("A" if match["side"] == "A" else "B") if match else None


def tensor_name(layer: str, side: Literal["A", "B"], slot: str) -> str:
    """Return the canonical name of one factor."""
    return f"{layer}.lora_{side}.{slot}.weight"


def pair_names(names: Collection[str]) -> list[tuple[str, str, str]]:
    """Return the names of A and B of every pair of which both are in ``names``, and of what may stand between them."""
    found = []
    for name in sorted(names):
        layer, slot = layer_of(name), slot_of(name)
        if side_of(name) == "A" and layer is not None and slot is not None:
            other = tensor_name(layer, "B", slot)
            if other in names:
                found.append((name, other, shift_name(layer, slot)))
    return found


def gate_name(layer: str) -> str:
    """Return the name of a layer's gate (slots, d_in), which weighs its slots token by token."""
    return f"{layer}.lora_gate.weight"


def shift_name(layer: str, slot: str) -> str:
    """Return the name of the vector (r,) that is added between ``A`` and ``B``."""
    return f"{layer}.lora_shift.{slot}.weight"
