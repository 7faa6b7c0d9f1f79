"""What a hospital takes home: its adapters as standard PEFT folders, with the head beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save

from confrere.adapters import lora
from confrere.adapters.algebra import merge_slots
from confrere.adapters.folder import export
from confrere.backbones import Backbone
from confrere.backbones.pretraining import encoder_files
from confrere.backbones.volume_folder import network_files
from confrere.errors import RunError
from confrere.federation.site import Site
from confrere.method import Method, Request
from confrere.record.files import read_json, write_bytes, write_files, write_json
from confrere.tasks.lwi import LearnableInitialisation
from confrere.tasks.volume_segmentation import VolumeSegmentation
from confrere.tensors import State, Tensors

Model = Literal["general", "personalised"]


def export_adapters(
    folder: Path,
    method: Method,
    server: State,
    sites: Mapping[str, Site],
    results: Mapping[str, Any],
    round_: int,
) -> None:
    """Write ``<site>/{general,personal,merged}/`` and ``<site>/head.{safetensors,json}`` for every examined site.

    ``merged`` holds all slots as one adapter of summed rank, where the method's prediction is their sum.
    ``head.safetensors`` holds all that is no LoRA factor: the head, norms or gates of methods that have them, and a
    network that was trained whole. Without labels: ``backbone/``, in ``general/`` where all sites share it, and
    at each site where a method has one of the site's own.
    """
    pretext = all(site.backbone.task.target == "image" for site in sites.values())
    shared: Tensors | None = None
    if pretext and method.has_general() and results["sites"]:
        first = sites[min(results["sites"])]
        state = method.broadcast(server, first.name)
        shared = first.params(Request(kind="evaluate", round=round_, state=state, model="general"))
        export_backbone(folder / "general" / "backbone", method, first.backbone, shared)
    for name, entry in results["sites"].items():
        if "temperature" not in entry:  # never examined: held out by a method without a general model
            continue
        model: Model = "general" if entry["held_out"] else "personalised"
        request = Request(kind="evaluate", round=round_, state=method.broadcast(server, name), model=model)
        params = sites[name].params(request)
        if shared is not None and all(torch.equal(params[n], value) for n, value in shared.items()):
            continue  # nothing of the site's own
        about = About(name, model, tuple(results["classes"]), float(entry["temperature"]))
        export_model(folder / name, method, sites[name].backbone, params, about)


@dataclass(frozen=True)
class About:
    """What ``head.json`` says of a model besides what its backbone and method say."""

    site: str
    model: Model
    classes: tuple[str, ...]
    temperature: float


def export_model(folder: Path, method: Method, backbone: Backbone, params: Tensors, about: About) -> None:
    """Write the adapters and the head of one model, or the backbone that was trained without labels."""
    if backbone.task.target == "image":
        export_backbone(folder / "backbone", method, backbone, params)
        return
    base = base_name(backbone)
    for slot in () if backbone.anatomy.trained else method.all_slots:
        chosen = {n: t for n, t in params.items() if lora.slot_of(n) == slot}
        write_files(folder / slot, export(chosen, scale=backbone.scale, base_name=base))
    if method.additive() and not backbone.anatomy.trained:
        merged = merge_slots(params, method.all_slots)
        write_files(folder / "merged", export(merged, scale=backbone.scale, base_name=base))
    slots = ["merged"] if method.additive() else list(method.all_slots)
    slots = [] if backbone.anatomy.trained else slots
    rest = {n: t.contiguous() for n, t in params.items() if lora.slot_of(n) is None}
    write_bytes(folder / "head.safetensors", save(rest))
    write_json(
        folder / "head.json",
        {
            "site": about.site,
            "model": about.model,
            "classes": list(about.classes),
            "task": backbone.task.choice(),
            "pool": backbone.pool,
            "precision": backbone.precision,
            "temperature": about.temperature,
            "backbone": backbone.name,
            "backbone_sha256": backbone.digest,
            "depth": backbone.depth,
            "image_size": list(backbone.image_size),
            "scale": backbone.scale,
            "blocks": backbone.spec.blocks,
            "targets": backbone.spec.targets,
            "slots": slots,
            "method": {"name": method.name, **asdict(method)},
        },
    )


def export_backbone(folder: Path, method: Method, backbone: Backbone, params: Tensors) -> None:
    """Write what was trained without labels as a folder that ``backbone.name`` takes, with a card.

    It is the encoder of a vision transformer, which transformers' ``AutoModel`` takes, too; or a network for volumes,
    all of it but the last layer.
    """
    if isinstance(backbone.task, LearnableInitialisation):
        files, card = network_files(backbone.anatomy, params), _VOLUMES
    else:
        files, card = encoder_files(backbone.anatomy, backbone.entry, params), _ENCODER
    text = card.format(
        name=backbone.name,
        size=" x ".join(map(str, backbone.image_size)),
        title=backbone.task.title.lower(),
        how=f"method {method.name}: {json.dumps(asdict(method))}; task {json.dumps(backbone.task.choice())}",
        digest=sha256(files["model.safetensors"]).hexdigest(),
    )
    write_files(folder, {**files, "README.md": text.encode()})


_ENCODER = """# {name}, pretrained

Encoder of a vision transformer, pretrained on images of {size} pixels without labels ({title}) by confrere,
{how}.

SHA-256 of the weights, for `backbone.sha256`: {digest}

Use: `confrere run DATA --backbone {name}` with `backbone.name` this folder, or
`transformers.AutoModel.from_pretrained("FOLDER")`. Licence: that of the images. What the weights tell of single
images has not been examined: a hospital that shares them should ask.
"""
_VOLUMES = """# {name}, pretrained

Network for volumes, all of it but the last layer, pretrained on volumes of {size} voxels without labels
({title}) by confrere, {how}.
`config.json` says through which window it looked.

SHA-256 of the weights, for `backbone.sha256`: {digest}

Use: `confrere run VOLUMES --backbone FOLDER task=volume-segmentation`, with the same `data.volume.spacing`; all weights
are trained on. Licence: that of the volumes. What the weights tell of single volumes has not been examined: a hospital
that shares them should ask.
"""


def base_name(backbone: Backbone) -> str:
    """Return what PEFT users pass to ``from_pretrained``: a hub's name where there is one."""
    return backbone.entry.source if backbone.entry.kind in ("transformers", "timm") else backbone.name


class Info(BaseModel):
    """``head.json``, as :func:`export_model` writes it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    classes: list[str] = Field(min_length=2)
    slots: list[str]
    method: dict[str, Any]
    task: dict[str, Any] = {"name": "classification"}
    backbone: str
    backbone_sha256: str
    depth: int
    blocks: int
    targets: str
    scale: float = Field(gt=0)
    temperature: float = Field(gt=0)
    image_size: list[int] = Field(min_length=2, max_length=3)
    pool: Literal["cls", "mean", "cls+mean"]
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _of_one_kind(self) -> Info:
        """Refuse adapters of a network for volumes, which is trained whole, and models of anything else without."""
        volumes = self.task.get("name") == VolumeSegmentation.name
        if volumes == bool(self.slots):
            raise ValueError("slots: a network for volumes has none, others have")
        if len(self.image_size) != 2 + volumes:
            raise ValueError("image_size: volumes have three sides, images two")
        return self


def read_info(path: Path) -> dict[str, Any]:
    """Return what an exported ``head.json`` says; RunError if it is missing, damaged or of no model."""
    found = read_json(path)
    try:
        checked = Info.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"{key}: {first['msg']}", where=str(path), fix="put the exported file back", code="run-file"
        ) from error
    return {**found, "task": checked.task, "image_size": tuple(checked.image_size)}
