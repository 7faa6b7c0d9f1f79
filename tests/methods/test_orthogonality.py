"""The regularisers against hand-derived numbers, and the traps of the specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from confrere.adapters.lora import init, tensor_name
from confrere.adapters.orthogonality import REGULARISERS, ROUTES, penalty
from confrere.errors import ConfigError
from confrere.seeds import torch_generator

WEIGHT_TERMS = ("W-A1", "W-A2", "W-B", "W-D")


def two_slots(layers: int, r: int, i: int, o: int, seed: int, *, zero_b: bool = False) -> dict[str, Tensor]:
    g = torch_generator(seed, "test")
    params = {}
    for layer in range(layers):
        for slot in ("general", "personal"):
            params[tensor_name(f"l{layer}", "A", slot)] = torch.randn(r, i, generator=g)
            b = torch.randn(o, r, generator=g)
            params[tensor_name(f"l{layer}", "B", slot)] = torch.zeros_like(b) if zero_b else b
    return params


def factors(params: dict[str, Tensor], layer: int) -> tuple[Tensor, ...]:
    names = [tensor_name(f"l{layer}", side, slot) for slot in ("general", "personal") for side in ("A", "B")]
    return tuple(params[n].double() for n in names)


def slow(kind: str, params: dict[str, Tensor], layers: int, normalise: bool) -> float:
    """Return the term by loops over entries and full matrices: an independent truth."""
    total = 0.0
    for layer in range(layers):
        a_g, b_g, a_k, b_k = factors(params, layer)
        if kind == "W-D":
            left, right = (b_g @ a_g).flatten(), (b_k @ a_k).flatten()
            inner = float(left @ right)
            total += (inner / float(left.norm() * right.norm()) if normalise else inner) ** 2
            continue
        rows_g, rows_k = (a_g, a_k) if kind.startswith("W-A") else (b_g.T, b_k.T)
        entries = []
        for u in rows_g:
            for v in rows_k:
                value = float(u @ v) / (float(u.norm() * v.norm()) if normalise else 1.0)
                entries.append(abs(value) if kind == "W-A1" else value**2)
        total += sum(entries) / (len(entries) if normalise else 1)
    return total / layers


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", WEIGHT_TERMS)
@given(layers=st.integers(1, 3), r=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_weight_terms_equal_the_slow_truth(kind: str, normalise: bool, layers: int, r: int, seed: int) -> None:
    params = two_slots(layers, r, 7, 5, seed)
    fast = float(penalty(kind, params, normalise=normalise))
    assert fast == pytest.approx(slow(kind, params, layers, normalise), rel=1e-4, abs=1e-6)


def test_r_cos_equals_a_loop_over_tokens() -> None:
    params = two_slots(2, 3, 6, 5, 0)
    inputs = {f"l{k}": torch.randn(2, 4, 6, generator=torch_generator(k, "x")) for k in range(2)}
    expected = []
    for layer in range(2):
        a_g, b_g, a_k, b_k = factors(params, layer)
        values = []
        for x in inputs[f"l{layer}"].double().reshape(-1, 6):
            u, v = b_g @ a_g @ x, b_k @ a_k @ x
            values.append(float(u @ v / (u.norm() * v.norm())) ** 2)
        expected.append(sum(values) / len(values))
    assert float(penalty("R-cos", params, inputs=inputs)) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_r_feat_asks_for_each_adapter_alone() -> None:
    params = two_slots(1, 2, 4, 4, 0)
    seen = []

    def features(alone: dict[str, Tensor]) -> Tensor:
        seen.append({n: float(t.abs().max()) > 0 for n, t in alone.items()})
        return sum(
            b @ a
            for a, b in [
                (alone[tensor_name("l0", "A", s)], alone[tensor_name("l0", "B", s)]) for s in ("general", "personal")
            ]
        )  # type: ignore[return-value]

    value = float(penalty("R-feat", params, features=features))  # type: ignore[arg-type]
    assert [s[tensor_name("l0", "B", "personal")] for s in seen] == [False, True]
    assert [s[tensor_name("l0", "B", "general")] for s in seen] == [True, False]
    a_g, b_g, a_k, b_k = factors(params, 0)
    u, v = b_g @ a_g, b_k @ a_k
    assert value == pytest.approx(float((u * v).sum(1).abs().div(u.norm(dim=1) * v.norm(dim=1)).mean()), rel=1e-4)


def test_raw_overlap_of_fresh_a_factors_is_r_squared_over_nine_d() -> None:
    """Trap 2: at d = 768, r = 8 the raw term starts at 0.0093, so it is nearly free."""
    r, d, values = 8, 768, []
    for seed in range(40):
        shapes = {
            tensor_name("l", side, slot): ((r, d) if side == "A" else (d, r))
            for side in "AB"
            for slot in ("general", "personal")
        }
        params = init(shapes, torch_generator(seed, "init"))  # type: ignore[arg-type]
        values.append(float(penalty("W-A2", params, normalise=False)))
    assert sum(values) / len(values) == pytest.approx(r * r / (9 * d), rel=0.05)


@pytest.mark.parametrize("kind", REGULARISERS)
@pytest.mark.parametrize("routing", ROUTES)
def test_value_and_gradient_are_finite_at_b_zero(kind: str, routing: str) -> None:
    """Trap 4: cosines are undefined at B = 0."""
    params = {n: t.requires_grad_() for n, t in two_slots(2, 3, 6, 6, 1, zero_b=True).items()}
    inputs = {f"l{k}": torch.randn(2, 3, 6) for k in range(2)}

    def features(alone: dict[str, Tensor]) -> Tensor:
        return alone[tensor_name("l0", "B", "general")] @ alone[tensor_name("l0", "A", "general")]

    value = penalty(kind, params, routing=routing, inputs=inputs, features=features)  # type: ignore[arg-type]
    assert math.isfinite(float(value.detach()))
    if value.requires_grad:
        for g in torch.autograd.grad(value, list(params.values()), allow_unused=True):
            assert g is None or bool(torch.isfinite(g).all())


@pytest.mark.parametrize(
    ("routing", "moved"),
    [("both", {"general", "personal"}), ("personal_only", {"personal"}), ("general_only", {"general"})],
)
@pytest.mark.parametrize("kind", WEIGHT_TERMS)
def test_routing_sends_the_gradient_to_one_side(kind: str, routing: str, moved: set[str]) -> None:
    params = {n: t.requires_grad_() for n, t in two_slots(1, 2, 5, 5, 3).items()}
    grads = torch.autograd.grad(penalty(kind, params, routing=routing), list(params.values()), allow_unused=True)
    touched = {n.split(".")[2] for n, g in zip(params, grads, strict=True) if g is not None and bool((g != 0).any())}
    assert touched == moved


def test_orthogonal_factors_cost_nothing_and_equal_ones_the_most() -> None:
    eye = torch.eye(6)
    orthogonal = {
        tensor_name("l0", "A", "general"): eye[:2],
        tensor_name("l0", "A", "personal"): eye[2:4],
        tensor_name("l0", "B", "general"): eye[:, :2],
        tensor_name("l0", "B", "personal"): eye[:, 2:4],
    }
    equal = {n: orthogonal[n.replace("personal", "general")] for n in orthogonal}
    for kind in WEIGHT_TERMS:
        assert float(penalty(kind, orthogonal)) == pytest.approx(0.0, abs=1e-9)
    assert float(penalty("W-D", equal)) == pytest.approx(1.0, rel=1e-5)
    assert float(penalty("W-A2", equal)) == pytest.approx(0.5)  # two of four pairs of rows coincide


def test_representation_terms_say_what_they_miss() -> None:
    params = two_slots(1, 2, 4, 4, 0)
    with pytest.raises(ConfigError, match="R-cos needs the inputs"):
        penalty("R-cos", params)
    with pytest.raises(ConfigError, match="R-feat needs the features"):
        penalty("R-feat", params)
