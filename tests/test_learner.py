"""Local training: batches with addresses, balance, no global randomness, an optimiser step by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_federation import CLASSES, initial_params, tiny_backbone, tiny_data

from confrere.errors import TrainingError
from confrere.learner import Learner, TokenSet, TrainSettings
from confrere.method import make
from confrere.tensors import digest

SLOTS = ("general",)


def learner(data: TokenSet | None = None, **settings: object) -> Learner:
    backbone = tiny_backbone(SLOTS)
    return Learner(
        backbone=backbone,
        data=data or tiny_data(backbone, "a"),
        settings=TrainSettings(**{"steps": 3, "batch_size": 4, **settings}),  # type: ignore[arg-type]
        seed=0,
        site="a",
        round=1,
        rounds=3,
    )


def skewed() -> TokenSet:
    """Return data in which one class has one training image and another none."""
    data = tiny_data(tiny_backbone(SLOTS), "a", 40)
    train = data.rows("train")
    labels = np.zeros_like(data.labels)
    labels[train[0]] = 1
    return replace(data, labels=labels)


def test_balanced_sampling_draws_the_classes_that_are_there_equally() -> None:
    drawn = torch.cat([b.labels for b in learner(skewed(), batch_size=50).batches(40, "t")]).numpy()
    counts = np.bincount(drawn, minlength=len(CLASSES))
    assert counts[2] == 0
    assert counts[1] / counts.sum() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_other_orders_use_every_image_before_any_twice(balance: str) -> None:
    one = learner(balance=balance, batch_size=5)
    n = len(one.data.rows("train"))
    tokens = torch.cat([b.tokens for b in one.batches(-(-n // 5), "t")])[:n]
    assert len(torch.unique(tokens.flatten(1), dim=0)) == n


def test_batches_have_an_address() -> None:
    def first(**changes: object) -> torch.Tensor:
        return next(iter(replace(learner(), **changes).batches(1, "t"))).tokens  # type: ignore[arg-type]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(round=2))
    assert not torch.equal(first(), first(site="b"))
    assert not torch.equal(first(), first(seed=1))


def test_global_generators_are_neither_used_nor_moved() -> None:
    backbone = tiny_backbone(SLOTS)
    params = initial_params(backbone, make("fedit"), "a")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        found.append(digest({"p": learner().fit(params)}))
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert found[0] == found[1]


def test_the_order_of_names_does_not_matter_to_the_last_bit() -> None:
    params = dict(initial_params(tiny_backbone(SLOTS), make("fedit"), "a"))
    backwards = dict(reversed(params.items()))
    assert digest({"p": learner().fit(params)}) == digest({"p": learner().fit(backwards)})


def test_one_step_is_adamw_on_the_clipped_gradient() -> None:
    """From zero moments AdamW moves each weight by lr * g / (|g| + eps), after decaying it by lr * decay."""
    backbone = tiny_backbone(SLOTS)
    params = initial_params(backbone, make("fedit"), "a")
    one = learner(steps=1, lr=1e-2, weight_decay=0.1, clip=0.5, balance="none")
    fitted = one.fit(params, train=lambda n: n.startswith("head."))
    batch = next(iter(one.batches(1, "fit")))
    leaves = {n: t.clone().requires_grad_(n.startswith("head.")) for n, t in params.items()}
    loss = torch.nn.functional.cross_entropy(backbone.logits(leaves, batch.tokens), batch.labels)
    names = ["head.bias", "head.weight"]
    grads = torch.autograd.grad(loss, [leaves[n] for n in names])
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    scale = min(1.0, 0.5 / (float(norm) + 1e-6))
    for name, g in zip(names, grads, strict=True):
        step = 1e-2 * (g * scale) / ((g * scale).abs() + 1e-8)
        torch.testing.assert_close(fitted[name], params[name] * (1 - 1e-3) - step, rtol=1e-4, atol=1e-6)
    for name in params.keys() - set(names):
        assert torch.equal(fitted[name], params[name])


def test_divergence_names_site_round_and_step() -> None:
    params = initial_params(tiny_backbone(SLOTS), make("fedit"), "a")
    with pytest.raises(TrainingError, match=r"site a, round 1, step \d"):
        learner(lr=1e30, steps=5).fit(params)
