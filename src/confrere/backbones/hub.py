"""Backbones from a local folder or a model hub: safetensors only, no remote code, hub errors made ours.

A hub model is looked up in the hub client's own cache first, so that a second run needs no network.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from confrere.backbones import anatomy, files
from confrere.backbones.loading import Loaded
from confrere.backbones.packaged import three_ways_out
from confrere.backbones.quiet import quiet
from confrere.backbones.registry import HALF, IMAGENET_MEAN, IMAGENET_STD, Entry, Pool
from confrere.errors import BackboneError, MissingExtraError

_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
# The hub client makes a path of it.
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def transformers_hub(name: str, source: str, size: tuple[int, int] | None, known: Entry | None = None) -> Loaded:
    """Return the transformers model ``org/name`` or ``org/name@revision`` of the hub.

    Raises:
        BackboneError: unreachable and not cached, or not a supported model in safetensors.
    """
    path = located(f"hf:{source}")
    entry = known or Entry(name=name, kind="transformers", source=source)
    return folder(path, size, replace(entry, note=_join(entry.note, f"Hub commit {path.name}.")))


def timm_hub(name: str, size: tuple[int, int] | None, known: Entry | None = None) -> Loaded:
    """Return a timm model by ``timm:<model>`` or ``hf-hub:<org/name>``.

    Raises:
        MissingExtraError: timm is not installed.
        BackboneError: unknown, or unreachable and not cached.
    """
    source = _timm_source(name)
    path = snapshot(*_split(source))
    entry = known or Entry(name=name, kind="timm", source=source)
    return folder(path, size, replace(entry, note=_join(entry.note, f"Hub commit {path.name}.")))


def own_size(name: str) -> tuple[int, int] | None:
    """Return the (height, width) in pixels that a model outside of the registry was made for; None where none is there.

    Raises:
        BackboneError, MissingExtraError: as :func:`transformers_hub` and :func:`timm_hub`.
    """
    path = located(name)
    config = files.read_object(path / "config.json")
    if config is None:
        return None
    entry = Entry(name=path.name, kind="folder", source="a local folder")
    with files.understood(path):
        if "architecture" in config:
            return _with_pretrained(entry, config).input_size
        return _with_preprocessing(entry, files.read_object(path / "preprocessor_config.json") or {}, config).input_size


def located(name: str) -> Path:
    """Return the folder of ``hf:<org/name>[@revision]``, ``timm:<model>``, ``hf-hub:<org/name>`` or of a path."""
    if name.startswith("hf:"):
        return snapshot(*_split(name.removeprefix("hf:")))
    if name.startswith(("timm:", "hf-hub:")):
        return snapshot(*_split(_timm_source(name)))
    return Path(name)


def _timm_source(name: str) -> str:
    """Return the hub's name of ``timm:<model>`` or ``hf-hub:<org/name>``."""
    timm = _timm()
    kind, _, rest = name.partition(":")
    if kind != "timm":
        return rest
    config = timm.get_pretrained_cfg(rest, allow_unregistered=False) if timm.is_model(rest) else None
    if config is None or not config.hf_hub_id:
        near = difflib.get_close_matches(rest, timm.list_models(), n=3)
        raise BackboneError(
            f"timm has no pretrained model {rest!r}",
            where="backbone",
            fix=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models(pretrained=True)",
            code="unknown-backbone",
        )
    found = str(config.hf_hub_id)
    return f"{found}{config.architecture}.{config.tag}" if found.endswith("/") else found


def folder(path: Path, size: tuple[int, int] | None, known: Entry | None = None) -> Loaded:
    """Return the model in a folder with ``config.json`` and safetensors, in transformers' or timm's layout.

    Raises:
        BackboneError: no such folder, files missing, pickled or damaged, or an unsupported architecture.
        MissingExtraError: a timm folder, and timm is not installed.
    """
    if not path.is_dir():
        hint = f"for the hub write hf:{path}; " if len(path.parts) == 2 and not path.is_absolute() else ""
        raise BackboneError(
            "there is no such folder", where=str(path), fix=hint + three_ways_out(), code="backbone-folder"
        )
    config = files.read_object(path / "config.json")
    if config is None:
        raise BackboneError(
            "there is no readable config.json",
            where=str(path),
            fix="give the folder as the hub has it",
            code="backbone-folder",
        )
    found = files.weights(path)
    files.refuse_larger(path, config, found)
    entry = known or Entry(name=path.resolve().name, kind="folder", source="a local folder")
    read = _read_timm if "architecture" in config else _read_transformers
    loaded = read(path, config, entry, files.digest(found), size)
    if not all(bool(torch.isfinite(value).all()) for value in loaded.anatomy.root.parameters()):
        fix = "fetch the weights again from a source you trust"
        raise BackboneError(
            "the weights hold values that are not finite", where=str(path), fix=fix, code="weights-damaged"
        )
    return loaded


