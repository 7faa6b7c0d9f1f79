"""Networks for volumes by name or by folder, and the folder that a run on a pretext task leaves.

The folder holds ``config.json`` (``network``, ``window``), ``model.safetensors`` with every weight but the last
layer's, by the names that MONAI gives them, and a card.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from confrere.backbones import files
from confrere.backbones.anatomy import Anatomy
from confrere.backbones.loading import Loaded
from confrere.backbones.registry import REGISTRY, Entry
from confrere.backbones.volume_nets import Size
from confrere.backbones.volume_pretraining import untrained
from confrere.backbones.volumetric import NAMES, checked_window, windowed
from confrere.errors import BackboneError
from confrere.networks import output_name
from confrere.tasks.lwi import LearnableInitialisation
from confrere.tasks.task import Task
from confrere.tensors import Tensors

_NET = "net."
_KEYS = {"network", "window"}


def reads_volumes(name: str) -> bool:
    """Return whether a backbone is a network for volumes: by its registered name, or by what its folder says."""
    if name in REGISTRY:
        return REGISTRY[name].kind == "volumes"
    return (files.read_object(Path(name) / "config.json") or {}).keys() >= _KEYS


def of_volumes(name: str, size: tuple[int, ...] | None, window: Size | None, task: Task) -> Loaded:
    """Return a network for volumes of ``size``: a registered one with nobody's weights, or that of a folder.

    Raises:
        BackboneError: no size, a window larger than the volume or one that the network does not take, another task; of
            a folder: another window than it was pretrained with, or files that are damaged or of another network.
        ConfigError: slabs or cubes of a pretext task that do not divide the window.
    """
    if name not in REGISTRY:
        return _pretrained(Path(name), size, window, task)
    entry, window = REGISTRY[name], checked_window(name, size, window)
    if isinstance(task, LearnableInitialisation):
        return untrained(entry, window, task)
    digest = hashlib.sha256(repr((name, window)).encode()).hexdigest()
    return Loaded(windowed(name, name, window, task), entry, digest)


def network_files(anatomy: Anatomy, params: Tensors) -> dict[str, bytes]:
    """Return what a run with labels starts from, as the files of a folder: all weights but the last layer's."""
    root: Any = anatomy.root
    last = f"{_NET}{output_name(root.net)}."
    kept = {n.removeprefix(_NET): v for n, v in params.items() if n.startswith(_NET) and not n.startswith(last)}
    config = {"network": anatomy.family, "window": list(root.window)}
    return {
        "config.json": (json.dumps(config, indent=1, sort_keys=True) + "\n").encode(),
        "model.safetensors": save({name: value.float().contiguous() for name, value in sorted(kept.items())}),
    }


def _pretrained(path: Path, size: tuple[int, ...] | None, window: Size | None, task: Task) -> Loaded:
    network, own = _described(path)
    if window not in (None, own):
        sides = " x ".join(map(str, own))
        raise BackboneError(
            f"it was pretrained on windows of {sides} voxels",
            where=str(path),
            fix=f"give backbone.patch={list(own)}, or leave it out",
            code="backbone-image-size",
        )
    own = checked_window(str(path), size, own)
    anatomy, found = windowed(network, str(path), own, task, draw=_as_they_are), files.weights(path)
    root: Any = anatomy.root
    _fill(root.net, found, path, network)
    entry = Entry(
        name=path.resolve().name,
        kind="volumes",
        source="a local folder",
        licence="that of the volumes it was pretrained on",
        note=f"{network}, pretrained on volumes without labels.",
    )
    return Loaded(anatomy, entry, files.digest(found))


def _as_they_are(root: nn.Module, generator: torch.Generator) -> None:
    """Draw nothing: first values are those of the folder, with every seed."""


def _described(path: Path) -> tuple[str, Size]:
    config = files.read_object(path / "config.json") or {}
    network, window = config.get("network"), config.get("window")
    sides = window if isinstance(window, list) and len(window) == 3 else []
    if network not in NAMES or not sides or not all(type(side) is int and 1 <= side <= 4096 for side in sides):
        raise BackboneError(
            "config.json names no network and window that are known here",
            where=str(path),
            fix="give the folder as `confrere pretrain --task lwi` wrote it",
            code="backbone-folder",
        )
    return str(network), (sides[0], sides[1], sides[2])


def _fill(net: nn.Module, found: list[Path], path: Path, network: str) -> None:
    """Load all weights, each of its shape, none missing and none left over."""
    tensors = {name: value for file in found for name, value in load_file(file).items()}
    own = dict(net.named_parameters())
    fix = "copy the folder again as `confrere pretrain --task lwi` wrote it"
    odd = [n for n in sorted(own.keys() | tensors.keys()) if n not in own or n not in tensors]
    same = own.keys() & tensors.keys()
    odd += [n for n in sorted(same) if (own[n].shape, own[n].dtype) != (tensors[n].shape, tensors[n].dtype)]
    if odd:
        what = f"the tensors are not those of this {network}, first {odd[0]:.80}"
        raise BackboneError(what, where=str(path), fix=fix, code="weights-damaged")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    if not all(bool(torch.isfinite(value).all()) for value in own.values()):
        raise BackboneError(
            "the weights hold values that are not finite", where=str(path), fix=fix, code="weights-damaged"
        )
