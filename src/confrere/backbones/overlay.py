"""Where a backbone looks: a map over patches, for overlays.

Shapes: B images, N tokens, D channels, G heads, E channels per head, h and w patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from confrere.errors import BackboneError
from confrere.tensors import Tensors

if TYPE_CHECKING:
    from confrere.backbones.backbone import Backbone


@torch.no_grad()
def attention_map(backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
    """Return :meth:`Backbone.attention`: (B, h, w), non-negative, each map summing to 1.

    Raises:
        BackboneError: the architecture has no patch tokens.
    """
    anatomy = backbone.anatomy
    if anatomy.blocks_path is None:
        raise BackboneError(
            f"{anatomy.family} has no patch tokens to look at", where=backbone.name, code="backbone-unsupported"
        )
    seen = _inside_last_block(backbone, params, tokens)
    first = anatomy.prefix_tokens
    if first and "query" in seen and "key" in seen:
        weights = _class_attention(seen["query"], seen["key"], anatomy.heads)[:, first:]
    else:
        patches = nn.functional.normalize(seen["out"][:, first:], dim=2)
        centre = nn.functional.normalize(patches.mean(1, keepdim=True), dim=2)
        weights = (patches * centre).sum(2).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True).clamp_min(1e-12)).view(-1, *backbone.grid)


def _inside_last_block(backbone: Backbone, params: Tensors, tokens: Tensor) -> dict[str, Tensor]:
    """Return the last block's output and, where they can be seen, its queries and keys, each (B, N, D) float32."""
    block = backbone.anatomy.blocks[-1]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, out: seen.__setitem__(name, out.float())

    def split(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        seen["query"], seen["key"], _ = out.float().chunk(3, dim=2)

    hooks = [block.register_forward_hook(keep("out"))]
    for path, module in block.named_modules():
        name = {"q_proj": "query", "k_proj": "key"}.get(path.rpartition(".")[2])
        if name:
            hooks.append(module.register_forward_hook(keep(name)))
        elif path == "attn.qkv" and not _normalises_queries(block):
            hooks.append(module.register_forward_hook(split))
    try:
        with backbone.full_last_block():
            backbone.features(params, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _normalises_queries(block: nn.Module) -> bool:
    """Return whether queries and keys are changed after the projection, so that they cannot be read there."""
    norms = dict(block.named_modules())
    return any(not isinstance(norms.get(f"attn.{side}_norm"), nn.Identity | None) for side in "qk")


def _class_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Return the class token's attention (B, N), averaged over heads, from queries and keys (B, N, D)."""
    images, tokens, channels = key.shape
    q = query[:, :1].reshape(images, 1, heads, channels // heads).transpose(1, 2)
    k = key.reshape(images, tokens, heads, channels // heads).transpose(1, 2)
    scores = q @ k.transpose(2, 3) * (channels // heads) ** -0.5
    weights: Tensor = scores.softmax(3).mean(1)[:, 0]
    return weights
