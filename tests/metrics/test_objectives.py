from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confrere.errors import ConfigError
from confrere.objectives import class_weights, focal, names, objective


def batch(n=12, classes=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=g, dtype=torch.float64), torch.arange(n) % classes


def build(name, classes=4):
    return objective(name, None if name == "cross-entropy" else torch.arange(1.0, classes + 1))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8).filter(any))
def test_class_weights_balance_and_have_mean_one(counts):
    weights, images = class_weights(counts).double(), torch.tensor(counts, dtype=torch.float64)
    present = images > 0
    assert float((weights * images).sum() / images.sum()) == pytest.approx(1, abs=1e-5)
    mass = (weights * images)[present]
    assert torch.allclose(mass, mass[0].expand_as(mass), rtol=1e-5)
    assert not weights[~present].any()


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="at least one image"):
        class_weights(counts)


def test_losses_by_their_formulas():
    logits, labels = batch()
    p = logits.softmax(1)[torch.arange(12), labels]
    w = torch.arange(1.0, 5.0, dtype=torch.float64)
    torch.testing.assert_close(objective("cross-entropy")(logits, labels), -p.log().mean())
    torch.testing.assert_close(build("weighted-cross-entropy")(logits, labels), (-w[labels] * p.log()).mean())
    torch.testing.assert_close(build("focal")(logits, labels), (-w[labels] * (1 - p) ** 2 * p.log()).mean())
    torch.testing.assert_close(focal(logits, labels, gamma=0.0), -p.log().mean())


@pytest.mark.parametrize("name", names())
def test_a_batch_is_the_mean_of_its_images(name):
    logits, labels = batch()
    loss = build(name)
    each = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(loss(logits, labels), each.mean())
    grads = torch.func.vmap(torch.func.grad(lambda z, y: loss(z[None], y[None])))(logits, labels)
    torch.testing.assert_close(grads / 12, torch.func.grad(lambda z: loss(z, labels))(logits))


@pytest.mark.parametrize("name", names())
def test_gradients_are_right_and_finite_at_the_extremes(name):
    logits, labels = batch()
    loss = build(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())
    sure = (1000 * torch.nn.functional.one_hot(labels, 4)).float().requires_grad_()
    for sign in (1, -1):
        (grad,) = torch.autograd.grad(loss(sign * sure, labels), sure)
        assert torch.isfinite(grad).all()


def test_focal_cares_less_for_what_is_known():
    labels = torch.tensor([0])
    easy, hard = torch.tensor([[3.0, 0.0]]), torch.tensor([[-3.0, 0.0]])
    plain = objective("cross-entropy")
    assert focal(easy, labels) / plain(easy, labels) < 0.01 < 0.8 < focal(hard, labels) / plain(hard, labels)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("focall", None, "did you mean 'focal'"),
        ("weighted-cross-entropy", None, "needs class weights"),
        ("cross-entropy", torch.ones(2), "takes no class weights"),
        ("focal", torch.tensor([1.0, -1.0]), "not negative"),
        ("focal", torch.tensor([1.0, float("nan")]), "finite"),
    ],
)
def test_wrong_requests_are_refused(name, weights, message):
    with pytest.raises(ConfigError, match=message):
        objective(name, weights)
