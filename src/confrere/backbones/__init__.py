"""Frozen vision transformers: ``load(name, lora=LoraSpec(...)) -> Backbone``.

Importing this package is cheap; PyTorch, transformers and timm are imported when a backbone needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from confrere.backbones.registry import REGISTRY, Entry, entry, names

if TYPE_CHECKING:
    from confrere.backbones.backbone import Backbone
    from confrere.backbones.loading import default_size, load

__all__ = ["REGISTRY", "Backbone", "Entry", "default_size", "entry", "load", "names"]

_LAZY = {
    "Backbone": "confrere.backbones.backbone",
    "default_size": "confrere.backbones.loading",
    "load": "confrere.backbones.loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
