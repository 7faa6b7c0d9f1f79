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
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from confrere.adapters import head
from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.tapped import AuditedRun
from confrere.consistency import UNITS
from confrere.errors import ConfigError
from confrere.job import initial
from confrere.learner import Learner, TrainSettings
from confrere.metrics.bootstrap import reach
from confrere.optimiser import AdamW
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors, sub
from confrere.tokenset import TokenSet

FEATURES, TOKENS, STEPS, PUBLIC = 12, 4, 60, 64
"""Images whose feature, and whose tokens, are rebuilt; steps of the latter; images from which means are known."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """One training of one site on images that the attacker wants: what was known before, and the gradient it showed.

    ``images``: (B, N, D), the truth. ``gradient``: by name, up to a factor.
    """

    before: Tensors
    gradient: Tensors
    images: Tensor


def label_of(bias: Tensor) -> int:
    """Return the class of a single image from the gradient (K,) of the head's bias: the only negative one."""
    return int(bias.argmin())


def feature_of(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the feature (F,) of a single image from the head's gradients (K, F) and (K,).

    ``weight = error f^T`` and ``bias = error``: exact for one image and one plain step; of several images a mixture.
    """
    found: Tensor = weight.T @ bias / (bias.square().sum() + 1e-30)
    return found


def gradient_of(change: Tensors, before: Tensors, settings: TrainSettings) -> dict[str, Tensor]:
    """Return what the change of AdamW says of the gradient: its sign, nearly, after one step; then a mixture."""
    return {n: -value / settings.lr - settings.weight_decay * before[n] for n, value in change.items()}


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


@dataclass(frozen=True)
class Bench:
    """A site as the attacker meets it: its model before a round, and public images (M, N, D) of the same kind."""

    run: AuditedRun
    site: str
    before: Tensors
    public: Tensor

    @classmethod
    def of(cls, run: AuditedRun, site: str) -> Bench:
        """Return the bench of one site, before the round whose models were chosen; held-out images are public."""
        received = run.broadcast(site, run.round)
        if received is None:
            what, fix = "the state before the chosen round is not kept", "run with record.keep=0"
            raise ConfigError(what, where="record.keep", fix=fix, code="audit")
        before = run.method.personal(received, run.method.init_site(initial(run.task, site)))
        rows = np.flatnonzero(run.data[site].split != 0)[:PUBLIC]
        return cls(run, site, before, run.data[site].batch(rows).tokens.float())

    def feature(self, tokens: Tensor) -> Tensor:
        """Return the features (B, F) of tokens, before the round."""
        with torch.no_grad():
            return self.run.task.backbone_of(self.site).features(self.before, tokens)

    def predict(self, params: Tensors, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.run.task.backbone_of(self.site).logits(params, tokens)

    def plain(self, row: int) -> Victim:
        """Return what one plain gradient step on one image shows, without dropout."""
        batch = self.run.data[self.site].batch(np.array([row]))
        names = [n for n in self.before if self.run.method.shared(n)]
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.before.items()}
        loss = torch.nn.functional.cross_entropy(self.predict(leaves, batch.tokens), batch.labels)
        found = torch.autograd.grad(loss, [leaves[n] for n in names], materialize_grads=True)
        return Victim(before=self.before, gradient=dict(zip(names, found, strict=True)), images=batch.tokens.float())

    def sent(self, rows: np.ndarray, steps: int, batch_size: int, seed: int) -> Victim:
        """Return what the site's optimiser shows of some images after so many steps."""
        data = self.run.data[self.site]
        own = _only(data, rows)
        choice = {**self.run.experiment.train.model_dump(), "views": 1, "steps": steps, "batch_size": batch_size}
        settings = TrainSettings(**choice)
        learner = Learner(
            backbone=self.run.task.backbone_of(self.site),
            data=own,
            settings=settings,
            seed=seed,
            site=self.site,
            round=self.run.round,
            rounds=self.run.experiment.rounds,
        )
        after = learner.fit(self.before)
        names = [n for n in self.before if self.run.method.shared(n)]
        change = sub({n: after[n] for n in names}, self.before)
        return Victim(
            before=self.before,
            gradient=gradient_of(change, self.before, settings),
            images=own.batch(np.arange(len(rows))).tokens.float(),
        )


def _only(data: TokenSet, rows: np.ndarray) -> TokenSet:
    """Return some images as a training set of their own."""
    split = np.zeros(len(rows), dtype=np.int8)
    return replace(
        data, tokens=data.tokens[rows], labels=data.labels[rows], groups=data.groups[rows], split=split, views=()
    )


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


@register(
    "inversion",
    title="Inversion of updates",
    question="Can an image be rebuilt from the update of the site that trained on it?",
)
def inversion(run: AuditedRun, choice: Choice) -> Audit:
    """Rebuild features and tokens of images from a plain gradient, from one step of AdamW, and from a whole round."""
    started = time.perf_counter()
    shared = [n for n in head.NAMES if run.method.shared(n)]
    if run.experiment.privacy.unit in UNITS:
        what, fix = "trials would have to be as noisy as the sites' steps were", "audit a run without privacy.unit"
        raise ConfigError(what, where="privacy.unit", fix=fix, code="audit")
    if run.experiment.masked or run.method.pools or "shared" not in run.method.sends or len(shared) < 2:
        what = "there is no update of a single site that holds a head: it is masked, or stays at the site"
        raise ConfigError(what, where="method.name", fix="audit a run whose updates the server sees", code="audit")
    benches = {site: Bench.of(run, site) for site in run.sites}
    rng, train = numpy_generator(choice.seed, "audit", "inversion"), run.experiment.train
    picked = [run.sites[i % len(run.sites)] for i in range(FEATURES)]
    size = train.batch_size
    groups = [
        (s, rng.choice(run.data[s].rows("train"), min(size, len(run.data[s].rows("train"))), replace=False))
        for s in picked
    ]
    kinds = {
        "one image, plain gradient": [(s, benches[s].plain(int(rows[0]))) for s, rows in groups],
        "one image, one step of AdamW": [(s, benches[s].sent(rows[:1], 1, 1, choice.seed)) for s, rows in groups],
        f"{size} images, one step": [(s, benches[s].sent(rows, 1, size, choice.seed)) for s, rows in groups],
        f"{size} images, a round of {train.steps} steps": [
            (s, benches[s].sent(rows, train.steps, size, choice.seed)) for s, rows in groups
        ],
    }
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
            "Trials train on the images named and nothing else, from the state before the chosen round.",
        ),
        warnings=warnings,
        settings={"features": FEATURES, "tokens": TOKENS, "steps": STEPS},
        costs={"seconds": round(time.perf_counter() - started, 1), "models trained": 3 * FEATURES},
    )
