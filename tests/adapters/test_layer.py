"""The LoRA layer against PEFT's: names, function, gradients, several slots, dropout."""

from __future__ import annotations

import warnings

import peft
import peft.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from confrere.adapters.layer import LoraLinear
from confrere.errors import BackboneError

SCALE = 2.0


def linear(width: int, out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, width, out)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return layer.requires_grad_(False)


def pefts(base: nn.Linear, ranks: dict[str, int]) -> nn.Module:
    model = nn.Sequential(base)
    for slot, rank in ranks.items():
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"])
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(config, model, adapter_name=slot)
    peft.functional.set_adapter(model, list(ranks))
    return model[0]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_function_and_gradients_are_pefts(
    shape: list[int], sizes: tuple[int, int], ranks: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    named = {f"slot{i}": rank for i, rank in enumerate(ranks)}
    base = linear(*sizes, generator)
    theirs, ours = pefts(base, named), LoraLinear(base, list(named), SCALE, 0.0)
    factors = {
        f"lora_{side}.{slot}.weight": torch.randn(size, generator=generator)
        for slot, rank in named.items()
        for side, size in (("A", (rank, sizes[0])), ("B", (sizes[1], rank)))
    }
    x = torch.randn(*shape, sizes[0], generator=generator)
    found = []
    for layer in (ours, theirs):
        given = {name: value.clone().requires_grad_() for name, value in factors.items()}
        inputs = x.clone().requires_grad_()
        out = torch.func.functional_call(layer, given, (inputs,))
        found.append([out, *torch.autograd.grad(out.square().sum(), [inputs, *given.values()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_names_are_pefts() -> None:
    base = linear(3, 4, torch.Generator().manual_seed(0))
    ours, theirs = LoraLinear(base, ["general", "personal"], SCALE, 0.1), pefts(base, {"general": 1, "personal": 1})
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_all_slots_see_the_same_dropped_input_at_its_rate(rate: float) -> None:
    width = 4000
    layer = LoraLinear(nn.Linear(width, width, bias=False), ["a", "b"], 1.0, rate)
    eye, x = torch.eye(width), torch.ones(1, width)
    given = {"base_layer.weight": torch.zeros(width, width), "lora_A.a.weight": eye, "lora_B.a.weight": eye}
    given |= {"lora_A.b.weight": eye, "lora_B.b.weight": -eye}
    layer.dropout.generator = torch.Generator().manual_seed(0)
    assert not torch.func.functional_call(layer, given, (x,)).any()  # what a adds, b takes away again
    kept = torch.func.functional_call(layer, {**given, "lora_B.b.weight": torch.zeros(width, width)}, (x,))
    assert float((kept == 0).float().mean()) == pytest.approx(rate, abs=0.03)
    assert float(kept.max()) == pytest.approx(1 / (1 - rate), rel=1e-3)


def test_who_reads_the_weight_without_calling_the_layer_is_told() -> None:
    layer = LoraLinear(nn.Linear(3, 2), ("general",), 1.0, 0.0)
    with pytest.raises(BackboneError, match="without calling it"):
        _ = layer.weight
