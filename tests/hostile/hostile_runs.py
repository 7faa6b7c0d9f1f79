"""Folders: backbones, journals, runs to resume, models to predict with, and the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_case import Base, Case, accepted, copied, encoded, link, picture, pipe, refused, sparse, write
from hostile_images import bomb
from hostile_tensors import spoil, structural, weights
from safetensors.torch import load, save

from confrere.record.files import write_state
from confrere.record.run import Run

Damage = Callable[[Path], object]
MODEL, HEAD, WEIGHTS = "model.safetensors", "head.safetensors", "adapter_model.safetensors"


def changed(name: str, **values: object) -> Damage:
    """Change keys of a JSON file; None takes a key out."""

    def damage(folder: Path) -> None:
        found = {**json.loads((folder / name).read_text()), **values}
        write(folder / name, json.dumps({key: value for key, value in found.items() if value is not None}))

    return damage


def replaced(name: str, content: bytes | str) -> Damage:
    return lambda folder: write(folder / name, content)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edited(name: str, old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        write(folder / name, text.replace(old, new, 1))

    return damage


def special(name: str, kind: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        {"pipe": pipe, "folder": Path.mkdir, "device": lambda path: link(path, "/dev/zero")}[kind](folder / name)

    return damage


def _detour(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / MODEL).rename(outside / MODEL)
    names = load((outside / MODEL).read_bytes())
    write(folder / "model-00001-of-00001.safetensors", save({"x": torch.ones(1)}))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, f"../outside/{MODEL}")}
    write(folder / f"{MODEL}.index.json", json.dumps(index))


def _preprocessed(**values: object) -> Damage:
    return lambda folder: write(folder / "preprocessor_config.json", json.dumps(values))


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name.replace("q_proj", "k_proj"): tensors.pop(name) for name in list(tensors)})


def _reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: value[..., :-1].contiguous() for name, value in tensors.items() if value.ndim == 2})


BACKBONES: dict[str, tuple[str, Damage]] = {
    "config-missing": ("no readable config.json", removed("config.json")),
    "config-list": ("no readable config.json", replaced("config.json", "[]")),
    "config-deep": ("no readable config.json", replaced("config.json", "[" * 100_000)),
    "config-pipe": ("no readable config.json", special("config.json", "pipe")),
    "config-remote-code": (
        "transformers cannot read",
        replaced("config.json", '{"model_type": "e", "auto_map": {"AutoModel": "e.M"}}'),
    ),
    "config-no-type": ("transformers cannot read", replaced("config.json", "{}")),
    "config-text-for-number": ("transformers cannot read", changed("config.json", hidden_size="16; x")),
    "config-negative": ("has no blocks", changed("config.json", num_hidden_layers=-1)),
    "config-patch-zero": ("transformers cannot read", changed("config.json", patch_size=0)),
    "config-other-width": ("transformers cannot read", changed("config.json", hidden_size=32)),
    "config-more-layers": ("the weights do not fill", changed("config.json", num_hidden_layers=3)),
    "config-million-layers": ("a larger model", changed("config.json", num_hidden_layers=1_000_000)),
    "config-million-wide": ("a larger model", changed("config.json", hidden_size=1_000_000)),
    "config-image-of-million": ("a larger model", changed("config.json", image_size=1_000_000)),
    "sizes-of-text": ("numbers of the wrong kind", _preprocessed(size={"height": "x", "width": "y"})),
    "mean-of-text": ("numbers of the wrong kind", _preprocessed(image_mean=["a", "b", "c"])),
    "mean-of-two": ("numbers of the wrong kind", _preprocessed(image_mean=[0.5, 0.5])),
    "std-zero": ("numbers of the wrong kind", _preprocessed(image_std=[0.5, 0, 0.5])),
    "weights-missing": ("there are no *.safetensors", removed(MODEL)),
    "weights-torch": ("pickled and could run code", lambda f: (f / MODEL).rename(f / "model.pt")),
    "weights-bin": ("pickled and could run code", lambda f: (f / MODEL).rename(f / "pytorch_model.bin")),
    "weights-pipe": ("not an ordinary file", special(MODEL, "pipe")),
    "weights-device": ("not an ordinary file", special(MODEL, "device")),
    "weights-folder": ("not an ordinary file", special(MODEL, "folder")),
    "weights-nan": ("values that are not finite", weights(spoil, MODEL)),
    "weights-other-shapes": ("transformers cannot read", weights(_reshaped, MODEL)),
    "weights-renamed": (
        "the weights do not fill",
        weights(lambda t: t.update({f"x.{n}": t.pop(n) for n in list(t)}), MODEL),
    ),
    "index-leads-out": ("names files that are not in the folder", _detour),
    "adapter-beside": ("a folder of adapters", replaced("adapter_config.json", '{"base_model_name_or_path": "../x"}')),
}


def _journal(change: Callable[[bytes], bytes], folder: Path, base: Base) -> Path:
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        run.append({"event": "round", "round": number, "sites": {}})
    write(run.events_file, change(run.events_file.read_bytes()))
    return folder


def _server(folder: Path, base: Base) -> Path:
    write_state(Run(folder).server_file(1), {"shared": {}}, {})
    return folder


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


JOURNALS: dict[str, tuple[str, str, Callable[[bytes], bytes]]] = {
    "no-json": ("line 2", "journal", lines(lambda x: [x[0], b"{\n", x[2]])),
    "list": ("line 2", "journal", lines(lambda x: [x[0], b"[1]\n", x[2]])),
    "null": ("line 1", "journal", lines(lambda x: [b"null\n", *x])),
    "deep": ("line 1", "journal", lines(lambda x: [b"[" * 100_000 + b"\n", *x])),
    "zeros": ("line 1", "journal", lambda content: bytes(len(content)) + b"\n"),
    "blank-line": ("line 2", "journal", lines(lambda x: [x[0], b"\n", *x[1:]])),
    "cut-amid": ("line 2", "journal", lines(lambda x: [x[0], x[1][:20] + b"\n", x[2]])),
    "number-changed": ("line 2", "journal", lines(lambda x: [x[0], x[1].replace(b'"round": 2', b'"round": 9'), x[2]])),
    "seal-changed": ("line 2", "journal", lines(lambda x: [x[0], x[1][:-10] + b"0" * 7 + x[1][-3:], x[2]])),
    "line-taken-out": ("line 2", "journal", lines(lambda x: [x[0], x[2]])),
    "line-twice": ("line 3", "journal", lines(lambda x: [x[0], x[1], x[1], x[2]])),
    "lines-swapped": ("line 2", "journal", lines(lambda x: [x[0], x[2], x[1]])),
    "first-taken-out": ("line 1", "journal", lines(lambda x: x[1:])),
    "utf-16": ("line 1", "journal", lambda content: content.decode().encode("utf-16")),
}


def _run(damage: Damage, folder: Path, base: Base, *, finished: bool = False) -> Path:
    run = copied(base.run, folder / "run")
    if not finished:
        (run / "results.json").unlink()
    damage(run)
    return run


def _data(damage: Damage, folder: Path, base: Base) -> Path:
    """Change the data of a run between its start and its continuation."""
    data = copied(base.data, folder / "data")
    damage(data)
    return _run(edited("experiment.toml", str(base.data), str(data)), folder, base)


def _flipped(folder: Path) -> None:
    path = next(iter(sorted((folder / "a" / "x").iterdir())))
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))


def _moved(run: Path) -> None:
    lines = (run / "splits.csv").read_text().splitlines()
    moved = [line.replace(",test", ",train") for line in lines]
    write(run / "splits.csv", "\n".join(moved) + "\n")


RESUMES: dict[str, tuple[str, str, str, Damage]] = {
    "experiment-missing": ("RunError", "no run here", "run", removed("experiment.toml")),
    "experiment-folder": ("ConfigError", "cannot be read", "experiment.toml", special("experiment.toml", "folder")),
    "experiment-pipe": ("ConfigError", "cannot be read", "experiment.toml", special("experiment.toml", "pipe")),
    "experiment-cut": (
        "ConfigError",
        "not valid TOML",
        "experiment.toml",
        edited("experiment.toml", "[adapter]", "[adapter"),
    ),
    "experiment-key-twice": (
        "ConfigError",
        "not valid TOML",
        "experiment.toml",
        edited("experiment.toml", "rounds = 2", "rounds = 2\nrounds = 3"),
    ),
    "experiment-unknown-key": (
        "ConfigError",
        "unknown key",
        "roundz",
        edited("experiment.toml", "rounds =", "roundz ="),
    ),
    "experiment-changed": (
        "RunError",
        "changed since this run began",
        "run",
        edited("experiment.toml", "seed = 0", "seed = 1"),
    ),
    "machine-missing": ("RunError", "missing", "machine.json", removed("machine.json")),
    "machine-list": ("RunError", "damaged", "machine.json", replaced("machine.json", "[]")),
    "machine-cut": ("RunError", "damaged", "machine.json", replaced("machine.json", '{"a": ')),
    "machine-nan": ("RunError", "damaged", "machine.json", replaced("machine.json", '{"a": NaN}')),
    "machine-pipe": ("RunError", "cannot be read", "machine.json", special("machine.json", "pipe")),
    "federation-without-digest": (
        "RunError",
        "lacks 'digest'",
        "federation.json",
        changed("federation.json", digest=None),
    ),
    "federation-other-digest": ("RunError", "the data changed", "run", changed("federation.json", digest="0" * 64)),
    "federation-deep": ("RunError", "damaged", "federation.json", replaced("federation.json", "[" * 100_000)),
    "federation-rather-deep": (
        "RunError",
        "",
        "federation",
        replaced("federation.json", '{"a": ' * 900 + "1" + "}" * 900),
    ),
    "federation-folder": ("RunError", "cannot be read", "federation.json", special("federation.json", "folder")),
    "splits-row-gone": (
        "DataError",
        "1 new, 0 gone",
        "splits.csv",
        lambda r: write(r / "splits.csv", "\n".join((r / "splits.csv").read_text().splitlines()[:-1])),
    ),
    "splits-unknown": ("DataError", "not train, val or test", "splits.csv", edited("splits.csv", ",train", ",trian")),
    "splits-header": ("DataError", "'sha256' is missing", "splits.csv", edited("splits.csv", "sha256", "sha")),
    "splits-moved": ("RunError", "the data changed", "run", _moved),
    "splits-utf-16": ("DataError", "UTF-16 or binary", "splits.csv", replaced("splits.csv", "s\0i\0")),
    "journal-no-json": (
        "RunError",
        "journal",
        "line 1",
        lambda r: write(r / "events.jsonl", b"null\n" + (r / "events.jsonl").read_bytes()),
    ),
    "journal-changed": ("RunError", "journal", "events.jsonl", edited("events.jsonl", '"round": 1', '"round": 7')),
}
DATA: dict[str, Damage] = {
    "picture-flipped": _flipped,
    "picture-gone": lambda data: next((data / "a" / "x").iterdir()).unlink(),
    "picture-new": lambda data: write(data / "a" / "x" / "new.png", encoded(picture(99))),
    "picture-exchanged": lambda data: shutil.copy(
        next((data / "b" / "x").iterdir()), next((data / "a" / "x").iterdir())
    ),
    "picture-link-out": lambda data: special("p1__1.png", "device")(data / "a" / "x"),
}


def _taken(damage: Damage, folder: Path, base: Base) -> Path:
    """Damage what site a took home."""
    return _run(lambda run: damage(run / "adapters" / "a"), folder, base, finished=True)


def _slots(run: Path) -> None:
    shutil.copytree(run / "merged", run.parent.parent / "elsewhere")
    changed("head.json", slots=["../../elsewhere"])(run)


PREDICTS: dict[str, tuple[str, str, str, Damage]] = {
    "info-list": ("RunError", "damaged", "head.json", replaced("head.json", "[]")),
    "info-cut": ("RunError", "damaged", "head.json", replaced("head.json", '{"classes"')),
    "info-without-slots": ("RunError", "slots", "head.json", changed("head.json", slots=None)),
    "info-slots-lead-out": ("RunError", "names no folder", "adapters", _slots),
    "info-slots-number": ("RunError", "slots", "head.json", changed("head.json", slots=[3])),
    "info-slots-empty": ("RunError", "slots", "head.json", changed("head.json", slots=[])),
    "info-one-class": ("RunError", "classes", "head.json", changed("head.json", classes=["x"])),
    "info-three-classes": ("RunError", "do not fit", "adapters", changed("head.json", classes=["x", "y", "z"])),
    "info-temperature-zero": ("RunError", "temperature", "head.json", changed("head.json", temperature=0.0)),
    "info-temperature-nan": ("RunError", "damaged", "head.json", changed("head.json", temperature=float("nan"))),
    "info-temperature-text": ("RunError", "temperature", "head.json", changed("head.json", temperature="1")),
    "info-scale-zero": ("RunError", "scale", "head.json", changed("head.json", scale=0)),
    "info-depth-text": ("RunError", "depth", "head.json", changed("head.json", depth="3")),
    "info-depth-huge": ("BackboneError", "depth", "test-vit", changed("head.json", depth=10**9)),
    "info-size-of-three": ("RunError", "image_size", "head.json", changed("head.json", image_size=[8, 8, 8])),
    "info-size-odd": (
        "BackboneError",
        "multiple of the patch size",
        "test-vit",
        changed("head.json", image_size=[33, 33]),
    ),
    "info-targets-broken": ("ConfigError", "not a regular", "targets", changed("head.json", targets="[")),
    "info-targets-endless": (
        "BackboneError",
        "repeats groups",
        "adapter.targets",
        changed("head.json", targets="(a+)+$"),
    ),
    "info-targets-many": (
        "BackboneError",
        "repeats too often",
        "adapter.targets",
        changed("head.json", targets=".*" * 12 + "x"),
    ),
    "info-pool-unknown": ("RunError", "pool", "head.json", changed("head.json", pool="max")),
    "info-method-unknown": ("ConfigError", "unknown method", "method", changed("head.json", method={"name": "x"})),
    "info-method-nameless": ("RunError", "lacks 'name'", "head.json", changed("head.json", method={})),
    "info-method-number": ("RunError", "method", "head.json", changed("head.json", method=3)),
    "info-other-backbone": ("BackboneError", "SHA-256", "generated", changed("head.json", backbone_sha256="0" * 64)),
    "head-missing": ("RunError", "head is missing", HEAD, removed(HEAD)),
    "head-nan": ("RunError", "not finite", HEAD, weights(spoil, HEAD)),
    "head-other-shape": ("RunError", "do not fit", "adapters", weights(_reshaped, HEAD)),
    "head-without-bias": (
        "RunError",
        "head's tensors are missing",
        "adapters",
        weights(lambda t: t.pop("head.bias"), HEAD),
    ),
    "head-pipe": ("RunError", "not an ordinary file", HEAD, special(HEAD, "pipe")),
    "adapter-missing": ("BackboneError", "missing or not JSON", "merged", lambda f: shutil.rmtree(f / "merged")),
    "adapter-nan": ("BackboneError", "not finite", "merged", lambda f: weights(spoil, WEIGHTS)(f / "merged")),
    "adapter-of-other-layers": ("RunError", "tensors", "adapters", lambda f: weights(_renamed, WEIGHTS)(f / "merged")),
    "experiment-backbone-number": (
        "",
        "6 images",
        "",
        lambda f: write(f.parent.parent / "experiment.toml", "backbone = 3\n"),
    ),
    "experiment-broken": (
        "ConfigError",
        "not valid TOML",
        "experiment.toml",
        lambda f: write(f.parent.parent / "experiment.toml", "x"),
    ),
}


def _images(folder: Path, base: Base) -> Path:
    images = folder / "images"
    shutil.copytree(base.data / "a" / "x", images)
    pipe(images / "pipe.png")
    link(images / "away.png", "/etc/hostname")
    write(images / "bomb.png", bomb(13_000))
    write(images / "empty.png", b"")
    write(images / "=1+1.png", encoded(picture(7)))
    sparse(images / "huge.png", 2_000_000_000, b"\x89PNG\r\n\x1a\n")
    return _run(lambda run: None, folder, base, finished=True)


def _cache(damage: Callable[[Path, Path], object], folder: Path, base: Base) -> Path:
    """Fill a cache, then damage its array and its facts."""
    from hostile_open import cache

    folder.mkdir(parents=True, exist_ok=True)
    cache(folder, base)
    damage(next(folder.glob("*.npy")), next(folder.glob("*.json")))
    return folder


def _object_array(array: Path, facts: Path) -> None:
    with array.open("wb") as file:
        np.save(file, np.array([{"a": 1}] * 6, dtype=object), allow_pickle=True)


CACHES: dict[str, Callable[[Path, Path], Any]] = {
    "array-empty": lambda array, facts: write(array, b""),
    "array-cut": lambda array, facts: write(array, array.read_bytes()[:200]),
    "array-flipped": lambda array, facts: write(array, array.read_bytes()[:-1] + b"\0"),
    "array-of-objects": _object_array,
    "array-zip": lambda array, facts: write(array, b"PK\x03\x04" + bytes(100)),
    "array-bad-header": lambda array, facts: write(array, b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((((" + bytes(99)),
    "array-huge": lambda array, facts: write(array, array.read_bytes().replace(b"(6, 8, 8, 3)", b"(6, 8,9**9,)")),
    "facts-list": lambda array, facts: write(facts, "[]"),
    "facts-deep": lambda array, facts: write(facts, "[" * 100_000),
    "facts-without-bad": lambda array, facts: write(
        facts, json.dumps({k: v for k, v in json.loads(facts.read_text()).items() if k != "bad"})
    ),
    "facts-bad-list": lambda array, facts: write(facts, json.dumps({**json.loads(facts.read_text()), "bad": [1]})),
}


def cases() -> Iterator[Case]:
    for name, (says, damage) in BACKBONES.items():
        yield refused(f"backbone/{name}", "backbone", "BackboneError", says, "", partial(_backbone, damage))
    for name, content in structural().items():
        made = partial(_backbone, replaced(MODEL, content))
        yield refused(f"backbone/file-{name}", "backbone", "BackboneError", "", "backbone", made)
        head = partial(_taken, replaced(HEAD, content))
        yield refused(f"predict/head-{name}", "predict", "RunError", "head is missing or damaged", HEAD, head)
    for name, (where, says, change) in JOURNALS.items():
        yield refused(f"journal/{name}", "journal", "RunError", says, where, partial(_journal, change))
    yield accepted(
        "journal/torn-end", "journal", "3 events, round 3", partial(_journal, lambda c: c + b'{"event": "ro')
    )
    yield accepted("journal/empty", "journal", "0 events", partial(_journal, lambda c: b""))
    for name, (error, says, where, damage) in RESUMES.items():
        yield refused(f"resume/{name}", "resume", error, says, where, partial(_run, damage))
    for name, damage in DATA.items():
        made = partial(_data, damage)
        yield refused(f"resume/{name}", "resume", "DataError", "the images changed", "splits.csv", made)
    relabelled = partial(_data, lambda data: shutil.move(next((data / "a" / "x").iterdir()), data / "a" / "y"))
    yield refused("resume/picture-relabelled", "resume", "RunError", "the data changed", "run", relabelled)
    yield refused("server/without-round", "server", "RunError", "lacks 'round'", "00001.safetensors", _server)
    yield accepted("resume/as-it-was", "resume", "finished", partial(_run, lambda run: None))
    yield accepted("resume/data-elsewhere", "resume", "finished", partial(_data, lambda data: None))
    for name, (error, says, where, damage) in PREDICTS.items():
        made = partial(_taken, damage)
        known = refused(f"predict/{name}", "predict", error, says, where, made)
        yield known if error else accepted(f"predict/{name}", "predict", says, made)
    yield accepted("predict/odd-images", "predict", "\n./=1+1.png,", _images)
    for name, spoilt in CACHES.items():
        yield accepted(f"cache/{name}", "cache", "(6, 8, 8, 3) {}", partial(_cache, spoilt))


def _backbone(damage: Damage, folder: Path, base: Base) -> Path:
    made = copied(base.backbone, folder / "backbone")
    damage(made)
    return made
