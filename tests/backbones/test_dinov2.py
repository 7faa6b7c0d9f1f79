"""Our DINOv2 and our form of a block are transformers' own, to the bit or to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from confrere.adapters import lora
from confrere.backbones import block
from confrere.backbones.dinov2 import DinoV2

WIDTH, DEPTH, HEADS, SIDE, PATCH = 32, 2, 2, 5, 14


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model, logging

    logging.set_verbosity_error()
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=SIDE * PATCH,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = Dinov2Model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs: nn.Module) -> DinoV2:
    model = DinoV2(WIDTH, DEPTH, HEADS, patch=PATCH, side=SIDE).eval()
    weights = {name: value for name, value in theirs.state_dict().items() if name != "embeddings.mask_token"}
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("size", [(70, 70), (42, 56), (98, 98)])
def test_tokens_are_those_of_transformers(ours: DinoV2, theirs: nn.Module, size: tuple[int, int]) -> None:
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(images), theirs(images).last_hidden_state)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_block_in_fewer_passes_is_the_same_function(ours: DinoV2, dtype: torch.dtype, near: float) -> None:
    one = DinoV2(WIDTH, DEPTH, HEADS, patch=PATCH, side=SIDE).requires_grad_(False)
    one.load_state_dict(ours.state_dict())
    layer = one.encoder.layer[0].to(dtype)
    tokens = torch.randn(4, 10, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, wanted = [], []
    for results, work in ((found, lambda t: block.forward(layer, t)), (wanted, layer)):
        given = tokens.clone().requires_grad_()
        out = work(given)
        results += [out, *torch.autograd.grad(out.float().square().mean(), given)]
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).float().norm() <= near * want.float().norm()
    first = block.forward(layer, tokens, class_token=True)
    assert first.shape == (4, 1, WIDTH)
    assert (first - wanted[0][:, :1]).float().norm() <= near * first.float().norm()


@pytest.mark.parametrize("adapted", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_the_class_token_alone_is_that_of_the_whole_block(ours: DinoV2, adapted: tuple[str, ...], bias: bool) -> None:
    one = DinoV2(WIDTH, DEPTH, HEADS, patch=PATCH, side=SIDE).requires_grad_(False)
    one.load_state_dict(ours.state_dict())
    layer = one.encoder.layer[0]
    if not bias:
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.bias = None
    spec = lora.LoraSpec(slots=("general", "personal"), blocks=1, dropout=0.0)
    lora.inject(layer, [f"attention.{name}" for name in adapted], spec)
    generator = torch.Generator().manual_seed(3)
    shapes = lora.shapes({f"attention.{name}": (WIDTH, WIDTH) for name in adapted}, {"general": 3, "personal": 2})
    factors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    tokens = torch.randn(4, 10, WIDTH, generator=generator)
    found = []
    for class_token in (True, False):
        given = {name: value.clone().requires_grad_() for name, value in {**factors, "tokens": tokens}.items()}
        wrapped = Through(layer, class_token)
        names = {f"layer.{name}": value for name, value in given.items() if name != "tokens"}
        out = torch.func.functional_call(wrapped, names, (given["tokens"],))[:, 0]
        found.append([out, *torch.autograd.grad(out.square().sum(), list(given.values()))])
    for short, whole in zip(*found, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-4)


class Through(nn.Module):
    """A block by our form, as a module."""

    def __init__(self, layer: nn.Module, class_token: bool) -> None:
        super().__init__()
        self.layer, self.class_token = layer, class_token

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return block.forward(self.layer, tokens, class_token=self.class_token)
