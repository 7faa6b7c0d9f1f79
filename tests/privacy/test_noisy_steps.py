"""Noisy local steps: gradients of single images, their clip, the noise, who is drawn; planted bugs do not pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import noisy as tools
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_variants import VARIANTS
from noisy import CLIP, EVERYBODY, check_noise, check_sampling, check_sensitivity, moved, noisy_learner
from tiny_federation import backbone_of, initial_params, tiny_data

import confrere.noisy
from confrere.errors import TrainingError
from confrere.method import Method, make
from confrere.methods import turns
from confrere.noisy import NoisyLearner
from confrere.optimiser import AdamW
from confrere.privacy import mechanism as steps
from confrere.privacy.noise import Source, normal
from confrere.tokenset import TokenSet

FEDIT = make("fedit")
IN_TURN = make("fedopal", {"training": "in-turn", "warmup": 0})
PRIVATE = {n: m for n, m in VARIANTS.items() if m.noised(4, 1, 3) is not None}


def drawn_params(method: Method, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = initial_params(backbone_of(method), method, "a")
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(params.items())}


def one_by_one(
    method: Method, params: dict[str, torch.Tensor], data: TokenSet, rows: np.ndarray
) -> list[dict[str, Any]]:
    """Return each image's gradient by an ordinary backward pass."""
    found, backbone = [], backbone_of(method)
    objective = backbone.task.objective("cross-entropy")
    for row in rows:
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        batch = data.batch(np.array([row]))
        objective(backbone.logits(leaves, batch.tokens), batch.labels).backward()
        found.append({n: t.grad for n, t in leaves.items()})
    return found


@pytest.mark.parametrize("name", ["fedit", "fedopal-in-turn", "fedbn"])
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_sums_are_those_of_gradients_that_are_taken_and_clipped_one_by_one(name: str, clip: float) -> None:
    method = PRIVATE[name]
    data, params = tiny_data(backbone_of(method), "a"), drawn_params(PRIVATE[name])
    rows = data.rows("train")
    learner = noisy_learner(method, replace(EVERYBODY, clip=clip))
    with torch.no_grad():
        mean = learner._gradient({}, {n: t.requires_grad_() for n, t in params.items()}, "fit", 0)
    each = one_by_one(method, {n: t.detach() for n, t in params.items()}, data, rows)
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in one.values())) for one in each]
    assert min(norms) > 0.5
    most = 0.0
    for n in params:
        slow = sum(one[n].double() * min(1.0, clip / norm) for one, norm in zip(each, norms, strict=True)) / len(rows)
        torch.testing.assert_close(mean[n].double(), slow, atol=1e-5, rtol=1e-4)
        most = max(most, float((mean[n].double() - slow).abs().max()))
    print(f"\nG20: {name}, clip {clip:g}: at most {most:.0e} from gradients taken one by one")


def test_given_class_weights_scale_a_gradient_before_it_is_clipped() -> None:
    data, params = tiny_data(backbone_of(FEDIT), "a"), drawn_params(FEDIT)
    given = {name: 10.0 ** -(k + 1) for k, name in enumerate(data.classes)}
    learner = noisy_learner(FEDIT, EVERYBODY, data, class_weights=given)
    with torch.no_grad():
        mean = learner._gradient({}, {n: t.requires_grad_() for n, t in params.items()}, "fit", 0)
    rows = data.rows("train")
    slow = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in params.items()}
    for row, one in zip(rows, one_by_one(FEDIT, {n: t.detach() for n, t in params.items()}, data, rows), strict=True):
        grads = {n: g.double() * given[data.classes[int(data.labels[row])]] for n, g in one.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        slow = {n: slow[n] + g * min(1.0, CLIP / norm) / len(rows) for n, g in grads.items()}
    for n in params:
        torch.testing.assert_close(mean[n].double(), slow[n], atol=1e-5, rtol=1e-4)


def test_without_noise_and_clip_steps_are_those_of_all_images() -> None:
    """G20: sigma 0, an endless clip, everybody drawn, no dropout: five steps of AdamW on the mean gradient."""
    learner, params = noisy_learner(FEDIT, replace(EVERYBODY, clip=1e9)), drawn_params(FEDIT)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in params.items()}
    optimiser = AdamW(list(leaves.values()), lr=5e-3, weight_decay=0.01)
    batch = learner.data.batch(learner.data.rows("train"))
    for _ in range(5):
        optimiser.zero_grad()
        learner._task(learner.backbone.logits(leaves, batch.tokens), batch.labels).backward()
        optimiser.step()
    fitted = learner.fit(params, steps=5)
    with torch.no_grad():
        logits = [learner.backbone.logits(p, batch.tokens) for p in (leaves, fitted)]
    apart = float((logits[0] - logits[1]).abs().max())
    print(f"\nG20: without noise and clip logits after five steps differ by {apart:.0e} from ordinary training")
    assert apart < 1e-5
    assert "loss" not in learner.metrics


