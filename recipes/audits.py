"""Membership audits on HAM10000 at its four real sites: general and personal adapters of three methods, three seeds.

    python recipes/audits.py DATA --out results/audits --page docs/results/audits.md
    python recipes/audits.py DATA --out results/audits-private --page docs/results/audits-private.md --private
    python recipes/audits.py DATA --out results/audits-whole --page docs/results/audits-whole.md --whole

``--private`` audits a shared adapter that hides every training lesion, at epsilon 8, 4 and 1, and one without noise;
``--whole`` general and personal adapters at epsilon 8, 4 and 1, and without noise, there with ``A`` frozen too.

DATA as for ``recipes/ham10000.py``. One lesion in six is used (chosen by a hash of its name), so that a site is small
enough to be learnt by heart; with ``--private`` one in three, so that something is learnt at all; with ``--whole`` all,
so that one other in a thousand can be seen. With noise there is one image of each, so that what hides an image hides a
lesion. 30 % of lesions are others, who must not be found. Every run is audited with its own reference models. What was
stopped continues where it was.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ham10000 import QUIET, RECORD, one_lesion_in, prepare, without_path

from confrere.audits.audit import Choice
from confrere.audits.job import audit
from confrere.config import override, validate
from confrere.job import run_experiment
from confrere.metrics.bootstrap import reach
from confrere.record.files import read_json
from confrere.record.machine import machine
from confrere.report import write_report

SEEDS = (0, 1, 2)
SETTINGS = ["rounds=6", "train.steps=10", "train.lr=2e-3", "selection.every=2", "selection.images=100", "threads=1"]
SETTINGS += ["workers=1", "controls=[]", "data.test=0.3", "data.val=0.1", "engine.precision=fp32", "adapter.blocks=1"]
POISSON = ["rounds=10", "train.batch_size=64", "train.balance=none", "adapter.rank=4", "selection.every=10"]
BACKBONE = {"name": "dinov2-small-imgfocus", "depth": 8, "image_size": 56}
IN_TURN = f"fedopal:training=in-turn:{QUIET}:{RECORD}"


class Protocol(NamedTuple):
    """What is trained and audited: one lesion in ``share``, ``images`` of each (0: all), ``patients`` of each side."""

    title: str
    methods: tuple[str, ...]
    audits: tuple[str, ...]
    share: int
    images: int
    patients: int
    settings: list[str]


PROTOCOLS = {
    "audits": Protocol("", ("fedopal", "fedit", "local"), ("rmia", "lira", "historical"), 6, 0, 400, SETTINGS),
    "audits-private": Protocol(
        ", with and without noise",
        ("fedit", *(f"fedit:{QUIET}:{RECORD}{epsilon}" for epsilon in (8, 4, 1))),
        ("rmia", "lira", "canary"),
        3,
        1,
        400,
        [*SETTINGS, *POISSON],
    ),
    "audits-whole": Protocol(
        ": whole sites, by class, with and without noise",
        ("fedopal", "fedopal:aggregation=ffa", *(f"{IN_TURN}{epsilon}" for epsilon in (8, 4, 1))),
        ("rmia", "lira"),
        1,
        1,
        5000,
        [*SETTINGS, *POISSON],
    ),
}
"""By the name of their page."""


Found = dict[tuple[str, int, str], dict[str, Any]]


def methods_of(found: Found) -> list[str]:
    """Return the methods in their order."""
    return list(dict.fromkeys(method for method, _, _ in found))


def mean(values: list[float | None], digits: int = 3) -> str:
    """Return the mean over seeds, with a 95 % Student t interval of three or more; a dash where one is undefined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    if len(known) < 3:
        return f"{np.mean(known):.{digits}f}"
    return f"{np.mean(known):.{digits}f} ± {reach(known):.{digits}f}"


def ends(cell: dict[str, float | None]) -> str:
    """Return an estimate with its own interval over patients."""
    if cell["value"] is None or cell["low"] is None:
        return "-"
    if cell["high"] is None:
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def kind(subject: str) -> str:
    """Return what a row is about: ``all``, a ``class`` or a ``site``."""
    return subject if subject == "all" else "class" if subject.startswith("class ") else "site"


