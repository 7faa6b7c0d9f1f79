"""Networks that segment volumes, trained whole: a U-Net, UNETR and Swin UNETR, small enough for a processor.

The first two are in :mod:`~confrere.backbones.volume_nets`; Swin UNETR (Hatamizadeh et al., 2022, arXiv:2201.01266) is
MONAI's own class, which takes ten seconds of a processor to import.

Shapes: B volumes of X x Y x Z voxels, C channels, K classes; a stage of an encoder is (B, D, x, y, z).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from confrere.backbones.anatomy import Anatomy
from confrere.backbones.volume_nets import Size, Unet, Unetr
from confrere.backbones.windows import Windowed
from confrere.errors import BackboneError, ConfigError, MissingExtraError, nearest
from confrere.networks import initialise, output_name
from confrere.seeds import torch_generator
from confrere.tasks.task import Task
from confrere.tasks.volume_segmentation import VolumeSegmentation

NAMES = ("swinunetr", "unet", "unetr")

_WIDTHS = {"swinunetr": 12, "unet": 8, "unetr": 8}
_HEADS = {"swinunetr": 3, "unetr": 4}
_DEPTHS = {"swinunetr": 2, "unetr": 4}


def build(
    name: str,
    *,
    classes: int,
    size: Size,
    generator: torch.Generator,
    channels: int = 1,
    width: int | None = None,
    hidden: int = 96,
    heads: int | None = None,
    depth: int | None = None,
    patch: int = 8,
    window: int = 4,
) -> nn.Module:
    """Return a network from volumes (B, C, X, Y, Z) to class scores (B, K, X, Y, Z), with initial weights.

    The same generator state gives the same bytes. The output layer is drawn last: networks that differ in ``classes``
    alone are alike everywhere else. The global generator is not touched.

    Args:
        name: one of :data:`NAMES`.
        classes: K, background among them; 1 where the network is to reconstruct.
        size: voxels along X, Y, Z of what the network is trained on.
        generator: draws the weights.
        channels: C.
        width: channels at full resolution; default 8, of Swin UNETR 12 (and a multiple of that).
        hidden: channels of UNETR's tokens.
        heads: of attention; of Swin UNETR: in the first stage, doubled in each further one. Default 4, 3.
        depth: transformer blocks; of Swin UNETR: in each of four stages. Default 4, 2.
        patch: edge in voxels of UNETR's patches: 4, 8 or 16.
        window: edge in tokens of Swin UNETR's windows.

    Raises:
        BackboneError: no such network, or it does not take this size.
        ConfigError: numbers that do not go together.
        MissingExtraError: Swin UNETR without MONAI.
    """
    if name not in NAMES:
        raise BackboneError(
            f"there is no network for volumes called {name!r:.80}", fix=nearest(name, NAMES), code="unknown-backbone"
        )
    width = width or _WIDTHS[name]
    heads, depth = heads or _HEADS.get(name, 1), depth or _DEPTHS.get(name, 1)
    _check(name, size, width=width, hidden=hidden, heads=heads, patch=patch)
    with _Undrawn():
        if name == "unet":
            net: nn.Module = Unet(channels, classes, width)
        elif name == "unetr":
            net = Unetr(channels, classes, size, width, hidden, heads, depth, patch)
        else:
            net = _swin(channels, classes, width, heads, depth, window)
    initialise(net, generator)
    return net


def _check(name: str, size: Size, *, width: int, hidden: int, heads: int, patch: int) -> None:
    if name == "unetr" and (patch not in (4, 8, 16) or hidden % heads):
        raise ConfigError(f"UNETR needs patches of 4, 8 or 16 voxels and a width that {heads} heads divide")
    if name == "swinunetr" and (width % 12 or width % heads):
        raise ConfigError(f"the width of Swin UNETR must be a multiple of 12 and of {heads} heads", where="width")
    step = {"unet": 16, "unetr": patch, "swinunetr": 32}[name]
    # Norms need two voxels at the lowest level; the levels of UNETR's decoder have eight.
    lowest = math.prod(side // step for side in size)
    if any(side < 1 or side % step for side in size) or (lowest < 2 and name != "unetr"):
        raise BackboneError(
            f"{name} does not take volumes of {' x '.join(map(str, size))} voxels",
            where="size",
            fix=f"give multiples of {step}" + ("" if name == "unetr" else f", one of them {2 * step} or more"),
            code="backbone-image-size",
        )


class _Undrawn(TorchFunctionMode):
    """Modules are made without their initial draws, which would move the global generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in (Tensor.uniform_, Tensor.normal_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def _swin(channels: int, classes: int, width: int, heads: int, depth: int, window: int) -> nn.Module:
    try:
        from monai.networks.nets.swin_unetr import SwinUNETR
    except ImportError as error:
        raise MissingExtraError("monai", "volumes", needed_for="Swin UNETR") from error
    net: nn.Module = SwinUNETR(
        in_channels=channels,
        out_channels=classes,
        feature_size=width,
        depths=(depth,) * 4,
        num_heads=tuple(heads * 2**stage for stage in range(4)),
        window_size=window,
    )
    return net


def checked_window(name: str, size: tuple[int, ...] | None, window: Size | None) -> Size:
    """Return the window, by default the whole volume of ``size``; BackboneError if it does not fit."""
    if size is None or len(size) != 3:
        fix = "give data.volume.size, voxels along X, Y, Z"
        raise BackboneError("it reads volumes", where=name, fix=fix, code="backbone-image-size")
    window = window or (size[0], size[1], size[2])
    if any(side > there for side, there in zip(window, size, strict=True)):
        fix = "give a smaller backbone.patch"
        raise BackboneError("a patch is larger than a volume", where=name, fix=fix, code="backbone-image-size")
    return window


def windowed(
    network: str,
    name: str,
    window: Size,
    task: Task,
    draw: Callable[[nn.Module, torch.Generator], None] = initialise,
) -> Anatomy:
    """Return a ``network`` of :data:`NAMES` without its last layer, looking at volumes through windows.

    Args:
        network: one of :data:`NAMES`.
        name: of the backbone, for errors.
        window: voxels along X, Y, Z.
        task: what is to be predicted.
        draw: gives first values.

    Raises:
        BackboneError: another task, or a window that the network does not take.
    """
    if not isinstance(task, VolumeSegmentation):
        fix = 'use task="volume-segmentation", or `confrere pretrain --task lwi` with a network that has no weights yet'
        raise BackboneError("it segments volumes", where=name, fix=fix, code="backbone-unsupported")
    net = build(network, classes=1, size=window, generator=torch_generator(0, "volumes"))
    last = output_name(net)
    width = net.state_dict()[f"{last}.weight"].shape[1]
    net.set_submodule(last, nn.Identity())
    root = Windowed(net, window)
    return Anatomy(
        root=root,
        family=network,
        width=width,
        patch=(1, 1, 1),
        whole=root,
        trained=tuple(name for name, _ in root.named_parameters()),
        draw=draw,
    )