def test_noise_is_that_of_the_account() -> None:
    check_noise()
    check_noise(seed=0)  # of the operating system


def test_noise_of_the_system_has_its_variance_over_a_million_draws() -> None:
    """G21."""
    drawn = normal((1_000_000,)).numpy()
    chance = tools.stats.kstest(drawn[:200_000], "norm").pvalue
    print(f"\nG21: variance {drawn.var():.4f} over a million draws, Kolmogorov-Smirnov p {chance:.2f}")
    assert abs(drawn.var() - 1) < 0.01
    assert chance > 1e-3
    assert not np.array_equal(drawn, normal((1_000_000,)).numpy())
    uniform = Source(0).uniform(200_000)
    assert tools.stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert 0 <= uniform.min() <= uniform.max() < 1


def test_who_is_drawn_is_that_of_the_account() -> None:
    check_sampling()
    check_sampling(seed=0)


def test_one_image_moves_the_sum_by_the_clip_at_most() -> None:
    check_sensitivity()


@pytest.mark.parametrize("name", PRIVATE)
def test_one_image_moves_what_a_private_method_sends_by_the_clip_at_most(name: str) -> None:
    """Also when the site's own tensors, trained without noise, would be others without it."""
    method = PRIVATE[name]
    unnoised = name == "fedopal-in-turn"  # what the others keep is trained by the same noisy steps
    check_sensitivity(method, (lambda state: moved(state, 1)) if unnoised else (lambda state: state))


def unclipped(loss: Any, fixed: Any, trained: Any, *rest: Any) -> Any:
    return honest_sum(loss, fixed, trained, *rest[:-1], 1e9)


def head_unclipped(loss: Any, fixed: Any, trained: Any, *rest: Any) -> Any:
    whole, body = honest_sum(loss, fixed, trained, *rest[:-1], 1e9), honest_sum(loss, fixed, trained, *rest)
    return {n: (whole if n.startswith("head.") else body)[n] for n in body}


def clipped_by_tensor(loss: Any, fixed: Any, trained: Any, *rest: Any) -> Any:
    """Every tensor to the whole clip: together they are longer."""
    found = {}
    for n in trained:
        others = {**fixed, **{m: t.detach() for m, t in trained.items() if m != n}}
        found |= honest_sum(loss, others, {n: trained[n]}, *rest)
    return found


def quiet(total: Any, mechanism: Any, source: Any) -> Any:
    return honest_mean(total, replace(mechanism, sigma=0.0), source)


def quarter(total: Any, mechanism: Any, source: Any) -> Any:
    return honest_mean(total, replace(mechanism, sigma=mechanism.sigma / 4), source)


def shuffled(mechanism: Any, rows: np.ndarray, groups: np.ndarray, source: Any) -> Any:
    count = round(mechanism.rate * len(rows))
    drawn = rows[np.argsort(source.uniform(len(rows)))[:count]][:, None]
    return drawn, np.ones(drawn.shape, dtype=np.float32)


