"""Gates, weights of each image and shifts, against computations of their own: in a layer and in whole backbones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from confrere.adapters import lora
from confrere.adapters.layer import LoraLinear
from confrere.adapters.names import gate_name, shift_name, side_of, slot_of, tensor_name
from confrere.backbones import Backbone, load

SLOTS, RANKS, SCALE = ("left", "right"), {"left": 3, "right": 1}, 1.7
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
paths = pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])


def layer_case(**extension: bool) -> tuple[LoraLinear, dict[str, Tensor], dict[str, np.ndarray]]:
    """Return a layer (5 to 4), its tensors, and the same in float64 by short names."""
    generator = torch.Generator().manual_seed(3)
    base = nn.Linear(5, 4).requires_grad_(False)
    shapes = {"base_layer.weight": (4, 5), "base_layer.bias": (4,)}
    for slot, rank in RANKS.items():
        shapes |= {f"lora_A.{slot}.weight": (rank, 5), f"lora_B.{slot}.weight": (4, rank)}
        if "shifted" in extension:
            shapes[f"lora_shift.{slot}.weight"] = (rank,)
    if "gated" in extension:
        shapes["lora_gate.weight"] = (2, 5)
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    numbers = {name.removesuffix(".weight"): value.double().numpy() for name, value in given.items()}
    return LoraLinear(base, SLOTS, SCALE, 0.5, **extension), given, numbers


def by_hand(n: dict[str, np.ndarray], x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """``W x + b + s sum_s w_s B_s (A_s x + q_s)`` of one vector x (5,); weights w (2,), by default the gate's or 1."""
    out = n["base_layer"] @ x + n["base_layer.bias"]
    if weights is None and "lora_gate" in n:
        powers = np.exp(n["lora_gate"] @ x)
        weights = powers / powers.sum()
    for index, slot in enumerate(SLOTS):
        inner = n[f"lora_A.{slot}"] @ x + n.get(f"lora_shift.{slot}", 0.0)
        out = out + SCALE * (1.0 if weights is None else weights[index]) * (n[f"lora_B.{slot}"] @ inner)
    return out


@pytest.mark.parametrize("extension", [{"gated": True}, {"shifted": True}, {"gated": True, "shifted": True}])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
def test_gate_and_shift_of_every_token(extension: dict[str, bool], shape: tuple[int, ...]) -> None:
    layer, given, numbers = layer_case(**extension)
    x = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(4))
    found = torch.func.functional_call(layer, given, (x,)).view(-1, 4).numpy()
    for out, token in zip(found, x.view(-1, 5).double().numpy(), strict=True):
        np.testing.assert_allclose(out, by_hand(numbers, token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extension", [{}, {"shifted": True}, {"gated": True}])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_weights_of_each_image_are_those_of_all_its_tokens(extension: dict[str, bool], shape: tuple[int, ...]) -> None:
    """Weights of images win over a gate, and reach the shift as they reach A x."""
    layer, given, numbers = layer_case(**extension)
    x = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(5))
    layer.by_image = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.9, -0.2]])
    found = torch.func.functional_call(layer, given, (x,)).view(3, -1, 4).numpy()
    for image, weights in enumerate(layer.by_image.double().numpy()):
        for out, token in zip(found[image], x[image].view(-1, 5).double().numpy(), strict=True):
            np.testing.assert_allclose(out, by_hand(numbers, token, weights), rtol=1e-4, atol=1e-4)


def test_gradients_of_gate_and_shift_are_those_of_differences() -> None:
    layer, given, _ = layer_case(gated=True, shifted=True)
    names = [n for n in given if n.startswith("lora_")]
    leaves = tuple(given[n].double().requires_grad_() for n in names)
    frozen = {n: t.double() for n, t in given.items() if n not in names}
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(6)).double()

    def out(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {**frozen, **dict(zip(names, values, strict=True))}, (x,))

    assert torch.autograd.gradcheck(out, leaves)


def backbone(**extension: bool) -> Backbone:
    return load("test-vit", lora=lora.LoraSpec(slots=SLOTS, blocks=2, scale=SCALE, **extension))


