"""Lists of methods and backbones, derived from their registries."""

from __future__ import annotations

from typing import Any

from confrere.adapters import head
from confrere.backbones import REGISTRY
from confrere.method import METHODS, Method


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


def describe_method(method: Method) -> dict[str, Any]:
    """Return what leaves a site and what stays, for lists and reports."""
    sent = [s for s in method.slots if method.sends and method.shared(f"x.lora_B.{s}.weight")]
    kept = [s for s in method.slots if s not in sent]
    head_sent = bool(method.sends) and method.shared(head.WEIGHT)
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "needs": method.needs,
        "sends": [f"{s} adapter" for s in sent] + (["head"] if head_sent else []),
        "keeps": [f"{s} adapter" for s in kept] + ([] if head_sent else ["head"]),
    }