def beside_the_personal_one(learner: Any, params: Any, **options: Any) -> Any:
    """The trap: the general adapter trains on what the personal one, without noise, has made of the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.torch, "zeros_like", lambda t: t)
        return honest_turn(learner, params, **options)


def with_dropout(self: Any, params: Any, **options: Any) -> Any:
    """How many images are drawn decides which numbers are dropped for later ones, and in later steps."""
    with self.backbone.dropout(torch.Generator().manual_seed(0)):
        return honest_fit(self, params, **options)


honest_fit = NoisyLearner.fit
honest_sum, honest_mean, honest_turn = steps.clipped_sum, steps.noisy_mean, turns.in_turn
BUGS: dict[str, tuple[str, Any, Any]] = {
    "noise off": ("confrere.noisy.noisy_mean", quiet, check_noise),
    "a quarter of the noise": ("confrere.noisy.noisy_mean", quarter, check_noise),
    "no clip": ("confrere.noisy.clipped_sum", unclipped, check_sensitivity),
    "head not clipped": ("confrere.noisy.clipped_sum", head_unclipped, check_sensitivity),
    "each tensor clipped by itself": ("confrere.noisy.clipped_sum", clipped_by_tensor, check_sensitivity),
    "dropout": ("confrere.noisy.NoisyLearner.fit", with_dropout, lambda: check_sensitivity(images=132)),
    "shuffled, not drawn": ("confrere.privacy.mechanism.draw", shuffled, check_sampling),
    "a personal adapter beside": (
        "confrere.methods.fedopal.in_turn",
        beside_the_personal_one,
        lambda: check_sensitivity(IN_TURN, lambda state: moved(state, 1)),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, wrong, check = BUGS[bug]
    check()
    monkeypatch.setattr(where, wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_step_for_which_nobody_was_drawn_releases_noise() -> None:
    mechanism = replace(EVERYBODY, rate=1e-9, sigma=1e-9)
    params = drawn_params(FEDIT)
    fitted = noisy_learner(FEDIT, mechanism).fit(params, steps=1)
    assert all(not torch.equal(fitted[n], params[n]) for n in params)


def test_an_image_whose_gradient_is_not_finite_counts_as_zero() -> None:
    data = tiny_data(backbone_of(FEDIT), "a")
    tokens = np.array(data.tokens[np.arange(len(data.labels))])
    tokens[data.rows("train")[0]] = np.nan
    learner = noisy_learner(FEDIT, data=replace(data, tokens=tokens))
    without = noisy_learner(FEDIT, data=tools.without_first(data))
    params = drawn_params(FEDIT)
    one, other = ({n: t.clone().requires_grad_() for n, t in params.items()} for _ in "ab")
    left, right = learner._gradient({}, one, "fit", 0), without._gradient({}, other, "fit", 0)
    for n in params:
        torch.testing.assert_close(left[n], right[n], atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=24),
    most=st.integers(1, 4),
    rate=st.floats(0.05, 1.0),
    seed=st.integers(0, 3),
)
def test_patients_are_drawn_whole_and_count_as_one(groups: list[int], most: int, rate: float, seed: int) -> None:
    patients, rows = np.array(groups), np.arange(50, 50 + len(groups))
    mechanism = replace(EVERYBODY, unit="patient", rate=rate, images=most)
    drawn, counts = steps.draw(mechanism, rows, patients, Source(seed, 1))
    assert drawn.shape == counts.shape == (len(drawn), most)
    owners = [set(patients[one - 50]) for one in drawn]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set().union(*owners)) == len(owners)
    for row, count in zip(drawn, counts, strict=True):
        (own,) = set(patients[row - 50])
        real = row[count > 0]
        assert len(set(real)) == len(real) == min(most, int((patients == own).sum()))
        assert count.sum() == pytest.approx(1.0)
        assert len(set(count[count > 0])) == 1


def test_a_whole_patient_moves_the_sum_by_the_clip_at_most() -> None:
    data = tiny_data(backbone_of(FEDIT), "a")
    data = tools.with_outlier(replace(data, groups=np.arange(len(data.labels)) // 2))
    first = data.groups == data.groups[data.rows("train")[0]]
    other = replace(data, split=np.where(first, 1, data.split).astype(np.int8))
    mechanism = replace(EVERYBODY, unit="patient", images=2, units=6)
    params = drawn_params(FEDIT)
    found = []
    for one in (data, other):
        learner = noisy_learner(FEDIT, mechanism, data=one)
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        found.append({n: g.double() * 6 for n, g in learner._gradient({}, leaves, "fit", 0).items()})
    assert 0.3 * CLIP < tools.distance(*found) <= CLIP * (1 + 1e-5)


@pytest.mark.parametrize(
    ("what", "use"),
    [
        ("loss", lambda one, p: one.fit(p, loss=one.loss)),
        ("correction", lambda one, p: one.fit(p, correct=p)),
        ("loss or a correction", lambda one, p: one.fit(p, mean_gradient={})),
        ("more noisy steps", lambda one, p: one.fit(p, steps=100)),
        ("images outside", lambda one, p: list(one.sweep("train"))),
        ("loss of images", lambda one, p: one.mean_loss(p, "val")),
        ("without a mechanism", lambda one, p: (setattr(one, "mechanism", None), one.fit(p))),
    ],
)
def test_what_epsilon_does_not_cover_is_refused(what: str, use: Any) -> None:
    with pytest.raises(TrainingError, match=what) as raised:
        use(noisy_learner(FEDIT), drawn_params(FEDIT))
    assert raised.value.code == "privacy"


def test_infinite_noise_is_an_error_and_no_tensor() -> None:
    with pytest.raises(TrainingError) as raised:
        noisy_learner(FEDIT, replace(EVERYBODY, sigma=1e60)).fit(drawn_params(FEDIT))
    assert raised.value.code == "diverged"


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_method_reads_images_by_noisy_steps_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many noisy steps as it says; images are read for them, and by :meth:`fit` for what is not sent."""
    method, read = PRIVATE[name], []

    class Watched(TokenSet):
        def batch(self, rows: np.ndarray, views: np.ndarray | None = None) -> Any:
            read.append(len(rows))
            return super().batch(rows, views)

    params = drawn_params(method)
    backbone = backbone_of(method)
    received, kept = method.broadcast(method.init_server(params), "a"), method.init_site(params)
    data = Watched(**vars(tiny_data(backbone, "a")))
    due = method.noised(4, 2, 3)
    learner = noisy_learner(method, data=data, steps=4)
    payload, _ = method.update(learner, received, kept)
    assert learner.steps_left == 99 - (due or 0)
    assert len(read) == 4
    assert bool(payload.get("shared")) == bool(due)


