"""Local training: batches with addresses, balance, no global randomness, an optimiser step by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import CLASSES, initial_params, tiny_backbone, tiny_data

from confrere.errors import TrainingError
from confrere.learner import Learner, TrainSettings, predict
from confrere.method import make
from confrere.optimiser import AdamW
from confrere.tensors import Tensors, digest
from confrere.tokenset import Batch, TokenSet

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


@pytest.mark.parametrize("balance", ["sampling", "weights", "none"])
def test_every_order_draws_training_images_only_and_full_batches(balance: str) -> None:
    one = learner(balance=balance, batch_size=7)
    train = {t.numpy().tobytes() for t in one.data.batch(one.data.rows("train")).tokens}
    batches = list(one.batches(5, "t"))
    assert [len(b.labels) for b in batches] == [7] * 5
    assert {t.numpy().tobytes() for b in batches for t in b.tokens} <= train


def test_plain_order_keeps_the_proportions_that_balancing_changes() -> None:
    plain = torch.cat([b.labels for b in learner(skewed(), balance="none", batch_size=10).batches(20, "t")])
    assert int((plain == 1).sum()) == 10  # 1 of 20 training images, 200 drawn


def test_weights_make_a_rare_class_count_as_much_as_a_common_one() -> None:
    one = learner(skewed(), balance="weights")
    logits = torch.zeros(20, len(CLASSES))
    labels = torch.from_numpy(one.data.labels[one.data.rows("train")])
    loss = one._objective()
    terms = [float(loss(logits[:1], labels[k : k + 1])) for k in range(20)]
    rare = [t for t, y in zip(terms, labels.tolist(), strict=True) if y == 1]
    common = [t for t, y in zip(terms, labels.tolist(), strict=True) if y == 0]
    assert sum(rare) == pytest.approx(sum(common), rel=1e-5)
    assert sum(terms) / 20 == pytest.approx(float(np.log(len(CLASSES))), rel=1e-5)
    # `focal` takes the same weights; balancing by sampling takes none.
    focal = learner(skewed(), balance="weights", loss="focal")._objective()
    common_, rare_ = torch.tensor([0]), torch.tensor([1])
    assert float(focal(logits[:1], rare_)) == pytest.approx(19 * float(focal(logits[:1], common_)), rel=1e-5)
    assert float(learner(skewed())._objective()(logits, labels)) == pytest.approx(float(np.log(len(CLASSES))))


def test_given_weights_multiply_the_loss_of_their_class_whatever_the_images() -> None:
    one = learner(skewed(), balance="none", class_weights={name: 0.5 + k for k, name in enumerate(CLASSES)})
    logits, labels = torch.randn(3, len(CLASSES), generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 1])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert float(one._objective()(logits, labels)) == pytest.approx(float((each * (0.5 + labels)).mean()), rel=1e-6)
    params = initial_params(tiny_backbone(SLOTS), make("fedit"), "a")
    assert one.mean_loss(params, "train") != pytest.approx(learner(skewed(), balance="none").mean_loss(params, "train"))


def test_the_same_address_draws_the_same_batches_whatever_was_drawn_before() -> None:
    one = learner()
    first = [b.tokens for b in one.batches(3, "t")]
    list(one.batches(5, "other"))
    again = [b.tokens for b in one.batches(3, "t")]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], next(iter(one.batches(1, "other"))).tokens)


def test_fitting_twice_gives_the_same_bits_and_keeps_the_input() -> None:
    params = initial_params(tiny_backbone(SLOTS), make("fedit"), "a")
    before = digest({"p": params})
    one, two = learner(), learner()
    assert digest({"p": one.fit(params)}) == digest({"p": two.fit(params)})
    assert digest({"p": params}) == before
    assert one.metrics == two.metrics
    assert not any(t.requires_grad for t in one.fit(params).values())


def test_dropout_has_an_address_too() -> None:
    """In another round on the very same batches the dropped inputs differ."""
    params = {
        n: t + 0.1 for n, t in initial_params(tiny_backbone(SLOTS), make("fedit"), "a").items()
    }  # B is not zero, so that dropout shows
    backbone = tiny_backbone(SLOTS)
    batch = next(iter(learner().batches(1, "fit")))

    def logits(seed: int | None) -> torch.Tensor:
        with backbone.dropout(None if seed is None else torch.Generator().manual_seed(seed)):
            return backbone.logits(params, batch.tokens)

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.equal(logits(1), logits(None))


def test_a_penalty_is_added_and_not_reported_as_loss() -> None:
    params = initial_params(tiny_backbone(SLOTS), make("fedit"), "a")
    seen: list[int] = []

    def penalty(leaves: Tensors, batch: Batch) -> torch.Tensor:
        seen.append(len(batch.inputs))
        return 100.0 * torch.stack([t.square().sum() for t in leaves.values()]).sum()

    plain, pulled = learner(steps=1), learner(steps=1)
    free, held = plain.fit(params), pulled.fit(params, penalty=penalty, capture=True)
    assert plain.metrics["loss"] == pulled.metrics["loss"]
    assert digest({"p": free}) != digest({"p": held})
    assert seen == [len(tiny_backbone(SLOTS).layers)]


def test_a_penalty_that_is_not_finite_is_divergence() -> None:
    params = initial_params(tiny_backbone(SLOTS), make("fedit"), "a")
    with pytest.raises(TrainingError, match="step 1"):
        learner().fit(params, penalty=lambda leaves, batch: leaves["head.bias"].sum() * float("nan"))


@given(size=st.integers(1, 40))
def test_predictions_do_not_depend_on_the_batch_size(size: int) -> None:
    backbone = tiny_backbone(SLOTS)
    params = {n: t + 0.01 for n, t in initial_params(backbone, make("fedit"), "a").items()}
    data = tiny_data(backbone, "a")
    rows = np.arange(len(data.labels))
    found = predict(backbone, params, data, rows, batch_size=size)
    torch.testing.assert_close(found, predict(backbone, params, data, rows), rtol=1e-4, atol=1e-5)
    assert predict(backbone, params, data, rows[:0]).shape == (0, len(CLASSES))


def test_the_optimiser_is_torchs_adamw_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=draw) for shape in ((3, 4), (5,), (2, 2, 2))]
    ours, theirs = ([t.clone().requires_grad_() for t in first] for _ in range(2))
    one = AdamW(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(5):
        for params, optimiser in ((ours, one), (theirs, other)):
            optimiser.zero_grad()
            # The last tensor has a gradient in odd steps only.
            sum((t.square().sum() * (k + 1) for k, t in enumerate(params[: 2 + step % 2])), torch.zeros(())).backward()
            optimiser.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


def test_a_start_imports_no_compiler() -> None:
    code = "import sys, confrere.job; print({'torch._dynamo', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