def rows(found: Found, seeds: Sequence[int], name: str, about: str = "all") -> list[str]:
    """Return the table of one audit: the strength of every seed, their mean, the placebo's, and what was found."""
    place = [] if about == "all" else ["at"]
    head = [
        "method",
        "model",
        *place,
        "measure",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "placebo",
        "bound",
        "found",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in methods_of(found):
        each = [found[method, seed, name]["rows"] for seed in seeds]
        for at, row in enumerate(each[0]):
            if kind(row["subject"]) != about:
                continue
            same = [one[at] for one in each]
            if all(one["strength"]["value"] is None for one in same):
                continue  # too few others for so low a rate
            cells = [f"`{method}`", row["model"], *([row["subject"]] if place else []), row["measure"]]
            cells += [ends(one["strength"]) for one in same]
            cells += [mean([one[key]["value"] for one in same]) for key in ("strength", "control")]
            cells += [mean([one["bound"] for one in same], 2)]
            lines.append(f"| {' | '.join(cells)} | {sum(one['finding'] == 'found' for one in same)} of {len(same)} |")
    return lines


def power(found: Found, seeds: Sequence[int], name: str) -> list[str]:
    """Return what the attack finds on reference models, whose members are known."""
    lines = [
        "The same attack on reference models of half the size, whose members are known (AUC, mean over seeds):",
        "",
    ]
    for method in methods_of(found):
        key = "AUC on a reference of known members, "
        settings = [found[method, seed, name]["settings"] for seed in seeds]
        said = [k for k in settings[0] if k.startswith(key)]
        parts = [f"{k.removeprefix(key)} {mean([s[k][0] for s in settings])}" for k in said]
        lines.append(f"- `{method}`: " + ", ".join(parts))
    return lines


def page(found: Found, scores: dict[str, str], toml: str, seeds: Sequence[int], name: str) -> str:
    """Return the results page in Markdown; every number comes from the audits' files."""
    methods, protocol = methods_of(found), PROTOCOLS[name]
    first, told = found[methods[0], seeds[0], "rmia"], machine()
    some = "" if tuple(seeds) == SEEDS else f" --seeds {' '.join(map(str, seeds))}"
    lines = [
        f"# Membership audits on HAM10000{protocol.title}",
        "",
        f"Command: `python recipes/audits.py /path/to/fed_ham10000 --out results/{name} --page docs/results/{name}.md"
        f"{some}{name.removeprefix('audits').replace('-', ' --')}`. "
        f"{told['cores']} cores of an AMD EPYC, torch {told['torch']}, one thread, float32. Seeds "
        f"{', '.join(map(str, seeds))}; one split by lesion for all; "
        f"{f'one lesion in {protocol.share} of the set' if protocol.share > 1 else 'all lesions'}"
        f"{', one image of each' if protocol.images else ''}, 30 % of them others. "
        f"{first['settings']['references']} reference models a run. Over all sites: {first['rows'][0]['n']} (a "
        f"lesion counts once){', too few for a rate of 0.1 %' if protocol.share > 1 else ''}. In a seed's column the "
        "interval is over patients, at 95 %; "
        "of the mean, over three or more seeds, Student's t. The placebo is the same attack on reference models, whose "
        "training does not depend on who trained the run; bound: the most that epsilon allows, where a model has one; "
        "found: above chance and above the placebo, by the intervals. "
        "[How to read it](../audits.md).",
        "",
        "Balanced accuracy on test lesions, mean over sites: "
        + "; ".join(f"`{method}` {said}" for method, said in scores.items())
        + ".",
    ]
    for name in protocol.audits:
        one = found[methods[0], seeds[0], name]
        lines += [
            "",
            f"## {one['title']}",
            "",
            *([] if name == "lira" else [one["means"], ""]),
            *rows(found, seeds, name),
        ]
        lines += ["", *power(found, seeds, name)] if name in ("rmia", "lira") else [""]
        if name == "historical":
            lines += [*(f"- `{m}`, seed {s}: {found[m, s, name]['warnings'][1]}" for m in methods for s in seeds)]
    for about in ("site", "class"):
        table = rows(found, seeds, "lira", about)
        if table[2:]:  # audits of before classes had rows have none
            lines += ["", f"## LiRA by {about}", "", *table[:2], *(line for line in table if "| AUC |" in line)]
    return "\n".join([*lines, "", "## The experiment", "", "```toml", without_path(toml), "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/audits"))
    parser.add_argument("--patients", type=int, help="most members, and most others, of each site")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--private", action="store_true", help="methods with noise, beside the same without")
    more.add_argument("--whole", action="store_true", help="whole sites: down to a false-positive rate of 0.1 %%")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    which = "audits-private" if args.private else "audits-whole" if args.whole else "audits"
    protocol = PROTOCOLS[which]
    whole, table = prepare(args.data, args.out / "data"), args.out / "data" / "thinned.csv"
    one_lesion_in(protocol.share, whole, table, most=protocol.images)
    found: Found = {}
    scores: dict[str, list[float | None]] = {}
    toml = ""
    audits, patients = protocol.audits, args.patients or protocol.patients
    for seed in args.seeds:
        for method in protocol.methods:
            values = {"path": str(table.resolve()), "seed": seed, "backbone": BACKBONE}
            experiment = validate(override(values, [*protocol.settings, *args.overrides])).for_method(method)
            toml, out = toml or experiment.toml(), args.out / f"{re.sub(r'[^a-z0-9=.-]+', '-', method)}-{seed}"
            run_experiment(experiment, out)
            missing = [name for name in audits if not (out / "audits" / f"{name}.json").exists()]
            if missing:
                audit(out, only=missing, choice=Choice(seed=seed, patients=patients, notify=print))
            print(write_report(out), flush=True)
            scores.setdefault(method, []).append(read_json(out / "results.json")["summary"]["personalised"]["mean"])
            for name in audits:
                found[method, seed, name] = read_json(out / "audits" / f"{name}.json")
    if args.page:
        said = {method: mean(each) for method, each in scores.items()}
        args.page.write_text(page(found, said, toml, args.seeds, which))


if __name__ == "__main__":
    main()