def snapshot(repository: str, revision: str | None = None) -> Path:
    """Return the local folder of a hub repository: from the hub client's cache, else downloaded.

    Raises:
        BackboneError: not cached and the hub cannot be reached, has no such model or refuses it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def get(*, local: bool) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_FILES), local_files_only=local)
        )

    with quiet():
        try:
            cached = get(local=True)
            if (cached / "config.json").exists() and any(cached.glob("*.safetensors")):
                return cached
        except (OSError, HFValidationError):
            pass  # not in the cache: ask the hub, whose answer decides
        try:
            return get(local=False)
        except HFValidationError as error:
            raise BackboneError(
                f"{repository!r} is not a hub name", fix="write hf:<org/name>", code="unknown-backbone"
            ) from error
        except Exception as error:  # the client's own, its HTTP library's or the system's
            raise BackboneError(
                f"{repository} is not cached and the hub did not give it ({type(error).__name__})",
                where="backbone",
                fix=three_ways_out(),
                code="weights-missing",
            ) from error


def _read_transformers(
    path: Path, config: dict[str, Any], entry: Entry, digest: str, size: tuple[int, int] | None
) -> Loaded:
    from transformers import AutoModel

    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = AutoModel.from_pretrained(
                str(path),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # the library raises many kinds for a folder it cannot read
        raise BackboneError(
            f"transformers cannot read this model ({type(error).__name__})",
            where=str(path),
            fix="give a vision transformer saved with save_pretrained, weights as safetensors",
            code="backbone-folder",
        ) from error
    # The pooler is dropped, the mask token serves pretraining only: neither needs weights.
    unused = ("pooler.",) if anatomy.drop_pooler(model) else ()
    missing = [k for k in info["missing_keys"] if not k.startswith(unused) and "mask_token" not in k]
    if missing or info["mismatched_keys"]:
        first = sorted(missing)[0] if missing else "shapes differ"
        raise BackboneError(
            f"the weights do not fill the model: {len(missing)} tensors missing ({first})",
            where=str(path),
            fix="weights and config.json must belong together",
            code="weights-damaged",
        )
    with files.understood(path):
        entry = _with_preprocessing(entry, files.read_object(path / "preprocessor_config.json") or {}, config)
        return Loaded(anatomy.of_transformers(model, size or entry.input_size or (224, 224)), entry, digest)


def _with_preprocessing(entry: Entry, prepared: dict[str, Any], config: dict[str, Any]) -> Entry:
    """Fill what the entry leaves open from the model's own preprocessing file."""
    crop = prepared.get("crop_size") or prepared.get("size") or {}
    side = min(int(config["image_size"]) if isinstance(config.get("image_size"), int) else 224, 224)
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    height, width = crop.get("height", side), crop.get("width", side)
    patch = config.get("patch_size")
    if isinstance(patch, int):
        height, width = max(patch, height // patch * patch), max(patch, width // patch * patch)
    return replace(
        entry,
        input_size=entry.input_size or (int(height), int(width)),
        mean=entry.mean or files.triple(prepared.get("image_mean") or IMAGENET_MEAN),
        std=entry.std or files.triple(prepared.get("image_std") or IMAGENET_STD, least=1e-6),
    )


def _with_pretrained(entry: Entry, config: dict[str, Any]) -> Entry:
    """Fill what the entry leaves open from what timm wrote beside the weights."""
    given = config.get("pretrained_cfg") or {}
    shape = given.get("input_size") or (3, 224, 224)
    return replace(
        entry,
        input_size=entry.input_size or (int(shape[1]), int(shape[2])),
        mean=entry.mean or files.triple(given.get("mean") or HALF),
        std=entry.std or files.triple(given.get("std") or HALF, least=1e-6),
    )


def _read_timm(path: Path, config: dict[str, Any], entry: Entry, digest: str, size: tuple[int, int] | None) -> Loaded:
    timm = _timm()
    with files.understood(path):
        entry = _with_pretrained(entry, config)
    options: dict[str, Any] = {"pretrained": True, "num_classes": 0}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            try:
                model = timm.create_model(f"local-dir:{path}", img_size=size or entry.input_size, **options)
            except TypeError:  # convolutional families take any size and no img_size
                model = timm.create_model(f"local-dir:{path}", **options)
    except Exception as error:
        raise BackboneError(
            f"timm cannot read this model ({type(error).__name__})",
            where=str(path),
            fix="give a folder that timm.models.save_for_hf wrote, with model.safetensors",
            code="backbone-folder",
        ) from error
    pool: Pool = "mean" if getattr(model, "global_pool", "token") == "avg" else "cls"
    return Loaded(anatomy.of_timm(model.float()), replace(entry, pool=pool), digest)


def _timm() -> Any:
    try:
        import timm
    except (ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        raise MissingExtraError("timm", "timm", needed_for="this backbone") from error
    return timm


def _split(source: str) -> tuple[str, str | None]:
    repository, _, revision = source.partition("@")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BackboneError(
            f"{revision!r:.80} is no revision",
            where="backbone",
            fix="write hf:<org/name>@<commit>",
            code="unknown-backbone",
        )
    return repository, revision or None


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