def drawn(model: Backbone, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**model.adapter_shapes(RANKS), **model.extras(RANKS)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


@contextmanager
def path(model: Backbone, *, lean: bool) -> Iterator[None]:
    """Use our blocks with the class token's shortcut where it is allowed, or the library's own blocks."""
    suffix = model._suffix
    assert suffix.lean
    suffix.lean = lean
    try:
        yield
    finally:
        suffix.lean = True


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@paths
@pytest.mark.parametrize("extension", ["gated", "shifted"])
def test_every_adapted_layer_of_a_backbone_computes_it(images: np.ndarray, extension: str, lean: bool) -> None:
    model = backbone(**{extension: True})
    assert not model.shortcut
    params, tokens, seen = drawn(model), model.prefix(images), {}
    hooks = [
        model.anatomy.root.get_submodule(layer).register_forward_hook(
            lambda _, inputs, out, layer=layer: seen.update({layer: (inputs[0], out)})
        )
        for layer in model.layers
    ]
    with path(model, lean=lean):
        features = model.features(params, tokens)
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(model.layers)
    for layer, (x, out) in seen.items():
        base = model.anatomy.root.get_submodule(layer).base_layer
        numbers = {"base_layer": base.weight.double().numpy(), "base_layer.bias": base.bias.double().numpy()}
        for slot in SLOTS:
            numbers |= {f"lora_{s}.{slot}": params[tensor_name(layer, s, slot)].double().numpy() for s in "AB"}
            if extension == "shifted":
                numbers[f"lora_shift.{slot}"] = params[shift_name(layer, slot)].double().numpy()
        if extension == "gated":
            numbers["lora_gate"] = params[gate_name(layer)].double().numpy()
        for token, got in zip(x.flatten(0, -2).double().numpy()[::7], out.flatten(0, -2).numpy()[::7], strict=True):
            np.testing.assert_allclose(got, by_hand(numbers, token), rtol=1e-3, atol=1e-4)
    with path(model, lean=not lean):
        torch.testing.assert_close(features, model.features(params, tokens), **CLOSE)


@paths
def test_a_gate_of_zero_is_the_mean_of_the_slots(images: np.ndarray, lean: bool) -> None:
    """The other side is computed without a gate, by the class token's shortcut."""
    gated, simple = backbone(gated=True), backbone()
    params = drawn(gated)
    even = {n: torch.zeros_like(t) if slot_of(n) is None else t for n, t in params.items()}
    half = {n: t / 2 if side_of(n) == "B" else t for n, t in params.items() if slot_of(n)}
    tokens = simple.prefix(images)
    assert simple.shortcut
    with path(gated, lean=lean):
        torch.testing.assert_close(gated.features(even, tokens), simple.features(half, tokens), **CLOSE)


@paths
def test_a_shift_is_a_bias(images: np.ndarray, lean: bool) -> None:
    """``B (A x + q)`` is B A x with ``s B q`` added to the layer's bias, computed by the class token's shortcut."""
    shifted, simple = backbone(shifted=True), backbone()
    params, tokens = drawn(shifted), simple.prefix(images)
    before = simple.features({n: t for n, t in params.items() if slot_of(n)}, tokens)
    with torch.no_grad():
        for layer in simple.layers:
            for slot in SLOTS:
                moved = params[tensor_name(layer, "B", slot)] @ params[shift_name(layer, slot)]
                simple.anatomy.root.get_submodule(layer).base_layer.bias.add_(SCALE * moved)
    expected = simple.features({n: t for n, t in params.items() if slot_of(n)}, tokens)
    assert not torch.allclose(before, expected, atol=1e-2)
    with path(shifted, lean=lean):
        torch.testing.assert_close(shifted.features(params, tokens), expected, **CLOSE)


def image_by_image(model: Backbone, params: dict[str, Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
    """Return features with B of each slot scaled for one image at a time."""
    found = []
    for one, row in zip(tokens, weights, strict=True):
        by = dict(zip(SLOTS, row, strict=True))
        scaled = {n: t * by[str(slot_of(n))] if side_of(n) == "B" else t for n, t in params.items()}
        found.append(model.features(scaled, one[None]))
    return torch.cat(found)


@paths
def test_weighing_scales_b_image_by_image(images: np.ndarray, lean: bool) -> None:
    model = backbone()
    params, tokens = drawn(model), model.prefix(images)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 1.3], [0.0, 0.0]])
    assert model.shortcut
    expected = image_by_image(model, params, tokens, weights)
    with path(model, lean=lean), model.weighing(weights):
        assert not model.shortcut
        found = model.features(params, tokens)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert model.shortcut
    torch.testing.assert_close(model.features(params, tokens), image_by_image(model, params, tokens, torch.ones(4, 2)))


def test_weighing_has_a_gradient_and_ends_with_its_block(images: np.ndarray) -> None:
    model = backbone()
    params, tokens = drawn(model), model.prefix(images)
    weights = torch.full((4, 2), 0.5, requires_grad=True)
    with model.weighing(weights):
        model.features(params, tokens)[:, 0].sum().backward()  # not of all: the final norm fixes their sum
    assert weights.grad is not None
    assert bool((weights.grad != 0).all())
    plain = model.features(params, tokens)
    with pytest.raises(RuntimeError, match="stop"), model.weighing(weights):
        raise RuntimeError("stop")
    assert torch.equal(plain, model.features(params, tokens))


def test_weighing_in_one_thread_is_not_seen_in_another(images: np.ndarray) -> None:
    model = backbone()
    params, tokens = drawn(model), model.prefix(images)
    plain = model.features(params, tokens)
    with model.weighing(torch.zeros(4, 2)), ThreadPoolExecutor(1) as pool:
        other = pool.submit(model.features, params, tokens).result()
        assert not torch.allclose(model.features(params, tokens), plain, atol=1e-3)
    assert torch.equal(other, plain)
