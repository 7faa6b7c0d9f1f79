"""Networks for volumes: their shapes, seeds and rules, and that they are MONAI's."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch.func import functional_call

from confrere.backbones.volumetric import Size, build
from confrere.errors import BackboneError, ConfigError, MissingExtraError
from confrere.networks import capture, initialise, output_name
from confrere.seeds import torch_generator

SMALL: Size = (16, 16, 32)


def make(name: str = "unetr", *, classes: int = 2, size: Size = SMALL, seed: int = 0, **options: Any) -> Any:
    options = {**({"hidden": 16, "depth": 3, "width": 2} if name == "unetr" else {"width": 2}), **options}
    return build(name, classes=classes, size=size, generator=torch_generator(seed, "net"), **options)


def volumes(size: Size = SMALL, batch: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch_generator(0, "volumes"))


@pytest.mark.parametrize("options", [{"patch": 4}, {"patch": 8}, {"patch": 16}, {"patch": 8, "depth": 1}])
def test_unetr_gives_a_score_for_every_voxel(options: dict[str, Any]) -> None:
    net = make(classes=3, **options)
    with capture(net) as stages:
        scores = net(volumes())
    assert scores.shape == (2, 3, *SMALL)
    patch = options["patch"]
    assert [stage.shape for stage in stages] == [(2, 16, *(side // patch for side in SMALL))] * (patch.bit_length() - 1)


def test_the_unet_gives_a_score_for_every_voxel() -> None:
    net = make("unet", classes=3, channels=2)
    with capture(net) as stages:
        scores = net(volumes(channels=2))
    assert scores.shape == (2, 3, *SMALL)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(2, 8, 8, 16), (4, 4, 4, 8), (8, 2, 2, 4), (16, 1, 1, 2)]


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_every_parameter_learns(name: str) -> None:
    net = make(name)
    net(volumes()).square().mean().backward()
    # A bias before an instance norm has no effect, and so no gradient but rounding.
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_seeds_decide_the_bytes_and_the_global_generator_does_nothing(name: str) -> None:
    before = torch.random.get_rng_state()
    one = make(name).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    two, other = make(name).state_dict(), make(name, seed=1).state_dict()
    assert save(one) == save(two)
    assert all(not torch.equal(one[key], other[key]) for key in one if one[key].ndim > 2)


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_networks_with_other_classes_differ_in_the_output_alone(name: str) -> None:
    one, three = make(name, classes=1), make(name, classes=3)
    last = output_name(one)
    assert output_name(three) == last
    for key, value in one.state_dict().items():
        assert torch.equal(value, three.state_dict()[key]) != key.startswith(last)


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_weights_go_to_a_file_and_back_and_serve_a_functional_call(name: str) -> None:
    net, other = make(name), make(name, seed=1)
    stored = load(save(net.state_dict()))
    with capture(other) as stages:
        found = functional_call(other, stored, (volumes(),))
    assert torch.equal(found, net(volumes()))
    assert stages
    first = len(stages)
    other(volumes())
    assert len(stages) == first  # nothing is kept any longer


def test_draws_follow_the_rule_of_their_layer() -> None:
    net = torch.nn.ModuleList(
        [torch.nn.Conv3d(4, 64, 3), torch.nn.ConvTranspose3d(4, 64, 3), torch.nn.Linear(108, 64), torch.nn.LayerNorm(9)]
    )
    initialise(net, torch_generator(0, "rule"))
    for layer, fan in zip(net[:3], (108, 64 * 27, 108), strict=True):
        bound = fan**-0.5
        for value in (layer.weight, layer.bias):
            assert bound * 0.9 < float(value.detach().abs().max()) <= bound
            assert abs(float(value.detach().std()) - bound / 3**0.5) < 0.15 * bound
    assert net[3].weight.eq(1).all()
    assert net[3].bias.eq(0).all()
    with pytest.raises(BackboneError, match="no rule"):
        initialise(torch.nn.BatchNorm3d(3), torch_generator(0, "rule"))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(BackboneError, match="unetr"):
        make("unter")
    for name, size in (("unet", (16, 16, 16)), ("unet", (24, 32, 32)), ("unetr", (12, 16, 16)), ("unetr", (0, 8, 8))):
        with pytest.raises(BackboneError, match="does not take") as caught:
            make(name, size=size)
        assert caught.value.code == "backbone-image-size"
    for options in ({"patch": 6}, {"hidden": 15}):
        with pytest.raises(ConfigError):
            make(**options)
    with pytest.raises(ConfigError):
        make("swinunetr", size=(32, 32, 64), width=16)
    for question in (output_name, lambda net: capture(net).__enter__()):
        with pytest.raises(BackboneError, match="Linear"):
            question(torch.nn.Linear(1, 1))


def test_a_missing_monai_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("monai", "monai.networks.nets.swin_unetr"):  # its parents may be there already
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="volumes"):
        make("swinunetr", size=(32, 32, 64), width=12)


@pytest.mark.slow
def test_unetr_and_the_unet_are_those_of_monai() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    x = volumes((32, 16, 32))
    theirs = nets.UNETR(1, 3, (32, 16, 32), feature_size=4, hidden_size=24, mlp_dim=96, num_heads=4)
    mine = build(
        "unetr",
        classes=3,
        size=(32, 16, 32),
        generator=torch_generator(0, "net"),
        width=4,
        hidden=24,
        depth=12,
        patch=16,
    )
    # Norms of a cross attention that UNETR has not.
    named = {key: value for key, value in theirs.state_dict().items() if "norm_cross_attn" not in key}
    alike(mine.state_dict(), named)
    mine.load_state_dict(named, strict=True)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-3, atol=1e-4)
    plain = nets.BasicUNet(3, 1, 3, features=(4, 4, 8, 16, 32, 4))
    mine = build("unet", classes=3, size=(32, 16, 32), generator=torch_generator(0, "net"), width=4)
    alike(mine.state_dict(), plain.state_dict())
    mine.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(mine(x), plain(x))


@pytest.mark.slow
def test_swin_unetr_is_drawn_anew_and_shows_its_stages() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    before = torch.random.get_rng_state()
    net, again = (make("swinunetr", size=(32, 32, 64), width=12) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert save(net.state_dict()) == save(again.state_dict())
    with capture(net) as stages:
        assert net(volumes((32, 32, 64), 1)).shape == (1, 2, 32, 32, 64)
    assert [tuple(s.shape[1:]) for s in stages] == [(24, 8, 8, 16), (48, 4, 4, 8), (96, 2, 2, 4), (192, 1, 1, 2)]
    theirs = nets.SwinUNETR(1, 2, feature_size=12, window_size=4)
    alike(net.state_dict(), theirs.state_dict())
    indices = [key for key, value in net.state_dict().items() if not value.is_floating_point()]
    assert indices
    assert all(torch.equal(net.state_dict()[key], theirs.state_dict()[key]) for key in indices)


def alike(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names and shapes, and large tensors spread as widely."""
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in theirs.items():
        if value.is_floating_point() and value.numel() > 500:
            assert float(mine[key].std()) == pytest.approx(float(value.std()), rel=0.25), key
