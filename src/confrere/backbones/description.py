"""What a report says about a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from confrere.backbones.backbone import Backbone


def description(backbone: Backbone) -> dict[str, Any]:
    """Return :meth:`Backbone.describe`: name, source, licence, digest, sizes and what is adapted."""
    return {
        "name": backbone.name,
        "source": backbone.entry.source,
        "digest": backbone.digest,
        "licence": backbone.entry.licence,
        "provenance": backbone.entry.note,
        "family": backbone.anatomy.family,
        "depth": backbone.depth,
        "width": backbone.anatomy.width,
        "cut": backbone.cut,
        "patch": list(backbone.anatomy.patch),
        "image_size": list(backbone.image_size),
        "precision": backbone.precision,
        "pool": backbone.pool,
        "task": backbone.task.name,
        "feature_dim": backbone.feature_dim,
        "parameters": backbone.parameters,
        "adapted_layers": list(backbone.layers),
        "scale": backbone.scale,
    }