def test_no_other_method_says_that_noise_would_do() -> None:
    able = {n for n, m in VARIANTS.items() if m.noised(4, 1, 3) is not None}
    whole = {"fedit", "fedprox", "fedprox-strong", "fedprox-zero", "ffa-lora", "fedper", "fedsa-lora", "fedbn"}
    assert able == whole | {"fedit-ft", "fedrep", "fedrep-much-head", "fedrep-little-head", "fedopal-in-turn"}
    assert IN_TURN.noised(5, 1, 3) == 3
    assert [make("fedit-ft").noised(5, r, 4) for r in (1, 2, 3, 4)] == [5, 5, 5, 0]


def test_images_on_the_way_to_a_step_have_their_own_targets() -> None:
    """Rows of several images of a patient are not mixed up with those of another."""
    learner = noisy_learner(FEDIT, replace(EVERYBODY, rate=0.5))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            confrere.noisy,
            "clipped_sum",
            lambda loss, fixed, trained, tokens, targets, counts, clip: (
                seen.append((tokens, targets)) or {n: torch.zeros(t.shape).double() for n, t in trained.items()}
            ),
        )
        learner.fit(drawn_params(FEDIT), steps=3)
    known = {learner.data.tokens[np.array([r])].tobytes(): int(learner.data.labels[r]) for r in range(24)}
    for tokens, targets in seen:
        assert [known[t.numpy().tobytes()] for t in tokens] == targets[:, 0].tolist()
