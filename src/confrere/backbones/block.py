"""A block of a vision transformer in fewer passes over memory: the library's arithmetic, other rounding.

Scale and residual are one pass, attention takes the form that is fast for its type, and where only the class token is
read, the last block computes little more than a norm. Tested against the library's own blocks.

Shapes: B images, N tokens, D channels, G heads, E channels per head, R ranks of all adapters of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from confrere.adapters.layer import LoraLinear

LAYOUTS = frozenset({"dinov2", "dinov2_with_registers", "vit"})
"""transformers' model types whose blocks have the parts below."""


def forward(block: Any, tokens: Tensor, *, class_token: bool = False) -> Tensor:
    """Return the tokens after ``block`` for tokens (B, N, D): all of them, or the class token alone (B, 1, D)."""
    # Two axes for the class token: a linear layer would copy its weight B times for rows that are apart in memory.
    asked = tokens[:, 0].contiguous() if class_token else tokens
    attend = _attend_of_one if class_token else _attend
    if hasattr(block, "layer_scale1"):  # DINOv2
        asked = torch.addcmul(asked, attend(block.attention, block.norm1(tokens)), block.layer_scale1.lambda1)
        asked = torch.addcmul(asked, block.mlp(block.norm2(asked)), block.layer_scale2.lambda1)
    else:  # ViT
        asked = asked + attend(block.attention, block.layernorm_before(tokens))
        asked = asked + block.mlp(block.layernorm_after(asked))
    return asked[:, None] if class_token else asked


def _attend(attention: Any, tokens: Tensor) -> Tensor:
    """Return what every token gathers from tokens (B, N, D), as (B, N, D)."""
    query, key, value = (  # (B, N, D) -> (B, G, N, E)
        layer(tokens).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out: Tensor = attention.o_proj(_mix(query, key, value, attention.scaling).transpose(1, 2).flatten(2))
    return out


def _attend_of_one(attention: Any, tokens: Tensor) -> Tensor:
    """Return what the class token gathers from tokens (B, N, D), as (B, D), without any token's key or value.

    ``q . (W_k x)`` is ``(W_k^T q) . x``; the key's bias adds the same to every score, which a softmax does not see; and
    weights that sum to one may mix tokens before ``W_v`` as well as after it.
    """
    if isinstance(attention.k_proj, LoraLinear):
        return _attend(attention, tokens)[:, 0]
    query = attention.q_proj(tokens[:, 0].contiguous()).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
    per_head = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))  # (G, E, D)
    sought = torch.bmm(query, per_head).transpose(0, 1)  # (B, G, D)
    weights = (torch.bmm(sought, tokens.transpose(1, 2)) * attention.scaling).softmax(2)  # (B, G, N)
    layer, adapted = attention.v_proj, isinstance(attention.v_proj, LoraLinear)
    base = layer.base_layer if adapted else layer
    value = _by_head(torch.bmm(weights, tokens), base.weight)
    if base.bias is not None:
        value = value + base.bias
    if adapted:
        a, b = layer.factors()
        inner = nn.functional.linear(torch.bmm(weights, layer.dropout(tokens)), a)  # (B, G, R)
        value = value + layer.scale * _by_head(inner, b)
    out: Tensor = attention.o_proj(value)
    return out


def _by_head(given: Tensor, weight: Tensor) -> Tensor:
    """Return (B, D): each head's rows of ``weight`` (D, I) times its own vector in ``given`` (B, G, I)."""
    rows = weight.reshape(given.shape[1], -1, weight.shape[1])  # (G, E, I)
    return torch.bmm(given.transpose(0, 1), rows.transpose(1, 2)).transpose(0, 1).flatten(1)


def _mix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale q k^T) v`` (B, G, N, E); plain products where the fused form has a slow backward pass."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    weights = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(2)
    return torch.bmm(weights, v).view(query.shape)
