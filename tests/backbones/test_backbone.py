from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from confrere.adapters import lora
from confrere.backbones import Backbone, load
from confrere.errors import BackboneError, ConfigError
from confrere.seeds import torch_generator

SPEC = lora.LoraSpec(slots=("general", "personal"), blocks=2)


def test_the_package_imports_without_torch():
    code = "import sys, confrere.backbones as b; b.names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_loading_is_repeatable_and_leaves_the_global_generator_alone(backbone, images, make_params):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load("test-vit", lora=SPEC)
    assert torch.equal(before, torch.get_rng_state())
    params = make_params(backbone)
    assert again.digest == backbone.digest
    assert again.prefix_digest == backbone.prefix_digest
    assert torch.equal(again.logits(params, again.prefix(images)), backbone.logits(params, backbone.prefix(images)))


def test_loading_is_silent(capfd):
    load("test-vit", lora=SPEC)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_shapes(backbone, images, make_params):
    tokens = backbone.prefix(images)
    assert tokens.shape == (4, 17, 32)
    assert tokens.dtype == torch.float32
    assert not tokens.requires_grad
    assert backbone.cut == 1
    assert backbone.depth == 3
    assert backbone.layers == tuple(f"layers.{i}.attention.{p}_proj" for i in (1, 2) for p in "qv")
    assert backbone.logits(make_params(backbone), tokens).shape == (4, 3)


def _plain(backbone: Backbone, params: dict[str, torch.Tensor], images: np.ndarray) -> torch.Tensor:
    """The library's own forward of the whole module, with the parameters written into it."""
    module = backbone.anatomy.root
    for name, value in params.items():
        if lora.slot_of(name):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value.detach().clone()))
    return module(pixel_values=backbone.normalise(images)).last_hidden_state


@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean"])
def test_functional_call_equals_the_ordinary_module(images, make_params, pool):
    backbone = load("test-vit", lora=SPEC, pool=pool)
    params = make_params(backbone, grad=True)
    tokens = backbone.prefix(images)
    with backbone.full_last_block():
        features = backbone.features(params, tokens)
    adapters = [name for name in params if lora.slot_of(name)]
    gradient = torch.autograd.grad(features.square().sum(), [params[n] for n in adapters])

    hidden = _plain(load_into := load("test-vit", lora=SPEC), params, images)
    pooled = {"cls": hidden[:, 0], "mean": hidden[:, 1:].mean(1)}
    pooled["cls+mean"] = torch.cat([pooled["cls"], pooled["mean"]], 1)
    owned = dict(load_into.anatomy.root.named_parameters())
    expected = torch.autograd.grad(pooled[pool].square().sum(), [owned[n] for n in adapters])
    assert torch.equal(features, pooled[pool])
    for got, want in zip(gradient, expected, strict=True):
        assert torch.equal(got, want)


def test_the_shortcut_changes_rounding_only(backbone, images, make_params):
    params = make_params(backbone, grad=True)
    tokens = backbone.prefix(images)
    assert backbone.shortcut
    with backbone.full_last_block():
        full = backbone.features(params, tokens)
    short = backbone.features(params, tokens)
    torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-5)
    names = [name for name in params if lora.slot_of(name)]
    for got, want in zip(
        torch.autograd.grad(short.sum(), [params[n] for n in names]),
        torch.autograd.grad(full.sum(), [params[n] for n in names]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_zero_adapter_is_the_base_model(backbone, images):
    params = lora.init(backbone.adapter_shapes({"general": 4, "personal": 2}), torch_generator(0, "init"))
    bare = load("test-vit", lora=lora.LoraSpec(slots=(), blocks=2))
    assert bare.cut == bare.depth
    torch.testing.assert_close(
        backbone.features(params, backbone.prefix(images)), bare.features({}, bare.prefix(images))
    )


def test_no_tensors_are_kept_between_calls(backbone, images, make_params):
    tokens = backbone.prefix(images)
    first, second = make_params(backbone), make_params(backbone, general=5, personal=1)
    before = backbone.logits(first, tokens)
    backbone.logits(second, tokens)
    assert torch.equal(before, backbone.logits(first, tokens))
    assert not any(p.requires_grad for p in backbone.anatomy.root.parameters())


def test_two_parameter_sets_in_one_graph(backbone, images, make_params):
    tokens = backbone.prefix(images)
    left, right = make_params(backbone, grad=True), make_params(backbone, grad=True)
    gap = (backbone.features(left, tokens) - 2 * backbone.features(right, tokens)).sum()
    name = next(iter(left))
    a, b = torch.autograd.grad(gap, [left[name], right[name]])
    torch.testing.assert_close(b, -2 * a)


def test_capture_gives_every_layers_full_input(backbone, images, make_params):
    params, capture = make_params(backbone), {}
    tokens = backbone.prefix(images)
    backbone.features(params, tokens, capture=capture)
    assert tuple(capture) == backbone.layers
    assert all(x.shape == (4, 17, 32) for x in capture.values())
    block = backbone.anatomy.blocks[1]
    torch.testing.assert_close(capture["layers.1.attention.q_proj"], block.layernorm_before(tokens))
    kept = {k: v.clone() for k, v in capture.items()}
    backbone.features(params, tokens * 2)
    assert all(torch.equal(kept[k], capture[k]) for k in kept)


def test_dropout_follows_its_generator_and_ends_with_the_block(backbone, images, make_params):
    params, tokens = make_params(backbone), backbone.prefix(images)
    plain = backbone.features(params, tokens)
    draws = []
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        with backbone.dropout(torch_generator(seed, "dropout")):
            draws.append(backbone.features(params, tokens))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], plain)
    assert torch.equal(plain, backbone.features(params, tokens))
    with backbone.dropout(None):
        assert torch.equal(plain, backbone.features(params, tokens))


