"""``inversion``: whether a single image can be rebuilt from the update it made, with the frozen model that was agreed.

Shapes: B images, N tokens, D channels, F features, K classes.

Sources: the label from the head's bias and the feature from the ratio of the head's gradients (Zhao et al., "iDLG",
2020; Geiping et al., "Inverting gradients", NeurIPS 2020, proposition 3.1), tokens by matching the direction of the
gradient (ibid., equation 4). Differences: gradients of adapters and head alone; tokens in front of the first adapted
block instead of pixels, without a prior on images.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from confrere.adapters import head
from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.inversion_bench import Bench, Victim, fewest_steps
from confrere.audits.tapped import AuditedRun
from confrere.errors import ConfigError
from confrere.method import Method
from confrere.metrics.bootstrap import reach
from confrere.optimiser import AdamW
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors

FEATURES, TOKENS, STEPS = 12, 4, 60
"""Images whose feature, and whose tokens, are rebuilt; steps of the latter."""


def label_of(bias: Tensor) -> int:
    """Return the class of a single image from the gradient (K,) of the head's bias: the only negative one."""
    return int(bias.argmin())


def feature_of(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the feature (F,) of a single image from the head's gradients (K, F) and (K,).

    ``weight = error f^T`` and ``bias = error``: exact for one image and one plain step; of several images a mixture.
    """
    found: Tensor = weight.T @ bias / (bias.square().sum() + 1e-30)
    return found


def rebuild_tokens(
    predict: Callable[[Tensors, Tensor], Tensor], victim: Victim, start: Tensor, spread: Tensor, *, steps: int = STEPS
) -> Tensor:
    """Return the tokens (1, N, D) whose gradient points where the victim's does, by Adam from ``start``.

    Args:
        predict: logits (B, K) of tensors and tokens.
        victim: its truth is not looked at.
        start: (1, N, D), the mean of public images.
        spread: standard deviation of tokens, a scalar; a step moves a hundredth of it.
        steps: of Adam.
    """
    names = sorted(victim.gradient)
    wanted = [victim.gradient[n] / (victim.gradient[n].norm() + 1e-30) for n in names]
    sizes = torch.stack([victim.gradient[n].norm() for n in names])
    label = torch.tensor([label_of(victim.gradient[head.BIAS])])
    leaves = {n: t.detach().clone().requires_grad_(n in victim.gradient) for n, t in victim.before.items()}
    guess = start.clone().requires_grad_()
    adam = AdamW([guess], lr=float(spread) / 100, weight_decay=0.0)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(predict(leaves, guess), label)
            found = torch.autograd.grad(loss, [leaves[n] for n in names], create_graph=True, materialize_grads=True)
            inner = torch.stack([(f * w).sum() for f, w in zip(found, wanted, strict=True)]) @ sizes
            size = torch.stack([f.square().sum() for f in found]).sum().sqrt() * sizes.norm()
            (guess.grad,) = torch.autograd.grad(1 - inner / (size + 1e-30), guess)
            adam.step()
    return guess.detach()


def skill(guess: Tensor, truths: Tensor, mean: Tensor) -> float:
    """Return ``1 - |guess - x|^2 / |mean - x|^2``, 1 if exact, for that x of B truths to which the guess is nearest."""
    missed = (guess - truths).flatten(1).square().sum(1)
    return float((1 - missed / (mean - truths).flatten(1).square().sum(1)).max())


def attack_feature(bench: Bench, victim: Victim) -> Tensor:
    """Return the rebuilt feature (F,), of the mean size of public ones: a change of AdamW has lost the size."""
    found = feature_of(victim.gradient[head.WEIGHT], victim.gradient[head.BIAS])
    scaled: Tensor = found * bench.feature(bench.public).norm(dim=1).mean() / (found.norm() + 1e-30)
    return scaled


def attack_tokens(bench: Bench, victim: Victim) -> Tensor:
    """Return the rebuilt tokens (N, D)."""
    mean = bench.public.mean(0, keepdim=True)
    return rebuild_tokens(bench.predict, victim, mean, (bench.public - mean).std())[0]


def interval(values: list[float]) -> Interval:
    """Return a mean with its 95 % Student t interval over images."""
    mean = float(np.mean(values)) if values else None
    if mean is None or len(values) < 3:
        return Interval(mean)
    return Interval(mean, mean - reach(values), mean + reach(values))


def measured(benches: dict[str, Bench], victims: list[tuple[str, Victim]], what: str) -> tuple[Interval, Interval]:
    """Return the skill of rebuilding each victim's images, and that of taking it for the next victim's image."""
    ours, others = [], []
    for index, (site, victim) in enumerate(victims):
        bench = benches[site]
        if what == "feature":
            guess, show = attack_feature(bench, victim), bench.feature
        else:
            guess, show = attack_tokens(bench, victim), lambda tokens: tokens
        mean = show(bench.public).mean(0)
        ours.append(skill(guess, show(victim.images), mean))
        wrong = next(v for s, v in [*victims[index + 1 :], *victims] if v is not victim)
        others.append(skill(guess, show(wrong.images), mean))
    return interval(ours), interval(others)


def trials(
    run: AuditedRun, benches: dict[str, Bench], groups: list[tuple[str, np.ndarray]], seed: int
) -> dict[str, list[tuple[str, Victim]]]:
    """Return victims by what they show, in words: each a site and the images of one of its batches, ``groups``."""
    train, least = run.experiment.train, fewest_steps(run)
    short = "one step" if least == 1 else f"a round of {least} steps"
    size, full = train.batch_size, f"a round of {train.steps} steps"

    def sent(images: int, steps: int) -> list[tuple[str, Victim]]:
        return [(site, benches[site].sent(rows[:images], steps, images, seed)) for site, rows in groups]

    single = sent(1, least)
    moved = [list(victim.gradient) for _, victim in single]
    plain = [(s, benches[s].plain(int(rows[0]), names)) for (s, rows), names in zip(groups, moved, strict=True)]
    return {
        "one image, plain gradient": plain,
        f"one image, {short} of AdamW": single,
        f"{size} images, {short}": sent(size, least),
        f"{size} images, {full}": sent(size, train.steps),
    }


@register(
    "inversion",
    title="Inversion of updates",
    question="Can an image be rebuilt from the update of the site that trained on it?",
)
def inversion(run: AuditedRun, choice: Choice) -> Audit:
    """Rebuild features and tokens of images from a plain gradient, the shortest round there is, and a whole round."""
    started = time.perf_counter()
    shared = [n for n in head.NAMES if run.method.shared(n)]
    if run.experiment.privacy.at_sites:
        what, fix = "trials would have to be as noisy as the sites' steps were", "audit a run without privacy.unit"
        raise ConfigError(what, where="privacy.unit", fix=fix, code="audit")
    if run.experiment.masked or run.method.pools or "shared" not in run.method.sends or len(shared) < 2:
        what = "there is no update of a single site that holds a head: it is masked, or stays at the site"
        raise ConfigError(what, where="method.name", fix="audit a run whose updates the server sees", code="audit")
    if type(run.method).scores is not Method.scores and not run.method.additive():
        what = f"{run.method.name} predicts with several models at once, whose gradients these attacks do not have"
        raise ConfigError(what, where="method.name", fix="audit a run of another method", code="audit")
    benches = {site: Bench.of(run, site) for site in run.sites}
    rng = numpy_generator(choice.seed, "audit", "inversion")
    picked = [run.sites[i % len(run.sites)] for i in range(FEATURES)]
    size = run.experiment.train.batch_size
    groups = [
        (s, rng.choice(run.data[s].rows("train"), min(size, len(run.data[s].rows("train"))), replace=False))
        for s in picked
    ]
    kinds = trials(run, benches, groups, choice.seed)
    rows = []
    for name, victims in kinds.items():
        for what, most in (("feature", FEATURES), ("tokens", TOKENS)):
            choice.notify(f"inversion: {what}, {name}")
            strength, control = measured(benches, victims[:most], what)
            rows.append(
                Row(
                    subject="all",
                    model=f"update: {name}",
                    measure=f"skill, {what}",
                    strength=strength,
                    control=control,
                    n=f"{most} trials",
                )
            )
    pinned = run.experiment.backbone.sha256 or run.task.backbone.entry.sha256
    warnings = () if pinned else ("The backbone is not pinned by a SHA-256: a server could name one that shows more.",)
    return Audit(
        name="inversion",
        rows=tuple(rows),
        means="skill: share of the squared error of guessing the mean image that the reconstruction removes",
        control="the same reconstruction, taken for another image; below 0 is worse than the mean image",
        limits=(
            "Tokens in front of the first adapted block and pooled features, not pixels; no prior on images.",
            "A server that chooses the frozen model shows far more: see docs/property-inference.md.",
            "Trials send what the method would of the images named, from the state before the chosen round.",
            "What stays at a site begins as a newcomer's. No site sends a plain gradient: it is the easiest case.",
        ),
        warnings=warnings,
        settings={"features": FEATURES, "tokens": TOKENS, "steps": STEPS},
        costs={"seconds": round(time.perf_counter() - started, 1), "models trained": 3 * FEATURES},
    )
