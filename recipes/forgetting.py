"""Forgetting one of four real sites, or a twentieth of its patients, by every way, beside training again.

    python recipes/forgetting.py heart DATA --out results/forgetting/heart --page heart.md
    python recipes/forgetting.py ham10000 DATA --out results/forgetting/ham --page ham.md engine.precision=fp32

DATA is the folder that ``recipes/heart_disease.py`` or ``recipes/ham10000.py`` takes. For every seed it does what these
do, and judges every result by the same models, trained again without the forgotten with seeds of their own:

    confrere run TABLE.csv --out RUN --method fedit --seed SEED controls=[] ...
    confrere forget RUN --site SITE --by WAY --out OUT --judge 5
    confrere forget RUN --patients list.csv --by WAY --out OUT --judge 5

What was done is not done again.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ham10000
import heart_disease
import numpy as np
import torch

from confrere.backbones import default_size
from confrere.config import Experiment, override, validate
from confrere.data.federation import examine
from confrere.data.table import read_rows
from confrere.fingerprint import stored_experiment
from confrere.forgetting.data import open_both
from confrere.forgetting.forget import forget
from confrere.forgetting.judge import Answer, answer, interval, judge
from confrere.forgetting.judging import asked_of, framed, model_after, model_of, prepared, retrained
from confrere.forgetting.way import WAYS
from confrere.forgetting.who import Whom, read_list
from confrere.job import run_experiment
from confrere.prefix import cache_dir
from confrere.record.files import read_json, write_json
from confrere.record.run import Run
from confrere.seeds import numpy_generator

SHARE, SEEDS, MODELS = 0.05, (0, 1, 2), 5
BY = ("rebuild", "federaser", "neggrad", "scrub", "ssd", "distillation", "purification")
KINDS = ("test", "forgotten", "weights")


@dataclass(frozen=True)
class Setup:
    """What is trained on one data set: the site to forget, and everything that is not a default."""

    site: str
    settings: dict[str, Any]
    choices: tuple[str, ...]


SETUPS = {
    "heart": Setup("cleveland", heart_disease.SETTINGS, ("rounds=12", "train.lr=2e-3")),
    "ham10000": Setup(
        "rosendahl",
        ham10000.SETTINGS,
        (
            *("rounds=6", "train.steps=20", "train.lr=2e-3", "selection.every=3", "selection.images=100"),
            *("backbone.image_size=56", "adapter.blocks=2", "threads=1", "workers=1"),
        ),
    ),
}


def table_of(args: argparse.Namespace) -> Path:
    """Write the table of a data set once, with a column of patients, and return it."""
    if args.set == "ham10000":
        return part(ham10000.prepare(args.data, args.out / "data"), args.share, args.out / "data" / "part.csv")
    out = args.out / "data" / "patients.csv"
    if not out.exists():
        rows = [cells for _, cells in read_rows(heart_disease.prepare(args.data, args.out / "data"), ["site"])]
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "patient"])
            writer.writeheader()
            writer.writerows({**cells, "patient": f"row{number}"} for number, cells in enumerate(rows))
    return out


def part(table: Path, share: float, out: Path) -> Path:
    """Write the rows of a share of every site's lesions, drawn once: a small machine has to train often here."""
    if out.exists():
        return out
    rows = [cells for _, cells in read_rows(table, ["path", "label", "site", "lesion"])]
    kept = set()
    for site in sorted({cells["site"] for cells in rows}):
        names = sorted({cells["lesion"] for cells in rows if cells["site"] == site})
        order = numpy_generator(0, "part", site).permutation(len(names))
        kept |= {names[i] for i in order[: round(share * len(names))]}
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "site", "lesion"])
        writer.writeheader()
        writer.writerows(cells for cells in rows if cells["lesion"] in kept)
    return out


def experiment(setup: Setup, table: Path, seed: int, overrides: list[str]) -> Experiment:
    """Return what is trained."""
    values = {**setup.settings, "path": str(table.resolve()), "method": "fedit", "seed": seed}
    return validate(override(values, [*setup.choices, *overrides]))


def draw(site: str, run: Path, out: Path) -> Path:
    """Write a twentieth of the site's training patients, drawn once for all seeds."""
    if out.exists():
        return out
    chosen = stored_experiment(run)
    size = chosen.data.image_size or default_size(chosen.backbone.name, chosen.backbone.image_size)
    _, found = examine(Path(chosen.path), chosen.data, size, chosen.split_seed, cache_dir())
    files = next(files for files in found.sites if files.name == site)
    rows = read_rows(run / "splits.csv", ["site", "sha256", "split"])
    train = {cells["sha256"] for _, cells in rows if (cells["split"], cells["site"]) == ("train", site)}
    pairs = zip(files.rows, files.entry.facts, strict=True)
    names = sorted({str(row.patient) for row, fact in pairs if fact.digest in train})
    order = numpy_generator(0, "forgotten patients").permutation(len(names))[: max(1, round(SHARE * len(names)))]
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient"])
        writer.writerows([names[i]] for i in sorted(order))
    return out


