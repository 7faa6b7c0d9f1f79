"""One hostile input: how it is made, how it is opened, and what must be said about it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Base:
    """Whole things that cases damage a copy of, each made once below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def data(self) -> Path:
        """A federation of two sites and two classes with pictures of 32 x 32 pixels."""
        return federation(self.root / "data", images=6, side=32)

    @cached_property
    def run(self) -> Path:
        """A finished run of two rounds on :attr:`data`."""
        from confrere.config import validate
        from confrere.job import run_experiment

        experiment = validate(
            {
                "path": str(self.data),
                "method": "fedopal",
                "controls": (),
                "rounds": 2,
                "threads": 1,
                "backbone": {"name": "test-vit"},
                "adapter": {"blocks": 2, "rank": 4},
                "train": {"steps": 2, "batch_size": 4},
            }
        )
        run_experiment(experiment, self.root / "run")
        return self.root / "run"

    @cached_property
    def backbone(self) -> Path:
        """A folder of a tiny vision transformer, as transformers writes it."""
        import torch
        from transformers import ViTConfig, ViTModel

        from confrere.backbones.quiet import quiet

        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        with torch.random.fork_rng(devices=[]), quiet():
            ViTModel(config, add_pooling_layer=False).save_pretrained(self.root / "backbone")
        return self.root / "backbone"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the corpus.

    Attributes:
        name: ``family/what``; also the folder it is made in.
        opened: key of ``hostile_open.WAYS``.
        error: name of the error's class; None when the input is to be accepted.
        says: words of the message, or of what an accepted input gives.
        names: what the error's ``where`` must hold, usually the file.
        make: writes the case into a folder; returns what is opened.
        code: stable code of the error.
    """

    name: str
    opened: str
    error: str | None
    says: str
    names: str = ""
    make: Callable[[Path, Base], Path] = field(repr=False)
    code: str = ""


def federation(root: Path, *, images: int = 1, side: int = 8) -> Path:
    """Write sites a and b, classes x and y, ``images`` pictures each; return ``root``."""
    seed = 0
    for site in "ab":
        for label in "xy":
            for _ in range(images):
                seed += 1
                write(root / site / label / f"p{seed}__1.png", encoded(picture(seed, side)))
    return root


def picture(seed: int = 0, side: int = 8, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """Write a file of ``size`` bytes that takes no room."""
    write(path, start)
    os.truncate(path, size)
    return path


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def link(path: Path, target: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock*"))
    return target


Make = Callable[[Path, Base], Path]


def refused(name: str, opened: str, error: str, says: str, names: str, make: Make) -> Case:
    return Case(name=name, opened=opened, error=error, says=says, names=names, make=make)


def accepted(name: str, opened: str, says: str, make: Make) -> Case:
    return Case(name=name, opened=opened, error=None, says=says, make=make)
