"""Adapters on disk, in PEFT's own format: any program that reads PEFT folders reads these.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` for one slot. Pickled adapters are
refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confrere import intake
from confrere.adapters.names import layer_of, side_of, slot_of, tensor_name
from confrere.errors import BackboneError

if TYPE_CHECKING:
    import torch

    from confrere.tensors import Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ONLY = "give a folder of plain LoRA, as PEFT or Confrere writes it"
# PEFT options under which the same tensors would mean another function.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
}


def export(tensors: Tensors, *, scale: float, base_name: str) -> dict[str, bytes]:
    """Return the files of one slot as a standard PEFT folder, which ``PeftModel.from_pretrained(base, folder)`` loads.

    Args:
        tensors: both factors of every layer of exactly one slot, by canonical name.
        scale: factor on ``B A x``; written as ``lora_alpha = scale * r``.
        base_name: what the adapter belongs to, written as ``base_model_name_or_path``.

    Raises:
        BackboneError: no tensors, several slots, or names that are no adapter's.
    """
    from safetensors.torch import save

    slots = {slot_of(name) for name in tensors}
    if len(slots) != 1 or None in slots:
        raise BackboneError(
            f"one slot is exported at a time, got {sorted(str(slot) for slot in slots)}",
            where=base_name,
            code="adapter-folder",
        )
    ranks = {str(layer_of(n)): int(t.shape[0]) for n, t in sorted(tensors.items()) if side_of(n) == "A"}
    named = {
        f"{_PREFIX}{layer_of(name)}.lora_{side_of(name)}.weight": value.detach().cpu().contiguous().clone()
        for name, value in sorted(tensors.items())
    }
    text = json.dumps(_config(ranks, scale, base_name), indent=2, sort_keys=True)
    return {WEIGHTS: save(named, metadata={"format": "pt"}), CONFIG: text.encode()}


def import_(folder: Path, *, slot: str, scale: float | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a PEFT LoRA folder under the names of ``slot``.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        slot: the slot the adapter goes to.
        scale: the backbone's scale; a folder with another one has the ratio folded into ``B``.
            None leaves the tensors as they are.

    Raises:
        BackboneError: files missing, pickled or damaged, not finite, or an adapter that is not plain LoRA.
    """
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin"))
        raise BackboneError(
            "the adapter is pickled and could run code" if pickled else f"there is no {WEIGHTS}",
            where=str(folder),
            fix="save it again as safetensors (PEFT's default)",
            code="weights-pickled",
        )
    try:
        stored = intake.load_weights(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{WEIGHTS} is damaged: {getattr(error, 'strerror', error)}",
            where=str(folder),
            fix="export the adapter again",
            code="adapter-folder",
        ) from error
    named = {}
    for key, value in stored.items():
        layer, found, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not found or side not in ("A", "B"):
            raise BackboneError(f"{key!r} is not a LoRA tensor", where=str(folder), fix=_ONLY, code="adapter-folder")
        ratio = 1.0 if scale is None or side == "A" else _scale_of(config, layer, folder) / scale
        named[tensor_name(layer, "A" if side == "A" else "B", slot)] = value * ratio if ratio != 1 else value
    _refuse_halves(named, slot, folder)
    return named


def _refuse_halves(named: Tensors, slot: str, folder: Path) -> None:
    """Refuse a layer without both factors, or with factors whose ranks differ."""
    for layer in {str(layer_of(name)) for name in named}:
        a, b = (named.get(tensor_name(layer, side, slot)) for side in ("A", "B"))
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise BackboneError(
                f"the factors of {layer!r} do not fit together", where=str(folder), fix=_ONLY, code="adapter-folder"
            )


def _config(ranks: Mapping[str, int], scale: float, base_name: str) -> dict[str, Any]:
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {layer: rank for layer, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": common,
        "lora_alpha": _whole(scale * common),
        "rank_pattern": other,
        "alpha_pattern": {layer: _whole(scale * rank) for layer, rank in other.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = intake.parse_json(intake.read_bytes(folder / CONFIG, intake.MOST_TOML))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{CONFIG} is missing or not JSON",
            where=str(folder),
            fix="give a folder that PEFT or Confrere wrote",
            code="adapter-folder",
        ) from error
    if not isinstance(config, dict):
        raise BackboneError(f"{CONFIG} is not an object", where=str(folder), fix=_ONLY, code="adapter-folder")
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise BackboneError(
                f"adapters with {key} = {config[key]!r:.80} are not supported",
                where=str(folder),
                fix=_ONLY,
                code="adapter-folder",
            )
    return config


def _scale_of(config: Mapping[str, Any], layer: str, folder: Path) -> float:
    try:
        rank = float((config.get("rank_pattern") or {}).get(layer, config["r"]))
        alpha = float((config.get("alpha_pattern") or {}).get(layer, config["lora_alpha"]))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if rank > 0 and math.isfinite(scale):
            return scale
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
        pass  # refused below
    raise BackboneError(
        f"{CONFIG} gives {layer!r} no rank and scale", where=str(folder), fix=_ONLY, code="adapter-folder"
    )


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
