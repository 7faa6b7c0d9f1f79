"""Named tensors and addressed randomness: the algebra every result rests on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confrere.seeds import derive, numpy_generator, torch_generator
from confrere.tensors import digest, dot, flatten, n_bytes, pick, sq_dist, sub, unflatten, weighted_mean

numbers = st.floats(-1e3, 1e3, width=32)
weights = st.floats(0.01, 1e4)
parts = st.text(min_size=1, max_size=6) | st.integers(-(10**6), 10**6)


@given(items=st.lists(st.tuples(weights, numbers, numbers), min_size=1, max_size=5))
def test_the_weighted_mean_is_the_textbooks(items: list[tuple[float, float, float]]) -> None:
    found = weighted_mean([(w, {"x": torch.tensor([a, b])}) for w, a, b in items])["x"]
    total = sum(w for w, _, _ in items)
    expected = [sum(w * v[k] for w, *v in items) / total for k in (0, 1)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-3)


@given(value=numbers, ws=st.lists(weights, min_size=1, max_size=4))
def test_the_mean_of_equals_is_that_value(value: float, ws: list[float]) -> None:
    mean = weighted_mean([(w, {"x": torch.tensor([value])}) for w in ws])["x"]
    assert mean.item() == pytest.approx(value, rel=1e-6)


def test_one_item_is_returned_bit_for_bit_and_the_input_kept() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    found = weighted_mean([(17.3, {"x": x})])["x"]
    assert torch.equal(found, x)
    found.add_(1)
    assert torch.equal(x, kept)


def test_a_small_site_is_not_lost_beside_a_large_one() -> None:
    mean = weighted_mean([(1e8, {"x": torch.tensor([1.0])}), (1.0, {"x": torch.tensor([1e8])})])["x"]
    assert mean.item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one item"),
        ([(0.0, {"x": torch.ones(1)})], "positive weight"),
        ([(float("nan"), {"x": torch.ones(1)})], "positive weight"),
        ([(1.0, {"x": torch.ones(1)}), (1.0, {"y": torch.ones(1)})], "names differ"),
        ([(1.0, {"x": torch.ones(1)}), (1.0, {})], "names differ"),
        ([(1.0, {"x": torch.ones(1)}), (1.0, {"x": torch.ones(2)})], "shapes differ for x"),
    ],
)
def test_a_mean_that_makes_no_sense_is_refused(
    items: list[tuple[float, dict[str, torch.Tensor]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mean(items)


def test_differences_products_and_distances() -> None:
    left = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])}
    right = {"y": torch.tensor([[1.0]]), "x": torch.tensor([0.0, 4.0])}
    assert {n: t.tolist() for n, t in sub(left, right).items()} == {"x": [1.0, -2.0], "y": [[2.0]]}
    assert float(dot(left, right)) == 8.0 + 3.0
    assert dot(left, right).dtype == torch.float64
    assert float(sq_dist(left, right)) == 1.0 + 4.0 + 4.0
    assert float(dot({}, {})) == float(sq_dist({}, {})) == 0.0
    assert list(pick(left, lambda n: n == "y")) == ["y"]


def test_the_distance_has_a_gradient() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(sq_dist({"x": x}, {"x": torch.zeros(2)}), x)
    assert gradient.tolist() == [2.0, 4.0]


names = st.text(min_size=1, max_size=6)


@given(st.dictionaries(names.filter(lambda g: "/" not in g), st.dictionaries(names, numbers, min_size=1), max_size=3))
def test_flat_states_unfold_again(values: dict[str, dict[str, float]]) -> None:
    state = {g: {n: torch.tensor(v) for n, v in tensors.items()} for g, tensors in values.items()}
    back = unflatten(flatten(state))
    assert {g: list(t) for g, t in back.items()} == {g: list(t) for g, t in state.items()}
    assert digest(back) == digest(state)


def test_a_digest_sees_names_types_shapes_and_bits_but_not_order() -> None:
    base = {"g": {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0])}}
    variants = [
        {"h": base["g"]},
        {"g": {"x": base["g"]["x"]}},
        {"g": {**base["g"], "y": torch.tensor([[3.0]])}},
        {"g": {**base["g"], "y": torch.tensor([3.0], dtype=torch.float64)}},
        {"g": {**base["g"], "y": torch.nextafter(torch.tensor([3.0]), torch.tensor([4.0]))}},
        {"g": {"x": torch.tensor([0.0]), "y": torch.tensor([-0.0])}},
        {"g": {"x": torch.tensor([-0.0]), "y": torch.tensor([0.0])}},
    ]
    assert len({digest(v) for v in [base, *variants]}) == len(variants) + 1
    assert digest({"g": dict(reversed(base["g"].items()))}) == digest(base)
    turned = torch.arange(6.0).reshape(2, 3).T
    assert digest({"g": {"x": turned}}) == digest({"g": {"x": turned.contiguous()}})


def test_bytes_are_counted_by_type() -> None:
    state = {"a": {"x": torch.zeros(3), "y": torch.zeros(2, dtype=torch.float64)}, "b": {"z": torch.zeros(())}}
    assert n_bytes(state) == 12 + 16 + 4
    assert n_bytes({}) == n_bytes({"a": {}}) == 0


def test_the_addresses_of_earlier_versions_still_hold() -> None:
    """These numbers decide what a resumed run draws: a change breaks every unfinished run."""
    assert derive(0) == 4761921975702974394
    assert derive(0, "batches", 1, "a") == 6204231185472740305
    assert derive(2**31 - 1, "init", "general") == 6138634015974934324
    assert numpy_generator(0, "cohort", 1).permutation(6).tolist() == [2, 4, 3, 0, 1, 5]


@given(seed=st.integers(0, 2**63), path=st.lists(parts, max_size=4))
def test_a_seed_is_63_bits_and_repeats(seed: int, path: list[str | int]) -> None:
    found = derive(seed, *path)
    assert 0 <= found < 2**63
    assert derive(seed, *path) == found


slugs = st.lists(st.from_regex(r"[a-z0-9_.-]{1,6}", fullmatch=True) | st.integers(0, 99), max_size=4)


@given(one=st.tuples(st.integers(0, 9), slugs), two=st.tuples(st.integers(0, 9), slugs))
def test_other_addresses_draw_otherwise(one: tuple[int, list[str | int]], two: tuple[int, list[str | int]]) -> None:
    same = repr(one) == repr(two)  # 1 and "1" are two addresses
    assert (derive(one[0], *one[1]) == derive(two[0], *two[1])) == same


def test_generators_are_fresh_and_leave_the_global_ones_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    one, two = torch_generator(0, "x"), torch_generator(0, "x")
    assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=two))
    assert not torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=torch_generator(0, "y")))
    assert numpy_generator(0, "x").random() == numpy_generator(0, "x").random()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