def test_attention_is_a_distribution_over_patches(backbone, images, make_params):
    looks = backbone.attention(make_params(backbone), backbone.prefix(images))
    assert looks.shape == (4, 4, 4)
    assert (looks >= 0).all()
    assert (looks.sum((1, 2)) <= 1 + 1e-5).all()
    assert not any(m._forward_hooks for m in backbone.anatomy.root.modules())


def test_attention_equals_the_libraries_own_weights(images, make_params):
    backbone = load("test-vit", lora=SPEC)
    params = make_params(backbone)
    looks = backbone.attention(params, backbone.prefix(images))
    backbone.anatomy.root.set_attn_implementation("eager")
    _plain(backbone, params, images)
    out = backbone.anatomy.root(pixel_values=backbone.normalise(images), output_attentions=True)
    weights = out.attentions[-1].mean(1)[:, 0, 1:]
    torch.testing.assert_close(looks.flatten(1), weights / weights.sum(1, keepdim=True))


def test_describe_is_plain_data(backbone):
    import json

    text = json.loads(json.dumps(backbone.describe()))
    assert text["name"] == "test-vit"
    assert text["cut"] == 1
    assert text["parameters"] == backbone.parameters > 0
    assert "tests only" in text["provenance"]


def test_depth_keeps_the_first_blocks(images):
    short = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=1), depth=2)
    assert short.layers == ("layers.1.attention.q_proj", "layers.1.attention.v_proj")
    full = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=2))
    assert torch.equal(short.prefix(images), full.prefix(images))
    assert short.parameters < full.parameters


def test_read_only_memory_maps_are_accepted(backbone, images, tmp_path):
    np.save(tmp_path / "x.npy", images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(backbone.prefix(mapped[:2]), backbone.prefix(images)[:2])


def test_other_image_sizes_interpolate_positions():
    wide = load("test-vit", lora=SPEC, image_size=(40, 48))
    assert wide.prefix(np.zeros((1, 40, 48, 3), np.uint8)).shape == (1, 1 + 5 * 6, 32)


def test_targets(images, make_params):
    every = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=1, targets="all"))
    assert len(every.layers) == 6
    assert every.features(make_params(every, general=2), every.prefix(images)).shape == (4, 32)
    mlp = load("test-vit", lora=lora.LoraSpec(slots=("general",), blocks=1, targets=r"mlp\.fc[12]"))
    assert mlp.layers == ("layers.2.mlp.fc1", "layers.2.mlp.fc2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("layers.1.attention.q_proj.lora_A.general.weight"), "missing"),
        (
            lambda p: p.update({"layers.0.attention.q_proj.lora_A.general.weight": torch.zeros(1, 32)}),
            "belong",
        ),
        (lambda p: p.pop("head.bias"), "head"),
    ],
)
def test_wrong_names_are_refused(backbone, images, make_params, change, words):
    params = make_params(backbone)
    change(params)
    with pytest.raises(BackboneError, match=words):
        backbone.logits(params, backbone.prefix(images))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 30, 32, 3), "uint8"), ((1, 32, 32, 3), "float32"), ((32, 32, 3), "uint8")]
)
def test_wrong_images_are_refused(backbone, shape, dtype):
    with pytest.raises(BackboneError, match="uint8 of shape"):
        backbone.prefix(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 33}, "use backbone.image_size=32"),
        ({"depth": 4}, "within 1..3"),
        ({"depth": 1}, "cannot be adapted"),
        ({"sha256": "0" * 64}, "expected 0000"),
        ({"lora": lora.LoraSpec(slots=("a",), blocks=1, targets="nothing")}, "match no linear layer"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(BackboneError, match=words):
        load("test-vit", **{"lora": SPEC, **options})


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": ("a", "a")},
        {"slots": ("A b",)},
        {"blocks": 0},
        {"dropout": 1.0},
        {"scale": 0.0},
        {"targets": "("},
    ],
)
def test_spec_is_checked(wrong):
    with pytest.raises(ConfigError):
        lora.LoraSpec(**{"slots": ("general",), "blocks": 1, **wrong})
