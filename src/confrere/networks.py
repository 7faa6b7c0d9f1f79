"""What all networks for volumes share: first weights with an address, the stages of the encoder, the output layer.

For :mod:`confrere.backbones.volumetric` and the pretext task, which is below it; by the names that MONAI gives modules.

Shapes: B volumes of x x y x z tokens or voxels, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from confrere.errors import BackboneError

_TABLES = ("position_embeddings", "relative_position_bias_table")


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, in the order of the modules, by PyTorch's rule for the module's type.

    Convolutions and linear layers: He's uniform rule with a = sqrt(5); norms: 1 and 0; tables of positions: normal of
    standard deviation 0.02, cut at 2.

    Raises:
        BackboneError: there is no rule for a parameter.
    """
    for module in net.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5  # PyTorch's fan-in, also where the convolution is transposed
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.InstanceNorm3d):
            for key, value in own.items():
                nn.init.constant_(value, 1.0 if key == "weight" else 0.0)
        else:
            for key, value in own.items():
                if key not in _TABLES:
                    raise BackboneError(f"there is no rule to initialise {key!r}", code="backbone-unsupported")
                nn.init.trunc_normal_(value, std=0.02, a=-2.0, b=2.0, generator=generator)


@contextmanager
def capture(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, of every forward pass within, the stages (B, D, x, y, z) of the encoder, from the first to the last.

    UNETR: the blocks whose tokens its decoder reads, and the final norm. Swin UNETR: the four stages after the patch
    embedding, each normalised. U-Net: the four levels below full resolution. Also under ``torch.func.functional_call``.

    Raises:
        BackboneError: the network is none of these.
    """
    stages: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = [output] if isinstance(output, Tensor) else list(output)
        stages.extend(found[1:] if hasattr(net, "swinViT") else found)

    hooks = [module.register_forward_hook(keep) for module in _encoder(net)]
    try:
        yield stages
    finally:
        for hook in hooks:
            hook.remove()


def output_name(net: nn.Module) -> str:
    """Return the name of the last convolution, a 1 x 1 x 1 one.

    Raises:
        BackboneError: the network is no U-Net, UNETR or Swin UNETR.
    """
    for name in ("out.conv.conv", "final_conv"):
        if f"{name}.weight" in net.state_dict():
            return name
    raise _foreign(net)


def _encoder(net: nn.Module) -> list[nn.Module]:
    if hasattr(net, "down_1"):
        return [net.get_submodule(f"down_{level}") for level in range(1, 5)]
    for name in ("vit", "swinViT"):
        if isinstance(encoder := getattr(net, name, None), nn.Module):
            return [encoder]
    raise _foreign(net)


def _foreign(net: nn.Module) -> BackboneError:
    return BackboneError(
        f"this network ({type(net).__name__}) has no known encoder or output", code="backbone-unsupported"
    )
