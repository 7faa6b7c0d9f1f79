"""Tensors: structure, names, types and seals of states, updates, adapters and backbones."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_case import Base, Case, accepted, copied, pipe, refused, sparse, write
from safetensors.torch import load, save

from confrere.method import Reply
from confrere.record.files import write_state
from confrere.record.store import DirectoryStore

STATE = {"shared": {"head.weight": torch.arange(6.0).reshape(2, 3)}}
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def blob(header: object, body: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def many(count: int) -> bytes:
    """Return one-byte tensors; a hundred thousand keep the library busy for seconds."""
    entries = (f'"g/{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    return blob(f"{{{','.join(entries)}}}".encode(), bytes(count))


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": 1}))
    return buffer.getvalue()


def structural() -> dict[str, bytes]:
    two = {"g/a": ONE, "g/b": {**ONE, "data_offsets": [8, 16]}}
    return {
        "empty": b"",
        "seven-bytes": bytes(7),
        "header-beyond-the-end": (1000).to_bytes(8, "little") + b"{}",
        "header-of-2-to-the-63": (2**63).to_bytes(8, "little") + b"{}",
        "header-no-json": blob(b'{"g/a": '),
        "header-list": blob([ONE]),
        "header-number": blob(b"{3}"),
        "header-key-twice": blob(b'{"g/a": %s, "g/a": %s}' % ((json.dumps(ONE).encode(),) * 2)),
        "header-latin-1": blob(b'{"g/\xe4": %s}' % json.dumps(ONE).encode()),
        "header-deep": blob(b'{"g/a": ' + b"[" * 100_000),
        "header-nan": blob(b'{"g/a": NaN}'),
        "metadata-no-text": blob({"__metadata__": {"a": 1}, "g/a": ONE}),
        "metadata-list": blob({"__metadata__": ["a"], "g/a": ONE}),
        "entry-number": blob({"g/a": 3}),
        "offsets-overlap": blob({**two, "g/b": ONE}),
        "offsets-gap": blob({"g/a": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
        "offsets-beyond": blob({"g/a": {**ONE, "data_offsets": [0, 8000]}}),
        "offsets-negative": blob({"g/a": {**ONE, "data_offsets": [-8, 8]}}),
        "offsets-reversed": blob({"g/a": {**ONE, "data_offsets": [8, 0]}}),
        "offsets-text": blob({"g/a": {**ONE, "data_offsets": ["0", "8"]}}),
        "offsets-missing": blob({"g/a": {"dtype": "F32", "shape": [2]}}),
        "type-unknown": blob({"g/a": {**ONE, "dtype": "OBJECT"}}),
        "type-missing": blob({"g/a": {"shape": [2], "data_offsets": [0, 8]}}),
        "type-list": blob({"g/a": {**ONE, "dtype": ["F32"]}}),
        "shape-too-large": blob({"g/a": {**ONE, "shape": [3]}}),
        "shape-negative": blob({"g/a": {**ONE, "shape": [-2]}}),
        "shape-2-to-the-63": blob({"g/a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, b""),
        "shape-missing": blob({"g/a": {"dtype": "F32", "data_offsets": [0, 8]}}),
        "cut": blob(two, bytes(15)),
        "continued": blob(two, bytes(17)),
        "hundred-thousand": many(100_000),
        "name-of-300": blob({"g/" + "a" * 300: ONE}),
        "name-control": blob({"g/\x1b[2J": ONE}),
        "name-empty": blob({"": ONE}),
        "pickle": pickle.dumps({"weight": list(range(9))}),
        "torch-zip": torch_zip(),
        "numpy-objects": _numpy_objects(),
    }


def _numpy_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def sealed(flat: dict[str, torch.Tensor], seal: object) -> bytes:
    return save(flat, {"confrere": seal if isinstance(seal, str) else json.dumps(seal)})


def _state(change: Callable[[bytes], bytes], folder: Path, base: Base) -> Path:
    path = folder / "00001.safetensors"
    write_state(path, STATE, {"round": 1})
    return write(path, change(path.read_bytes()))


def _seals() -> dict[str, tuple[str, bytes]]:
    flat = {"shared/w": torch.ones(2)}
    return {
        "no-seal": ("damaged", save(flat)),
        "seal-list": ("damaged", sealed(flat, [])),
        "seal-no-json": ("damaged", sealed(flat, "{")),
        "seal-deep": ("damaged", sealed(flat, "[" * 100_000)),
        "seal-without-digest": ("damaged", sealed(flat, {"meta": {}})),
        "seal-of-list": ("damaged", sealed(flat, {"meta": [], "digest": ""})),
        "seal-twice": ("damaged", sealed(flat, '{"meta": {}, "meta": {}, "digest": ""}')),
        "digest-wrong": ("changed since", sealed(flat, {"meta": {}, "digest": "0" * 64})),
        "digest-number": ("changed since", sealed(flat, {"meta": {}, "digest": 3})),
        "no-group": ("damaged: a tensor belongs to no group", sealed({"w": torch.ones(2)}, {"meta": {}, "digest": ""})),
        "bfloat16": ("damaged: a tensor has a type", sealed({"g/w": torch.ones(2).bfloat16()}, {})),
        "complex": ("damaged: a tensor has a type", sealed({"g/w": torch.ones(2, dtype=torch.complex64)}, {})),
    }


def _changes() -> dict[str, tuple[str, Callable[[bytes], bytes]]]:
    return {
        "cut-at-4": ("damaged", lambda b: b[:4]),
        "cut-in-header": ("damaged", lambda b: b[:60]),
        "cut-by-one": ("damaged", lambda b: b[:-1]),
        "longer-by-one": ("damaged", lambda b: b + b"\0"),
        "body-bit": ("changed since", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        "meta-changed": ("changed since", lambda b: b.replace(b'\\"round\\": 1', b'\\"round\\": 2')),
        "name-changed": ("changed since", lambda b: b.replace(b"head.weight", b"head.weighs")),
        "type-changed": ("changed since", lambda b: b.replace(b'"F32"', b'"I32"')),
        "shape-turned": ("changed since", lambda b: b.replace(b"[2,3]", b"[3,2]")),
    }


def _raw(name: str, content: bytes, folder: Path, base: Base) -> Path:
    return write(folder / name, content)


def _special(kind: str, folder: Path, base: Base) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "00001.safetensors"
    if kind == "pipe":
        return pipe(path)
    if kind == "folder":
        path.mkdir()
    if kind == "10-gb":
        return sparse(path, 10_000_000_000, blob({"g/a": ONE}))
    return path


def _site(change: dict[str, Any], folder: Path, base: Base) -> Path:
    store = DirectoryStore(folder / "a", str(change.get("site", "a")))
    store.write(change.get("round", 1), {"private": {}}, Reply(site=store.site, round=1, weight=1.0))
    if "meta" in change:
        write_state(folder / "a" / "00001.safetensors", STATE, change["meta"])
    if "round" in change:
        (folder / "a" / "00002.safetensors").rename(folder / "a" / "00001.safetensors")
    return folder / "a"


def _adapter(change: Callable[[Path], object], folder: Path, base: Base) -> Path:
    copied(base.run / "adapters" / "a" / "merged", folder / "merged")
    change(folder / "merged")
    return folder / "merged"


def config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object], name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load((folder / name).read_bytes())
        change(tensors)
        write(folder / name, save(tensors))

    return damage


def spoil(tensors: dict[str, torch.Tensor], value: float = float("nan")) -> None:
    next(iter(tensors.values())).view(-1)[0] = value


def whole(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: value.int() for name, value in tensors.items()})


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


ADAPTER = "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config-missing": ("missing or not JSON", lambda f: (f / "adapter_config.json").unlink()),
    "config-list": ("not an object", lambda f: write(f / "adapter_config.json", "[]")),
    "config-deep": ("missing or not JSON", lambda f: write(f / "adapter_config.json", "[" * 100_000)),
    "config-twice": ("missing or not JSON", lambda f: write(f / "adapter_config.json", '{"r": 1, "r": 2}')),
    "config-rank-zero": ("no rank and scale", config(r=0, rank_pattern={})),
    "config-rank-text": ("no rank and scale", config(r="x", rank_pattern={})),
    "config-alpha-missing": ("no rank and scale", config(lora_alpha=None)),
    "config-alpha-huge": ("no rank and scale", config(lora_alpha=10**400)),
    "config-pattern-list": ("no rank and scale", config(rank_pattern=["x"])),
    "config-dora": ("use_dora = True are not supported", config(use_dora=True)),
    "config-bias": ("bias = 'all' are not supported", config(bias="all")),
    "config-type": ("peft_type = 'IA3' are not supported", config(peft_type="IA3")),
    "weights-missing": ("there is no adapter_model", lambda f: (f / ADAPTER).unlink()),
    "weights-pickled": ("pickled", lambda f: (f / ADAPTER).rename(f / "adapter_model.bin")),
    "weights-nan": ("not finite", weights(spoil, ADAPTER)),
    "weights-infinite": ("not finite", weights(partial(spoil, value=float("inf")), ADAPTER)),
    "weights-whole-numbers": ("a type that does not belong", weights(whole, ADAPTER)),
    "weights-foreign-name": ("not a LoRA tensor", weights(lambda t: t.update(x=torch.ones(1)), ADAPTER)),
    "weights-half": ("do not fit together", weights(lambda t: t.pop(next(iter(t))), ADAPTER)),
    "weights-other-rank": ("do not fit together", weights(widen, ADAPTER)),
    "weights-flat": (
        "do not fit together",
        weights(lambda t: t.update({k: v.view(-1) for k, v in t.items()}), ADAPTER),
    ),
}


def cases() -> Iterator[Case]:
    for name, content in structural().items():
        raw = partial(_raw, "00001.safetensors", content)
        yield refused(f"state/{name}", "state", "RunError", "damaged", "00001.safetensors", raw)
        yield refused(f"update/{name}", "update", "RunError", "damaged", "site a, round 1", raw)
        bad = partial(_adapter, lambda folder, content=content: write(folder / ADAPTER, content))
        yield refused(f"adapter/{name}", "adapter", "BackboneError", "damaged", "merged", bad)
    for name, (says, content) in _seals().items():
        raw = partial(_raw, "00001.safetensors", content)
        yield refused(f"state/{name}", "state", "RunError", says, "00001.safetensors", raw)
    for name, (says, change) in _changes().items():
        yield refused(f"state/{name}", "state", "RunError", says, "00001.safetensors", partial(_state, change))
    for kind in ("pipe", "folder", "10-gb", "missing"):
        says = {"10-gb": "damaged", "missing": "missing"}.get(kind, "cannot be read")
        yield refused(f"state/{kind}", "state", "RunError", says, "00001.safetensors", partial(_special, kind))
    large = save({"shared/w": torch.zeros(300_000)})
    raw = partial(_raw, "update.bin", large)
    yield refused("update/too-large", "update", "RunError", "at most 1,000,000", "site a", raw)
    sites = {
        "of-another-site": ("belongs to site 'b'", {"site": "b"}),
        "of-another-round": ("round 2", {"round": 2}),
        "without-site": ("lacks 'site'", {"meta": {"round": 1}}),
        "without-weight": ("lacks 'weight'", {"meta": {"site": "a", "round": 1}}),
    }
    for name, (says, changes) in sites.items():
        yield refused(f"site/{name}", "site", "RunError", says, "00001.safetensors", partial(_site, changes))
    for name, (says, damage) in ADAPTERS.items():
        yield refused(f"adapter/{name}", "adapter", "BackboneError", says, "merged", partial(_adapter, damage))
    yield accepted("state/as-written", "state", "round 1", partial(_state, lambda content: content))
    yield accepted("adapter/as-written", "adapter", "tensors", partial(_adapter, lambda folder: None))
