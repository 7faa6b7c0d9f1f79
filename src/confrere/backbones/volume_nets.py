"""UNETR and a U-Net for volumes, under the names that MONAI gives their modules.

UNETR (Hatamizadeh et al., 2022, arXiv:2103.10504) and the U-Net (Falk et al., 2019) load the weights of MONAI's
``UNETR`` (but for norms that it never uses) and ``BasicUNet``, and give their numbers. They are written out since
MONAI takes ten seconds of a processor to import, at every start. UNETR may have other patches and depths than MONAI's,
which are 16 and 12.

Shapes: B volumes of X x Y x Z voxels, C channels, K classes; N tokens of D channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Size = tuple[int, int, int]


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.out_proj = nn.Linear(width, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        q, k, v = self.qkv(x_BND).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.out_proj(mixed)
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mlp = _named(linear1=nn.Linear(width, 4 * width), fn=nn.GELU(), linear2=nn.Linear(4 * width, width))
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        out: Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return out


class _Patches(nn.Module):
    def __init__(self, channels: int, grid: Size, patch: int, width: int) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(grid), width))
        self.patch_embeddings = nn.Conv3d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embeddings(x).flatten(2).transpose(1, 2) + self.position_embeddings
        return tokens


class _Vit(nn.Module):
    """The encoder of UNETR: tokens after the blocks ``taps``, and after the final norm, as grids (B, D, x, y, z)."""

    def __init__(
        self, channels: int, grid: Size, patch: int, width: int, heads: int, depth: int, taps: list[int]
    ) -> None:
        super().__init__()
        self.grid, self.taps = grid, taps
        self.patch_embedding = _Patches(channels, grid, patch, width)
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = self.patch_embedding(x)
        kept = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            kept += [tokens] * self.taps.count(index)
        return [one.transpose(1, 2).unflatten(2, self.grid) for one in (*kept, self.norm(tokens))]


class _Residual(nn.Module):
    """Two convolutions and a short cut, instance norms without parameters."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = _named(conv=nn.Conv3d(into, out, 3, padding=1, bias=False))
        self.conv2 = _named(conv=nn.Conv3d(out, out, 3, padding=1, bias=False))
        self.norm = nn.InstanceNorm3d(out)
        if into != out:
            self.conv3 = _named(conv=nn.Conv3d(into, out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.leaky_relu(self.norm(self.conv1(x)), 0.01)
        short = self.norm(self.conv3(x)) if hasattr(self, "conv3") else x
        return nn.functional.leaky_relu(self.norm(self.conv2(inner)) + short, 0.01)


def _twice(into: int, out: int) -> nn.Sequential:
    """Return a layer that doubles the resolution."""
    return _named(conv=nn.ConvTranspose3d(into, out, 2, 2, bias=False))


class _Raise(nn.Module):
    """Tokens to the resolution at which the decoder takes them: doubled once, then ``more`` times."""

    def __init__(self, into: int, out: int, more: int) -> None:
        super().__init__()
        self.transp_conv_init = _twice(into, out)
        self.blocks = nn.ModuleList([nn.Sequential(_twice(out, out), _Residual(out, out)) for _ in range(more)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.transp_conv_init(x)
        for block in self.blocks:
            x = block(x)
        return x


class _Up(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.transp_conv = _twice(into, out)
        self.conv_block = _Residual(2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv_block(torch.cat((self.transp_conv(x), skip), 1))
        return out


class Unetr(nn.Module):
    """UNETR with patches of 2^L voxels: the decoder reads L - 1 evenly spaced blocks and the final norm.

    With L = 4 and 12 blocks these are those with index 3, 6 and 9, and the network is MONAI's.
    """

    def __init__(
        self, channels: int, classes: int, size: Size, width: int, hidden: int, heads: int, depth: int, patch: int
    ) -> None:
        super().__init__()
        self.levels = patch.bit_length() - 1
        x, y, z = (side // patch for side in size)
        taps = [level * depth // self.levels for level in range(1, self.levels)]
        self.vit = _Vit(channels, (x, y, z), patch, hidden, heads, depth, taps)
        self.encoder1 = _named(layer=_Residual(channels, width))
        for level in range(1, self.levels):
            setattr(self, f"encoder{level + 1}", _Raise(hidden, width * 2**level, self.levels - 1 - level))
        for level in range(self.levels, 0, -1):
            into = hidden if level == self.levels else width * 2**level
            setattr(self, f"decoder{level + 1}", _Up(into, width * 2 ** (level - 1)))
        self.out = _named(conv=_named(conv=nn.Conv3d(width, classes, 1)))

    def forward(self, volumes: Tensor) -> Tensor:
        """Return class scores (B, K, X, Y, Z)."""
        *skips, x = self.vit(volumes)
        for level in range(self.levels, 0, -1):
            skip = getattr(self, f"encoder{level}")(skips[level - 2] if level > 1 else volumes)
            x = getattr(self, f"decoder{level + 1}")(x, skip)
        scores: Tensor = self.out(x)
        return scores


def _pair(into: int, out: int) -> nn.Sequential:
    def one(before: int) -> nn.Sequential:
        after = _named(N=nn.InstanceNorm3d(out, affine=True), A=nn.LeakyReLU(0.1, inplace=True))
        return _named(conv=nn.Conv3d(before, out, 3, padding=1), adn=after)

    return _named(conv_0=one(into), conv_1=one(out))


class _UpCat(nn.Module):
    def __init__(self, into: int, middle: int, skip: int, out: int) -> None:
        super().__init__()
        self.upsample = _named(deconv=nn.ConvTranspose3d(into, middle, 2, 2))
        self.convs = _pair(skip + middle, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.convs(torch.cat((skip, self.upsample(x)), 1))
        return out


class Unet(nn.Module):
    """A plain U-Net with four levels below full resolution, instance norms and twice the channels from level 2 on."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        w = (width, width, 2 * width, 4 * width, 8 * width)
        self.conv_0 = _pair(channels, w[0])
        self.down_1, self.down_2, self.down_3, self.down_4 = (
            _named(max_pooling=nn.MaxPool3d(2), convs=_pair(w[level - 1], w[level])) for level in range(1, 5)
        )
        self.upcat_4, self.upcat_3, self.upcat_2 = (
            _UpCat(w[level], w[level] // 2, w[level - 1], w[level - 1]) for level in (4, 3, 2)
        )
        self.upcat_1 = _UpCat(w[1], w[1], w[0], width)
        self.final_conv = nn.Conv3d(width, classes, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return class scores (B, K, X, Y, Z)."""
        x0 = self.conv_0(volumes)
        x1 = self.down_1(x0)
        x2 = self.down_2(x1)
        x3 = self.down_3(x2)
        x = self.upcat_4(self.down_4(x3), x3)
        x = self.upcat_1(self.upcat_2(self.upcat_3(x, x2), x1), x0)
        scores: Tensor = self.final_conv(x)
        return scores
