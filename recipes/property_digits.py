"""Property inference on handwritten digits: LoRA of rank 4 on a linear head over fixed random features.

    python recipes/property_digits.py --prolin 200000

40 sites of 10 images; 8 of them have the property, which is that half of a site's images show a three; 8 sites take
part in a round. Small enough for 400 shadow trainings in each of 60 rounds. Only the adapter moves, as over a frozen
model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from confrere.audits.property import Floats, System, density, least_squares, posterior, ridge, score_of_sum, vote
from confrere.audits.property_classifier import persistence, train_score
from confrere.audits.property_prolin import prolin
from confrere.federation.participation import identifiability
from confrere.federation.sampling import sample
from confrere.metrics.bootstrap import reach
from confrere.privacy import epsilon
from confrere.seeds import numpy_generator

SITES, PER_ROUND, POSITIVE, IMAGES, RANK, FEATURES, CLASSES, TARGET = 40, 8, 8, 10, 4, 128, 10, 3
SCALE, LR, EPOCHS, BATCH = 2.0, 0.1, 2, 5


@dataclass
class Toy:
    """One federation: the system of its rounds, every round's sum and classifier, the truth, and its accuracy."""

    system: System
    sums: Floats
    directions: Floats
    offsets: Floats
    truth: np.ndarray
    scores: Floats
    shadow_accuracy: float
    accuracy: float


