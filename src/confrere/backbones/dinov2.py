"""DINOv2's vision transformer by the names transformers gives it, whose import takes two seconds of every start.

Shapes: B images, H and W pixels, N tokens, D channels, h and w patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from confrere.backbones.anatomy import Anatomy


class Embeddings(nn.Module):
    """Patches, the class token in front, and positions interpolated to the image's size."""

    def __init__(self, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, side * side + 1, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, patch)})

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, D) of normalised images (B, 3, H, W)."""
        patches = self.patch_embeddings["projection"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        return tokens + self.positions(images.shape[2] // self.patch, images.shape[3] // self.patch)

    def positions(self, height: int, width: int) -> Tensor:
        """Return positions (1, 1 + h w, D); the interpolation is always float32."""
        known = self.position_embeddings
        side = int((known.shape[1] - 1) ** 0.5)
        if height == width == side:
            return known
        grid = known[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        grid = nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([known[:, :1], grid.to(known.dtype).flatten(2).transpose(1, 2)], 1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, D)."""
        query, key, value = (
            layer(tokens).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, D)."""
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(tokens)))
        return out


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return tokens * self.lambda1


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.layer_scale1, self.layer_scale2 = LayerScale(width), LayerScale(width)
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, N, D): the readable form of what :mod:`confrere.backbones.block` computes faster."""
        tokens = tokens + self.layer_scale1(self.attention(self.norm1(tokens)))
        out: Tensor = tokens + self.layer_scale2(self.mlp(self.norm2(tokens)))
        return out


class DinoV2(nn.Module):
    """The whole transformer; ``side`` is how many patches the weights' positions have on a side."""

    def __init__(self, width: int, depth: int, heads: int, *, patch: int = 14, side: int = 37) -> None:
        super().__init__()
        self.width, self.heads, self.patch = width, heads, patch
        self.embeddings = Embeddings(width, patch, side)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(width, heads) for _ in range(depth))})
        self.layernorm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised tokens (B, N, D) of normalised images (B, 3, H, W)."""
        tokens = self.embeddings(images)
        for block in self.encoder["layer"].children():
            tokens = block(tokens)
        out: Tensor = self.layernorm(tokens)
        return out

    def anatomy(self) -> Anatomy:
        """Return where the parts are."""
        return Anatomy(
            root=self,
            family="dinov2",
            width=self.width,
            patch=(self.patch, self.patch),
            blocks_path="encoder.layer",
            embed=self.embeddings,
            norm=self.layernorm,
            heads=self.heads,
        )
