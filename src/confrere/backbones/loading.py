"""``load``: from a name or folder to a :class:`Backbone`, never by silent fall-back."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from confrere.adapters.lora import LoraSpec
from confrere.backbones.anatomy import Anatomy, unfuse_attention
from confrere.backbones.backbone import Backbone, Precision
from confrere.backbones.registry import REGISTRY, Entry, Pool, entry
from confrere.errors import BackboneError
from confrere.tasks import CLASSIFICATION, Task


@dataclass(frozen=True)
class Loaded:
    """A module with its parts found, what is known about it and the digest of its weights."""

    anatomy: Anatomy
    entry: Entry
    digest: str


def load(
    name: str | Path,
    *,
    lora: LoraSpec,
    depth: int | None = None,
    image_size: int | tuple[int, ...] | None = None,
    patch: tuple[int, int, int] | None = None,
    pool: Pool | None = None,
    sha256: str | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    task: Task = CLASSIFICATION,
) -> Backbone:
    """Return a frozen backbone with the slots of ``lora`` in its last blocks.

    Args:
        name: a registered name; ``hf:<org/name>[@revision]``; ``timm:<model>`` or ``hf-hub:<org/name>``
            (both read by timm); or a local folder with ``config.json`` and ``*.safetensors``.
        lora: slots, adapted blocks and layers.
        depth: keep the first ``depth`` blocks (default all); the final norm stays.
        image_size: pixels, one side or (height, width), multiples of the patch size; of volumes (X, Y, Z) voxels.
        patch: voxels along each axis of what a network for volumes is trained on and looks through (default: all).
        pool: the class token, the mean patch, or both side by side (default: the model's own).
        sha256: refuse weights with another digest.
        device: a torch device.
        precision: of frozen weights and activations, ``fp32`` or ``bf16``.
        task: what is predicted.

    Raises:
        BackboneError: unknown or unreachable weights, a wrong digest, pickled files, an unsupported
            architecture, sizes that do not fit, or a device that is not there.
        MissingExtraError: the optional package that reads these weights is not installed.
    """
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise BackboneError(
            "no such CUDA device is there", where=f"device {device}", fix="use device = 'cpu'", code="no-such-device"
        )
    given = (image_size, image_size) if isinstance(image_size, int) else image_size
    loaded = _read(str(name), given, task, patch)
    _check_digest(loaded, sha256)
    known = replace(loaded.entry, pool=pool or loaded.entry.pool)
    size = given or known.input_size or (224, 224)
    return _build(replace(loaded, entry=known), lora, depth, size, device, precision, task)


def _build(
    loaded: Loaded,
    spec: LoraSpec,
    depth: int | None,
    size: tuple[int, ...],
    device: str,
    precision: Precision,
    task: Task,
) -> Backbone:
    anatomy, known = loaded.anatomy, loaded.entry
    if task.dense and not anatomy.blocks_path and not anatomy.trained:
        what, fix = f"{task.name} needs a model with patch tokens", "use a vision transformer"
        raise BackboneError(what, where=known.name, fix=fix, code="backbone-unsupported")
    if task.target == "image" and not anatomy.trained:
        what, fix = f"{task.name} trains a network of its own", "use backbone.name=vit-nano, -tiny, -small or -base"
        raise BackboneError(what, where=known.name, fix=fix, code="backbone-unsupported")
    _check_size(size, anatomy.patch, known.name)
    if anatomy.blocks_path and "cls" in known.pool and anatomy.prefix_tokens == 0:
        raise BackboneError(
            "the model has no class token", where=known.name, fix="use pool = 'mean'", code="backbone-unsupported"
        )
    if anatomy.blocks_path and not anatomy.blocks:
        raise BackboneError(
            "the model has no blocks", where=known.name, fix="give another model", code="backbone-depth"
        )
    kept = _check_depth(depth, len(anatomy.blocks), spec, known.name)
    sizes = _targets(anatomy, kept, spec) if spec.slots and not anatomy.trained else {}
    anatomy.drop_blocks_after(kept)
    if precision == "bf16" and device == "cpu":
        unfuse_attention(anatomy.root)
    return Backbone(
        anatomy,
        known,
        spec,
        digest=loaded.digest,
        depth=kept,
        image_size=size,
        sizes=sizes,
        device=device,
        precision=precision,
        task=task,
    )


def default_size(name: str, side: int | None = None) -> tuple[int, int]:
    """Return (height, width) in pixels: ``side`` twice if given, else what the model was made for, else 224.

    Raises:
        BackboneError, MissingExtraError: a model of a hub, as :func:`load`.
    """
    from confrere.backbones import hub

    if side is not None:
        return side, side
    return (REGISTRY[name].input_size if name in REGISTRY else hub.own_size(name)) or (224, 224)


def _read(name: str, given: tuple[int, ...] | None, task: Task, patch: tuple[int, int, int] | None) -> Loaded:
    from confrere.backbones import hub, mlp, packaged, pretraining, volume_folder

    if not name.isprintable() or len(name) > 1024:
        raise BackboneError(
            "the name is not printable or longer than 1024 characters",
            where="backbone",
            fix="see `confrere backbones`",
            code="unknown-backbone",
        )
    if volume_folder.reads_volumes(name):
        return volume_folder.of_volumes(name, given, patch, task)
    if given is not None and len(given) != 2:
        fix = "use unet, unetr or swinunetr for volumes, or a folder of one that was pretrained"
        raise BackboneError("it reads flat images", where=name, fix=fix, code="backbone-image-size")
    size = None if given is None else (given[0], given[1])
    if name not in REGISTRY:
        if name.startswith("hf:"):
            return hub.transformers_hub(name, name.removeprefix("hf:"), size)
        if name.startswith(("timm:", "hf-hub:")):
            return hub.timm_hub(name, size)
        if Path(name).is_dir() or "/" in name or name.startswith("."):
            return hub.folder(Path(name), size)
    known = entry(name)
    if known.kind == "test":
        return packaged.test_vit(known, size)
    if known.kind == "numbers":
        return mlp.random_mlp(known, size)
    if known.kind == "untrained":
        return pretraining.untrained(known, size, task)
    if known.kind == "package":
        return packaged.imgfocus(known, size)
    if known.kind == "timm":
        return hub.timm_hub(f"hf-hub:{known.source}", size, known)
    return hub.transformers_hub(name, known.source, size, known)


def _check_digest(loaded: Loaded, sha256: str | None) -> None:
    for expected in (sha256, loaded.entry.sha256):
        if expected is not None and loaded.digest != expected.lower():
            raise BackboneError(
                f"the weights have SHA-256 {loaded.digest}, expected {expected}",
                where=loaded.entry.source,
                fix="fetch the weights again from a source you trust, or correct sha256",
                code="weights-hash",
            )


def _check_size(size: tuple[int, ...], patch: tuple[int, ...], name: str) -> None:
    if len(size) != len(patch) or min(size) < 1 or any(side % part for side, part in zip(size, patch, strict=True)):
        near = tuple(max(part, round(side / part) * part) for side, part in zip(size, patch, strict=True))
        raise BackboneError(
            f"image size {size[0]}x{size[1]} is not a multiple of the patch size {patch[0]}x{patch[1]}",
            where=name,
            fix=f"use backbone.image_size={near[0]}"
            if near[0] == near[1]
            else f"use data.image_size=[{near[0]}, {near[1]}]",
            code="backbone-image-size",
        )


def _check_depth(depth: int | None, total: int, spec: LoraSpec, name: str) -> int:
    if total == 0:
        if depth:  # 0 is what is recorded of such a model
            raise BackboneError(
                "this architecture cannot be cut in depth", where=name, fix="leave depth out", code="backbone-depth"
            )
        return 0
    kept = total if depth is None else depth
    if not 1 <= kept <= total:
        raise BackboneError(
            f"depth {kept} is not within 1..{total}", where=name, fix=f"keep at most {total}", code="backbone-depth"
        )
    if spec.blocks > kept:
        raise BackboneError(
            f"{spec.blocks} blocks cannot be adapted when {kept} are kept",
            where=name,
            fix=f"use adapter.blocks={kept}",
            code="backbone-depth",
        )
    return kept


def _targets(anatomy: Anatomy, depth: int, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    pattern = {"qv": anatomy.qv, "all": ".*"}.get(spec.targets, spec.targets)
    if anatomy.blocks_path is None:
        parts = [("", anatomy.root)]
    else:
        chosen = range(depth - spec.blocks, depth)
        parts = [(f"{anatomy.blocks_path}.{i}", anatomy.blocks[i]) for i in chosen]
    sizes = {}
    for path, part in parts:
        for inner, layer in part.named_modules():
            # Not its kinds: nn.MultiheadAttention reads the weight of one without calling it.
            if type(layer) is nn.Linear and _matches(pattern, inner):
                sizes[f"{path}.{inner}".lstrip(".")] = (layer.in_features, layer.out_features)
    if not sizes:
        example = sorted(inner for inner, layer in parts[-1][1].named_modules() if isinstance(layer, nn.Linear))
        raise BackboneError(
            f"targets {spec.targets!r} match no linear layer",
            where=anatomy.family,
            fix=f"a block has {', '.join(example[:12])}",
            code="adapter-targets",
        )
    return sizes


def _matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression fits a whole name; one that could take for ever is refused."""
    fix = "use qv, all or a plain regular expression, e.g. 'mlp.fc[12]'"
    if len(pattern) > 200 or sum(map(pattern.count, "*+{")) > 4 or re.search(r"\)[*+{]", pattern):
        raise BackboneError(
            "targets repeats groups, or repeats too often", where="adapter.targets", fix=fix, code="adapter-targets"
        )
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise BackboneError(
            "targets is not a regular expression", where="adapter.targets", fix=fix, code="adapter-targets"
        ) from error