def one(args: argparse.Namespace, name: str, who: Whom, runs: list[Path]) -> list[dict[str, Any]]:
    """Return what every way gave for every seed; the models trained again are the same for all."""
    found: list[dict[str, Any]] = []
    others: list[Answer] = []
    for seed, run in zip(SEEDS, runs, strict=True):
        opened = open_both(run, who, args.out / name / f"open-{seed}")
        frame = framed(Run(run), opened, prepared(opened))
        asked = asked_of(opened, frame)
        before = None
        for by in args.by.split(","):
            out = args.out / name / f"{by}-{seed}"
            out.parent.mkdir(parents=True, exist_ok=True)
            kept = args.out / name / f"{by}-{seed}.json"
            if not (kept.exists() and "attack" in read_json(kept)["judgement"]):  # judged before there was one
                others = others or retrained(asked, frame, args.out / name / "models", MODELS)
                before = before or answer(asked, model_of(run, frame))
                done = out / "forgetting.json"
                told = read_json(done) if done.exists() else forget(run, who, out, by=by)
                judged = judge(answer(asked, model_after(out, frame)), before, others, frame.method.slots)
                again = np.mean([read_json(p)["seconds"] for p in (args.out / name / "models").glob("*/results.json")])
                write_json(kept, {**told, "judgement": judged, "again": float(again), "seed": seed, "by": by})
            found.append(read_json(kept))
            print(name, by, seed, found[-1]["cost"], flush=True)
    return found


def cell(values: list[float]) -> str:
    """Return mean and 95 % Student t interval over seeds."""
    of = interval(values)
    return f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})" if of["low"] is not None else f"{of['mean']:.3f}"


def summary(found: list[dict[str, Any]]) -> list[str]:
    """Return the table of one request: rows are the model before, every way, and the models trained again."""
    heads = ["model", "test images", "forgotten images", "weights", "AUC by loss", "AUC by LiRA", "loss, forgotten"]
    heads += ["score kept", "steps", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    by = list(dict.fromkeys(one["by"] for one in found))
    for name in ("before", *by):
        those = [one for one in found if one["by"] == (by[0] if name == "before" else name)]
        which = "before" if name == "before" else "after"
        j = [one["judgement"] for one in those]
        cells = [cell([each["distances"][kind][which]["mean"] for each in j]) for kind in KINDS]
        cells += [cell([each[key][which]["value"] for each in j]) for key in ("membership", "attack")]
        cells += [cell([each[key][which] for each in j]) for key in ("loss", "score")]
        cost = [one["cost"] for one in those]
        steps = "" if name == "before" else f"{np.mean([c['steps'] for c in cost]):.0f}"
        seconds = "" if name == "before" else f"{np.mean([c['seconds'] for c in cost]):.0f}"
        lines.append("| " + " | ".join([f"`{name}`" if name in by else name, *cells, steps, seconds]) + " |")
    one = found[0]
    j = one["judgement"]
    cells = [span(j["distances"][kind]["retrained"]) for kind in KINDS]
    cells += [span(j[key]["retrained"]) for key in ("membership", "attack", "loss", "score")]
    cells += [str(one["retraining"]["steps"]), f"{one['again']:.0f}"]
    lines.append("| " + " | ".join([f"{j['retrained']} trained again", *cells]) + " |")
    return lines


def span(of: dict[str, Any]) -> str:
    """Return mean and interval of a judgement."""
    return f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETUPS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/forgetting"))
    parser.add_argument("--by", default=",".join(BY), help=f"of rebuild, {', '.join(WAYS)}")
    parser.add_argument("--share", type=float, default=0.25, help="of every site's lesions that take part (ham10000)")
    parser.add_argument("--only", choices=("site", "patients"), default="", help="one of the two requests")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value, e.g. engine.precision=fp32")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    setup, table = SETUPS[args.set], table_of(args)
    runs = []
    for seed in SEEDS:
        runs.append(args.out / f"run-{seed}")
        if not (runs[-1] / "results.json").exists():
            run_experiment(experiment(setup, table, seed, args.overrides), runs[-1])
    patients = read_list(draw(setup.site, runs[0], args.out / "patients.csv"))
    lines: list[str] = []
    requests = {"site": Whom(site=setup.site), "patients": Whom(patients=patients)}
    for name, who in ((name, who) for name, who in requests.items() if args.only in ("", name)):
        found = one(args, name, who, runs)
        lines += ["", f"### {who.title()}", "", *summary(found)]
        print("\n".join(lines), flush=True)
    if args.page:
        args.page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
