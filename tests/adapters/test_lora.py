from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from confrere.adapters import algebra, head, lora
from confrere.backbones import load
from confrere.backbones.quiet import quiet
from confrere.errors import BackboneError, ConfigError
from confrere.record.files import write_files
from confrere.seeds import torch_generator
from confrere.tensors import pick

SLOTS = ("general", "personal")
NAME = "encoder.layer.7.attention.q_proj.lora_A.general.weight"


def test_names():
    assert lora.slot_of(NAME) == "general"
    assert lora.layer_of(NAME) == "encoder.layer.7.attention.q_proj"
    assert lora.side_of(NAME) == "A"
    assert lora.tensor_name("encoder.layer.7.attention.q_proj", "A", "general") == NAME
    for other in ("head.weight", "encoder.layer.7.lora_A.weight", "x.lora_C.general.weight"):
        assert lora.slot_of(other) is lora.layer_of(other) is lora.side_of(other) is None


def test_init_is_pefts_default_bound_and_repeatable():
    shapes = lora.shapes({"x": (400, 30)}, {"general": 16})
    values = lora.init(shapes, torch_generator(3, "init"))
    a, b = algebra.pairs(values, "general")["x"]
    assert a.shape == (16, 400)
    assert b.shape == (30, 16)
    assert (b == 0).all()
    assert 0.99 / 20 < float(a.abs().max()) <= 1 / 20
    reference = torch.empty(16, 400)
    with torch.random.fork_rng(devices=[]):
        torch.nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert float(a.std()) == pytest.approx(float(reference.std()), rel=0.05)
    again = lora.init(dict(reversed(shapes.items())), torch_generator(3, "init"))
    assert all(torch.equal(values[n], again[n]) for n in values)


def test_wrong_shapes_and_ranks_are_refused():
    with pytest.raises(ConfigError, match="rank"):
        lora.shapes({"x": (4, 4)}, {"general": 0})
    with pytest.raises(ConfigError, match=r"head\.weight"):
        lora.init({"head.weight": (2, 3)}, torch_generator(0, "x"))


def test_head():
    zero = head.init(3, 5)
    assert {n: tuple(t.shape) for n, t in zero.items()} == head.shapes(3, 5)
    assert all((t == 0).all() for t in zero.values())
    drawn = head.init(3, 5, torch_generator(0, "head"), std=0.1)
    assert torch.equal(drawn[head.WEIGHT], head.init(3, 5, torch_generator(0, "head"), std=0.1)[head.WEIGHT])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
        )
        model.save_pretrained(path)
    return path


def _peft_features(base: Path, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What a program without Confrere computes: the base from its folder, the adapter by PEFT."""
    import peft
    from transformers import AutoModel

    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed attribute
        model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(folder)).eval()
        with torch.no_grad():
            return model(pixel_values=pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize("which", ["general", "personal", "merged"])
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_plain_peft_computes_the_same_from_an_exported_folder(base, tmp_path, which, targets):
    backbone = load(base, lora=lora.LoraSpec(slots=SLOTS, blocks=2, targets=targets), image_size=32)
    generator = torch_generator(0, "params")
    shapes = backbone.adapter_shapes({"general": 4, "personal": 2})
    params = {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    if which == "merged":
        sent = algebra.merge_slots(params, SLOTS)
        active = params
    else:
        sent = pick(params, lambda n: lora.slot_of(n) == which)
        active = {n: v if lora.slot_of(n) == which else torch.zeros_like(v) for n, v in params.items()}
    write_files(tmp_path / which, lora.export(sent, scale=backbone.scale, base_name=backbone.name))
    with torch.no_grad():
        ours = backbone.features(active, backbone.prefix(images))
    theirs = _peft_features(base, tmp_path / which, backbone.normalise(images))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    back = lora.import_(tmp_path / which, slot="general", scale=backbone.scale)
    expected = {n.replace(f".{which}.", ".general."): v for n, v in sent.items()}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[n], expected[n]) for n in back)


def _exported(folder: Path, **changes: object) -> Path:
    tensors = algebra.named({"x": (torch.ones(2, 3), torch.ones(3, 2))}, "s")
    write_files(folder, lora.export(tensors, scale=2.0, base_name="base"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_the_config_is_exact_and_the_bytes_repeat(tmp_path):
    first, second = _exported(tmp_path / "a"), _exported(tmp_path / "b")
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 4
    assert config["target_modules"] == ["x"]
    assert config["base_model_name_or_path"] == "base"
    names = [p.name for p in sorted(first.iterdir())]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_unequal_ranks_survive_the_round_trip(tmp_path):
    shapes = {"m.x": 2, "m.y": 2, "m.z": 3}
    generator = torch_generator(0, "factors")
    factors = {k: (torch.randn(r, 4, generator=generator), torch.ones(5, r)) for k, r in shapes.items()}
    tensors = algebra.named(factors, "personal")
    write_files(tmp_path, lora.export(tensors, scale=1.5, base_name="base"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"m.z": 3}
    assert config["alpha_pattern"] == {"m.z": 4.5}
    back = lora.import_(tmp_path, slot="personal", scale=1.5)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_another_scale_is_folded_into_b(tmp_path):
    back = lora.import_(_exported(tmp_path), slot="s", scale=1.0)
    assert torch.equal(back[lora.tensor_name("x", "B", "s")], torch.full((3, 2), 2.0))
    assert torch.equal(back[lora.tensor_name("x", "A", "s")], torch.ones(2, 3))
    rooted = lora.import_(_exported(tmp_path, use_rslora=True), slot="s", scale=1.0)
    torch.testing.assert_close(rooted[lora.tensor_name("x", "B", "s")], torch.full((3, 2), 4 / 2**0.5))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}, {"lora_bias": True}])
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, changes):
    with pytest.raises(BackboneError, match=next(iter(changes))):
        lora.import_(_exported(tmp_path, **changes), slot="s")


def test_damaged_pickled_and_missing_files_are_refused(tmp_path):
    folder = _exported(tmp_path / "x")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(BackboneError, match="damaged"):
        lora.import_(folder, slot="s")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(BackboneError, match="pickled"):
        lora.import_(folder, slot="s")
    with pytest.raises(BackboneError, match=r"adapter_config\.json"):
        lora.import_(tmp_path / "nowhere", slot="s")


def test_one_slot_is_exported_at_a_time(tmp_path):
    two = {lora.tensor_name("x", "A", s): torch.ones(2, 3) for s in SLOTS}
    for wrong in (two, {}, {"head.weight": torch.ones(2, 3)}):
        with pytest.raises(BackboneError, match="one slot"):
            lora.export(wrong, scale=1.0, base_name="base")
