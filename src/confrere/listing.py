"""Lists of methods and backbones, derived from their registries."""

from __future__ import annotations

from typing import Any

from confrere.backbones import REGISTRY
from confrere.job import describe_method
from confrere.method import METHODS


def method_rows() -> list[dict[str, Any]]:
    """Return one row per registered method: name, title, sends, keeps, needs, paper."""
    return [describe_method(cls()) for _, cls in sorted(METHODS.items())]


def backbone_rows() -> list[dict[str, Any]]:
    """Return one row per known backbone."""
    return [
        {
            "name": e.name,
            "source": e.source,
            "licence": e.licence,
            "input": "x".join(map(str, e.input_size)) if e.input_size else None,
            "blocks": e.depth,
            "width": e.width,
            "sha256": e.sha256,
            "note": e.note,
        }
        for e in REGISTRY.values()
    ]
