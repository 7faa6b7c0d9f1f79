"""The timm zoo; runs where timm and a matching torchvision are installed: ``pytest -m timm``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from confrere.adapters import lora
from confrere.backbones import load
from confrere.errors import BackboneError

pytestmark = pytest.mark.timm
SPEC = lora.LoraSpec(slots=("general", "personal"), blocks=2)


def _save(architecture: str, path: Path, **options: object) -> torch.nn.Module:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    from timm.models import save_for_hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, pretrained=False, **options).eval()
    save_for_hf(model, path, safe_serialization=True)
    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit2", "test_vit4"])
def test_a_timm_folder_equals_timms_own_forward(tmp_path, architecture, images, make_params, capfd):
    model = _save(architecture, tmp_path)
    capfd.readouterr()
    backbone = load(tmp_path, lora=SPEC)
    assert capfd.readouterr() == ("", "")
    assert backbone.image_size == (160, 160)
    assert backbone.cut == backbone.depth - 2
    assert all(layer.endswith("attn.qkv") for layer in backbone.layers)
    zero = lora.init(backbone.adapter_shapes({"general": 4, "personal": 2}), torch.Generator())
    tokens = backbone.prefix(images)
    with torch.no_grad():
        expected = model(backbone.normalise(images))
        torch.testing.assert_close(backbone.features(zero, tokens), expected, rtol=1e-4, atol=1e-5)
    params = make_params(backbone, grad=True)
    gradients = torch.autograd.grad(backbone.logits(params, tokens).square().sum(), list(params.values()))
    assert all(g.abs().sum() > 0 for g in gradients)
    looks = backbone.attention(params, tokens)
    assert looks.shape == (2, 10, 10)
    torch.testing.assert_close(looks.sum((1, 2)), torch.ones(2))


def test_other_sizes_and_depths(tmp_path):
    _save("test_vit", tmp_path)
    backbone = load(tmp_path, lora=lora.LoraSpec(slots=("general",), blocks=1), depth=3, image_size=(96, 128))
    images = np.zeros((1, 96, 128, 3), np.uint8)
    zero = lora.init(backbone.adapter_shapes({"general": 2}), torch.Generator())
    assert backbone.features(zero, backbone.prefix(images)).shape == (1, backbone.feature_dim)
    with pytest.raises(BackboneError, match="multiple of the patch size"):
        load(tmp_path, lora=SPEC, image_size=100)


def test_other_architectures_run_whole(tmp_path, images):
    model = _save("test_convnext", tmp_path)
    spec = lora.LoraSpec(slots=("general",), blocks=1, targets=r".*mlp\.fc1")
    whole = load(tmp_path, lora=spec, image_size=160)
    assert whole.cut == 0
    zero = lora.init(whole.adapter_shapes({"general": 2}), torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(
            whole.features(zero, whole.prefix(images)), model(whole.normalise(images)), rtol=1e-4, atol=1e-5
        )


def test_unknown_and_unreachable_models():
    pytest.importorskip("timm", exc_type=ImportError)
    with pytest.raises(BackboneError, match=r"did you mean .*vit_small"):
        load("timm:vit_smal_patch16_224", lora=SPEC)
    for name in ("timm:test_vit", "hf-hub:timm/test_vit.r160_in1k", "vit-small-augreg"):
        with pytest.raises(BackboneError, match="the hub did not give it"):
            load(name, lora=SPEC)
