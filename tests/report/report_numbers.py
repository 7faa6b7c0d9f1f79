"""Plausible numbers of a finished run, drawn from a generator."""

from __future__ import annotations

from typing import Any

import numpy as np

from confrere.metrics.paired import spoken
from confrere.tasks.segmentation import Segmentation

MASKS = Segmentation().describe()


def interval(rng: np.random.Generator, centre: float, width: float = 0.08) -> dict[str, float]:
    low, high = rng.uniform(0.5, 1.0, 2) * width
    return {"value": centre, "low": max(0.0, centre - low), "high": min(1.0, centre + high)}


def scores(rng: np.random.Generator, classes: list[str], quality: float, *, n: int = 120) -> dict[str, Any]:
    """One model's test scores at one site, as ``confrere.metrics.evaluate`` writes them."""
    K = len(classes)
    absent = [classes[-1]] if K > 3 else []
    weights = np.array([0 if name in absent else 1 + 6 * (k == K // 2) for k, name in enumerate(classes)])
    truth = rng.multinomial(n, weights / weights.sum())
    confusion = np.zeros((K, K), int)
    for k in range(K):
        share = np.full(K, (1 - quality) / max(1, K - 1))
        share[k] = quality
        confusion[k] = rng.multinomial(truth[k], share / share.sum())
    recall = confusion.diagonal() / np.maximum(truth, 1)
    return {
        "n": n,
        "patients": n // 3,
        "balanced_accuracy": interval(rng, float(recall[truth > 0].mean())),
        "auroc": interval(rng, min(0.99, quality + 0.15), 0.05),
        "f1": interval(rng, quality - 0.05),
        "accuracy": interval(rng, quality + 0.03),
        "ece": interval(rng, 0.08, 0.04),
        "confusion": confusion.tolist(),
        "recall": {
            c: interval(rng, float(r), 0.2) if t else None for c, r, t in zip(classes, recall, truth, strict=True)
        },
        "absent": absent,
        "notes": [f"No test image of {name}." for name in absent],
    }


def mask_scores(rng: np.random.Generator, classes: list[str], quality: float, *, n: int = 120) -> dict[str, Any]:
    """One model's test scores at one site, as ``confrere.metrics.masks.evaluate_masks`` writes them."""
    return {
        "n": n,
        "patients": n // 3,
        "dice": interval(rng, quality),
        "iou": interval(rng, quality / (2 - quality)),
        "hd95": interval(rng, 0.11 - 0.05 * quality, 0.03),
        "box_iou": interval(rng, quality - 0.06),
        "by_class": {name: interval(rng, quality + 0.02 * k, 0.1) for k, name in enumerate(classes[1:])},
        "notes": ["2 test masks hold background only and are left out."],
    }


def reliability(rng: np.random.Generator) -> list[dict[str, Any]]:
    bins = []
    for k in range(10):
        empty = k < 2
        centre = (k + 0.5) / 10
        accuracy = float(np.clip(centre - 0.06 + rng.normal(0, 0.04), 0, 1))
        bins.append(
            {"low": k / 10, "high": (k + 1) / 10, "n": 0 if empty else int(3 + 4 * k)}
            | {"confidence": None if empty else centre, "accuracy": None if empty else accuracy}
        )
    return bins


def overlap(rng: np.random.Generator, sites: list[str], a: float, b: float, outputs: float | None) -> dict[str, Any]:
    return {
        s: {
            "A": a + rng.normal(0, 0.004),
            "B": b + abs(rng.normal(0, 0.02)),
            "product": a / 2 + rng.normal(0, 0.001),
            "outputs": outputs,
        }
        for s in sites
    }


def events(rng: np.random.Generator, sites: list[str], rounds: int, *, failures: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    n = len(sites)
    for t in range(1, rounds + 1):
        progress = 1 - np.exp(-t / 4)
        local = {
            s: {
                "loss": 1.9 - 1.3 * progress,
                "examples": 150 + 30 * k,
                "sent_bytes": 594_432,
                "received_bytes": 594_432,
                "seconds": 3.1 + k,
            }
            for k, s in enumerate(sites)
        }
        later = True if t > 1 else None  # the outputs are not compared in round 1
        similarity = np.clip(np.eye(n) + 0.3 + rng.normal(0, 0.15, (n, n)), -1, 1)
        similarity = (similarity + similarity.T) / 2
        np.fill_diagonal(similarity, 1)
        rows.append(
            {
                "event": "round",
                "round": t,
                "seconds": 14.2,
                "sites": local,
                "diagnostics": {
                    "overlap_before": overlap(rng, sites, 0.02, 0.05 + 0.05 * progress, later and 0.04),
                    "overlap_after": overlap(rng, sites, 0.025, 0.08 + 0.09 * progress, later and 0.07),
                    "aggregation_error": 0.03 * progress if t > 1 else None,
                    "similarity": {"sites": sites, "matrix": similarity.round(3).tolist()},
                },
            }
        )
        values = {s: float(0.25 + (0.3 + 0.04 * k) * progress + rng.normal(0, 0.015)) for k, s in enumerate(sites)}
        rows.append(
            {
                "event": "evaluation",
                "round": t,
                "split": "val",
                "sites": values,
                "mean": float(np.mean(list(values.values()))),
            }
        )
        if failures and t == 3:
            rows.append(
                {
                    "event": "failure",
                    "round": t,
                    "site": sites[-1],
                    "reason": "training diverged; update not used",
                }
            )
    rows.append({"event": "stop", "round": rounds, "reason": "no better validation score for 4 rounds"})
    return rows


def results(
    rng: np.random.Generator,
    sites: list[str],
    classes: list[str],
    rounds: int,
    method: str,
    title: str,
    *,
    quality: float,
    general: bool,
    task: dict[str, Any] | None = None,
) -> dict[str, Any]:
    entries = {}
    score, headline = (mask_scores, task["headline"]) if task else (scores, "balanced_accuracy")
    for k, site in enumerate(sites):
        models = {"personalised": score(rng, classes, quality + 0.03 * (k % 3))}
        models["general"] = score(rng, classes, quality - 0.08) if general else None
        of_classes = {"temperature": 1.31, "reliability": reliability(rng), "ece_before": 0.14}
        entries[site] = {
            "models": models,
            **({"temperature": 1.0} if task else of_classes),
            "sent_bytes": 594_432 * rounds,
            "received_bytes": 594_432 * rounds,
            "held_out": False,
        }
    summary = {}
    for model in ("personalised", "general"):
        found = {s: e["models"][model][headline]["value"] for s, e in entries.items() if e["models"][model]}
        worst = min(found, key=lambda s: found[s]) if found else None
        summary[model] = (
            {
                "mean": float(np.mean(list(found.values()))),
                "worst": found[worst],
                "worst_site": worst,
                "spread": max(found.values()) - min(found.values()),
                "undefined": [],
            }
            if found
            else None
        )
    return {
        "method": method,
        "title": title,
        "seed": 0,
        "round": max(1, rounds - 4),
        "rounds": rounds,
        "seconds": 171.9,
        "held_out": None,
        **({"task": task, "classes": classes} if task else {}),
        "method_info": {
            "sends": ["general adapter", "head"],
            "keeps": ["personal adapter"],
            "needs": "sum",
            "paper": "arXiv:2510.12741",
        },
        "sites": entries,
        "summary": summary,
        "machine": {
            "confrere": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "device": "cpu",
            "threads": 2,
        },
    }


def sheet(sites: list[str], classes: list[str]) -> dict[str, Any]:
    def one(k: int) -> dict[str, Any]:
        counts = {c: {"train": 12 * (j + 1) + k, "val": 3 + j, "test": 4 + j} for j, c in enumerate(classes)}
        counts[classes[-1]] = {"train": 0, "val": 0, "test": 0}
        total = {split: sum(row[split] for row in counts.values()) for split in ("train", "val", "test")}
        return {
            "images": sum(total.values()),
            "patients": 80 + 7 * k,
            "splits": {split: {"images": n, "patients": n // 3} for split, n in total.items()},
            "classes": {c: row | {"total": sum(row.values())} for c, row in counts.items()},
            "original_width": [450, 600],
            "original_height": [450, 450],
            "channel_mean": [191.56, 138.29, 143.08],
            "channel_std": [30.88, 35.73, 38.81],
            "formats": {"JPEG": 230, "PNG": 10},
            "bad_files": {"truncated": 2} if k == 1 else {},
            "duplicates": k,
            "conflicts": 0,
            "outlier": k == 2,
        }

    return {
        "sites": {s: one(k) for k, s in enumerate(sites)},
        "warnings": [f"No image of class {classes[-1]!r} at {sites[0]}."],
        "shared_pictures": 0,
        "shared_patients": 1,
    }


def verdicts(
    rng: np.random.Generator, sites: list[str], *, undefined: bool, metric: str = "balanced_accuracy"
) -> dict[str, Any]:
    judged: dict[str, Any] = {}
    for k, site in enumerate(sites):
        judged[site] = {}
        for other, shift in (("local", 0.062 - 0.045 * (k % 4)), ("pooled", -0.02)):
            low, high = shift - 0.04 - 0.01 * k % 0.03, shift + 0.035
            word = "raised" if low > 0 else "lowered" if high < 0 else "did not clearly change"
            judged[site][other] = {
                "metric": metric,
                "gain": shift,
                "low": low,
                "high": high,
                "p": float(rng.uniform(0.001, 0.9)),
                "patients": 41 + k,
                "seeds": 1,
                "note": None,
                "sentence": f"At {site}, joining the federation {word} the {spoken(metric)} "
                f"({100 * shift:+.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}).",
            }
    judged[sites[0]]["local"] |= {
        "gain": 0.094,
        "low": 0.041,
        "high": 0.148,
        "sentence": f"At {sites[0]}, joining the federation raised the {spoken(metric)} by 9.4 points "
        "(95 % interval 4.1 to 14.8) over training alone: joining paid.",
    }
    if undefined:
        judged[sites[-1]]["local"] |= {
            "gain": None,
            "low": None,
            "high": None,
            "p": None,
            "note": "there are no test images",
            "sentence": f"At {sites[-1]}, joining the federation cannot be compared with training alone: "
            "there are no test images.",
        }
    return {
        "sites": judged,
        "headline": f"Joining paid at 1 of {len(sites)} hospitals and harmed none.",
        "note": "Intervals are not adjusted for the number of hospitals.",
    }