def digits(seed: int) -> tuple[Floats, np.ndarray, np.ndarray]:
    """Return features (1797, 128), labels, and the rows in an order of this seed."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    weights = numpy_generator(0, "features").normal(size=(64, FEATURES)) / 8
    return np.tanh((pixels / 8 - 1) @ weights), labels, numpy_generator(seed, "rows").permutation(len(labels))


def draw(rng: np.random.Generator, labels: np.ndarray, pool: np.ndarray, *, positive: bool) -> np.ndarray:
    """Return the rows of one site."""
    threes, others = pool[labels[pool] == TARGET], pool[labels[pool] != TARGET]
    if not positive:
        return rng.choice(others, IMAGES, replace=False)
    half = IMAGES // 2
    return np.concatenate([rng.choice(threes, half, replace=False), rng.choice(others, IMAGES - half, replace=False)])


def trained(A: Floats, B: Floats, x: Floats, y: np.ndarray, order: np.ndarray, *, frozen: bool) -> Floats:
    """Return the flattened updates (S, d) of S sites that all start from A (r, F) and B (K, r).

    x: (S, n, F), y: (S, n), order: (S, epochs * n) rows of each site, in batches of 5.
    """
    size = len(x)
    a, b = np.repeat(A[None], size, 0), np.repeat(B[None], size, 0)
    which = np.arange(size)[:, None]
    for rows in np.split(order, order.shape[1] // BATCH, axis=1):
        inputs, target = x[which, rows], np.eye(CLASSES)[y[which, rows]]
        hidden = inputs @ a.transpose(0, 2, 1)
        logits = SCALE * hidden @ b.transpose(0, 2, 1)
        logits -= logits.max(-1, keepdims=True)
        error = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - target
        of_b = SCALE * error.transpose(0, 2, 1) @ hidden / BATCH
        of_a = SCALE * (error @ b).transpose(0, 2, 1) @ inputs / BATCH
        b = b - LR * of_b
        if not frozen:
            a = a - LR * of_a
    moved = (b - B).reshape(size, -1)
    return moved if frozen else np.concatenate([(a - A).reshape(size, -1), moved], 1)


def run_toy(
    seed: int,
    rounds: int,
    *,
    frozen: bool = True,
    shadows: int = 400,
    sampling: str = "fixed",
    noise: float = 0.0,
    clip: float = np.inf,
) -> Toy:
    """Train the federation; of every round keep the sum, a new classifier of shadow updates, and its moments.

    clip: of each site's update (L2). noise: standard deviation of what is added to the sum, in units of the clip.
    """
    features, labels, order = digits(seed)
    aux, own, test = order[:700], order[700:1400], order[1400:]
    rng = numpy_generator(seed, "toy")
    truth = np.zeros(SITES, dtype=bool)
    truth[rng.permutation(SITES)[:POSITIVE]] = True
    sites = np.stack([draw(rng, labels, own, positive=bool(t)) for t in truth])
    kinds = np.arange(shadows) % 2 == 0
    shadow = np.stack([draw(rng, labels, aux, positive=bool(t)) for t in kinds])
    A, B = rng.normal(size=(RANK, FEATURES)) / np.sqrt(FEATURES), np.zeros((CLASSES, RANK))
    names = [f"s{i:02d}" for i in range(SITES)]

    def train(rows: np.ndarray, round_: int, who: str) -> Floats:
        draws = numpy_generator(seed, "order", who, round_)
        passes = [draws.permuted(np.tile(np.arange(IMAGES), (len(rows), 1)), axis=1) for _ in range(EPOCHS)]
        moved = trained(A, B, features[rows], labels[rows], np.concatenate(passes, 1), frozen=frozen)
        size = np.linalg.norm(moved, axis=1, keepdims=True)
        return moved * np.minimum(1, clip / np.maximum(size, 1e-12))

    rows, sums, found, own_scores = [], [], [], []
    for round_ in range(1, rounds + 1):
        cohort = sample(names, PER_ROUND / SITES, seed, round_, sampling)
        row = np.array([float(name in cohort) for name in names])
        score = train_score(train(shadow, round_, "shadow"), kinds, seed=seed)
        updates = train(sites, round_, "site")
        total = row @ updates
        if noise:
            total = total + noise * clip * numpy_generator(seed, "noise", round_).normal(size=total.shape)
        rows, sums, found = [*rows, row], [*sums, total], [*found, score]
        own_scores.append(updates @ score.direction + score.offset)
        step = total / row.sum()
        if not frozen:
            A, step = A + step[: A.size].reshape(A.shape), step[A.size :]
        B = B + step.reshape(B.shape)
    made = np.stack(rows)
    system = System(
        A=made,
        b=np.array([score_of_sum(s.direction, s.offset, u, r) for s, u, r in zip(found, sums, made, strict=True)]),
        mean_with=np.array([s.mean_with for s in found]),
        var_with=np.array([s.var_with for s in found]),
        mean_without=np.array([s.mean_without for s in found]),
        var_without=np.array([s.var_without for s in found]),
        persistence=persistence(np.stack([s.deviations for s in found])),
        noise=np.array([(noise * clip) ** 2 * (s.direction @ s.direction) for s in found]) if noise else None,
    )
    logits = features[test] @ A.T @ B.T
    return Toy(
        system=system,
        sums=np.stack(sums),
        directions=np.stack([s.direction for s in found]),
        offsets=np.array([s.offset for s in found]),
        truth=truth,
        scores=np.stack(own_scores),
        shadow_accuracy=float(np.mean([s.accuracy for s in found])),
        accuracy=float((logits.argmax(1) == labels[test]).mean()),
    )


def f1(truth: np.ndarray, decided: np.ndarray) -> float:
    """Return 2 TP / (2 TP + FP + FN), 0 where nothing was found."""
    wrong, hits = int((truth != decided).sum()), int((truth & decided).sum())
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def auc(truth: np.ndarray, values: Floats) -> float:
    """Return the chance that a site with the property ranks above one without."""
    above = values[truth][:, None] - values[~truth]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def decisions(toy: Toy, rounds: int, prior: float = POSITIVE / SITES) -> dict[str, tuple[float, float]]:
    """Return F1 and AUC of every estimator after so many rounds; ``control`` is the posterior with sites mixed up."""
    s, cut = toy.system.until(rounds), slice(rounds)
    found = posterior(s, prior).mean
    control = posterior(replace(s, A=mixed(s.A, rounds)), prior).mean
    squares, penalised = least_squares(s), ridge(s)
    votes = vote(s.A, toy.sums[cut], toy.directions[cut], toy.offsets[cut])
    values = {
        "least squares": (squares, 0.0),
        "ridge": (penalised, 0.0),
        "ridge, densities": (density(s, penalised), 0.0),
        "disaggregation": (votes, 0.5),
        "posterior": (found, 0.5),
        "control": (control, 0.5),
    }
    return {name: (f1(toy.truth, v > level), auc(toy.truth, v)) for name, (v, level) in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--shadows", type=int, default=400)
    parser.add_argument("--prolin", type=int, default=0, help="steps of the joint estimate; 0 leaves it out")
    args = parser.parse_args()
    sigma, clip = noise_for(8.0, args.rounds), 0.35
    settings: dict[str, dict[str, Any]] = {
        "A frozen": {},
        "A and B": {"frozen": False},
        "groups": {"sampling": "groups"},
        "epsilon 8": {"clip": clip, "noise": sigma},
        "clip alone": {"clip": clip},
    }
    cuts = [r for r in (SITES // 2, SITES * 3 // 4, SITES, SITES * 5 // 4, SITES * 3 // 2) if r <= args.rounds]
    print(f"epsilon 8 of a site over {args.rounds} rounds, delta 1e-3: noise {sigma:.3g} times the clip")
    for name, options in settings.items():
        rows: dict[tuple[str, int], list[tuple[float, float]]] = {}
        notes = []
        for seed in range(args.seeds):
            toy = run_toy(seed, args.rounds, shadows=args.shadows, **options)
            inside = identifiability(toy.system.A, list(map(str, range(SITES))))
            estimate = posterior(toy.system, POSITIVE / SITES)
            covered = (toy.truth >= estimate.low) & (toy.truth <= estimate.high)
            notes.append(
                f"shadow accuracy {toy.shadow_accuracy:.2f}, model accuracy {toy.accuracy:.2f}, persistence "
                f"{toy.system.persistence:.2f}, rank {inside.rank}, single {len(inside.single)}, condition "
                f"{inside.condition:.1f}, sd {estimate.sd.mean():.3f}, covered {covered.mean():.2f}"
            )
            for cut in cuts:
                found = decisions(toy, cut)
                if args.prolin and cut in (cuts[0], cuts[-1]):
                    tau = prolin(toy.system.until(cut), seed=seed, steps=args.prolin)
                    found["PROLIN"] = f1(toy.truth, tau > 0.5), auc(toy.truth, tau)
                for key, pair in found.items():
                    rows.setdefault((key, cut), []).append(pair)
        print(f"\n## {name}", *notes, sep="\n")
        for (key, cut), pairs in sorted(rows.items(), key=str):
            scores = [interval([p[i] for p in pairs], cut=True) for i in (0, 1)]
            print(f"{key:18} R={cut:<3} F1 {scores[0]}  AUC {scores[1]}")


def mixed(A: Floats, seed: int) -> Floats:
    """Return a participation matrix in which other sites took part: each round's numbers are dealt out anew."""
    return numpy_generator(seed, "mixed").permuted(A, axis=1)


def noise_for(target: float, rounds: int) -> float:
    """Return the noise, in units of the clip, that gives a site epsilon ``target`` at delta 1e-3."""
    low, high = 0.5, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        spent = epsilon(
            middle, rounds=rounds, delta=1e-3, sampling="fixed", rate=PER_ROUND / SITES, units=SITES,
            neighbours="replace-one", accountant="rdp",
        )  # fmt: skip
        low, high = (middle, high) if spent > target else (low, middle)
    return high


def interval(values: list[float], *, cut: bool = False) -> str:
    """Return mean and 95 % Student t interval over seeds, cut to 0..1 for what cannot be beyond."""
    mean = float(np.mean(values))
    half = reach(values) if len(values) > 1 else 0.0
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if cut else (mean - half, mean + half)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
