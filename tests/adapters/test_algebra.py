from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.adapters import algebra
from confrere.adapters.names import tensor_name
from confrere.seeds import torch_generator

SIDE, RANK = st.integers(2, 12), st.integers(1, 5)
SIZES = st.tuples(SIDE, SIDE, RANK, RANK, st.integers(0, 999))


def _pair(i: int, o: int, r: int, *address: int) -> algebra.Pair:
    generator = torch_generator(0, *address)
    return (
        torch.randn(r, i, generator=generator, dtype=torch.float64),
        torch.randn(o, r, generator=generator, dtype=torch.float64),
    )


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_inner_norm_and_cosine_equal_the_full_matrices(sizes):
    i, o, r1, r2, seed = sizes
    left, right = _pair(i, o, r1, seed, 0), _pair(i, o, r2, seed, 1)
    full_l, full_r = algebra.product(left), algebra.product(right)
    torch.testing.assert_close(algebra.inner(left, right), (full_l * full_r).sum())
    torch.testing.assert_close(algebra.norm(left), full_l.norm())
    cosine = ((full_l * full_r).sum() / full_l.norm() / full_r.norm()).abs()
    assert algebra.product_cosine(left, right) == pytest.approx(float(cosine), abs=1e-9)
    assert algebra.product_cosine(left, left) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 8))
def test_refactor_is_the_truncated_svd(sizes, rank):
    i, o, r1, r2, seed = sizes
    pair = algebra.concat([_pair(i, o, r1, seed, 0), _pair(i, o, r2, seed, 1)], [0.3, 0.7])
    a, b = algebra.refactor(pair, rank)
    assert a.shape == (rank, i)
    assert b.shape == (o, rank)
    u, s, v = torch.linalg.svd(algebra.product(pair), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(b @ a, best, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-7, atol=1e-7)


def test_concat_is_the_weighted_sum():
    left, right = _pair(6, 5, 2, 0), _pair(6, 5, 3, 1)
    expected = 0.25 * algebra.product(left) + 0.75 * algebra.product(right)
    torch.testing.assert_close(algebra.product(algebra.concat([left, right], [0.25, 0.75])), expected)


def test_merge_slots_adds_the_products():
    params = algebra.named({"x.q": _pair(6, 5, 2, 0)}, "general")
    params |= algebra.named({"x.q": _pair(6, 5, 3, 1)}, "personal")
    merged = algebra.pairs(algebra.merge_slots(params, ("general", "personal")), "merged")
    assert merged["x.q"][0].shape == (5, 6)
    expected = sum(algebra.product(algebra.pairs(params, slot)["x.q"]) for slot in ("general", "personal"))
    torch.testing.assert_close(algebra.product(merged["x.q"]), expected)


def test_average_products_is_exact_when_the_rank_suffices_and_keeps_unequal_ranks():
    sent = [
        (3.0, algebra.named({"x": _pair(7, 6, 2, 0)}, "general")),
        (1.0, algebra.named({"x": _pair(7, 6, 3, 1)}, "general")),
    ]
    mean = 0.75 * algebra.product(_pair(7, 6, 2, 0)) + 0.25 * algebra.product(_pair(7, 6, 3, 1))
    full = algebra.average_products(sent, "general", rank=5)
    torch.testing.assert_close(algebra.product(algebra.pairs(full, "general")["x"]), mean)
    assert algebra.pairs(algebra.average_products(sent, "general"), "general")["x"][0].shape == (3, 7)
    with pytest.raises(ValueError, match="positive weight"):
        algebra.average_products([], "general")


def test_averaging_one_site_with_itself_changes_nothing():
    tensors = algebra.named({"x": tuple(t.float() for t in _pair(9, 8, 3, 4))}, "general")
    again = algebra.average_products([(1.0, tensors), (2.0, tensors)], "general")
    assert again[tensor_name("x", "A", "general")].dtype == torch.float32
    torch.testing.assert_close(
        algebra.product(algebra.pairs(again, "general")["x"]),
        algebra.product(algebra.pairs(tensors, "general")["x"]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_overlap_by_hand():
    rows = torch.eye(4)
    assert algebra.row_overlap(rows[:2], rows[2:]) == 0
    assert algebra.row_overlap(rows[:2], rows[:2] * 7) == pytest.approx(1)
    assert algebra.row_overlap(rows[:2], rows[1:3]) == pytest.approx(0.5)
    assert algebra.row_overlap(rows[:1], rows[:3]) == pytest.approx(1)
    assert algebra.column_overlap(rows[:, :2], rows[:, 1:3]) == pytest.approx(0.5)
    doubled = torch.stack([rows[0], 2 * rows[0]])  # rank 1 although r = 2
    assert algebra.row_overlap(doubled, rows[:2]) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_overlap_is_bounded_symmetric_and_ignores_scale(sizes):
    i, o, r1, r2, seed = sizes
    left, right = _pair(i, o, r1, seed, 0)[0], _pair(i, o, r2, seed, 1)[0]
    value = algebra.row_overlap(left, right)
    assert value is not None
    assert 0 <= value <= 1
    assert value == pytest.approx(algebra.row_overlap(right, left))
    assert value == pytest.approx(algebra.row_overlap(left * -3, right))


def test_everything_is_defined_at_zero():
    a, b = _pair(5, 4, 2, 0)
    zero = (a, torch.zeros_like(b))
    assert algebra.product_cosine(zero, (a, b)) is None
    assert algebra.column_overlap(zero[1], b) is None
    assert float(algebra.inner(zero, zero)) == float(algebra.norm(zero)) == 0
    new_a, new_b = algebra.refactor(zero, 2)
    assert torch.isfinite(new_a).all()
    assert (new_b @ new_a == 0).all()
