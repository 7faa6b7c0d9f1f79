"""Client-level differential privacy for survival: DPFed, its second clip (DPFed-post), and what that clip amounts to.

    python recipes/private_survival.py --out results/private-survival
    python recipes/private_survival.py --out results/private-survival --studies tcga --tcga DATA --seeds 0,1,2

Two public trials that lifelines brings along: GBSG2 (686 women, recurrence of breast cancer) and ACTG175 (2,139
patients with HIV, progression or death). A fifth of the patients, drawn anew by each seed, tests; the others are dealt
out evenly to simulated sites. Features are standardised with round numbers that were written down beforehand
(``Study``), so that nothing is fitted on pooled patients. Every arm keeps its last round and draws each site by itself
with chance 1/2 a round. Hundreds of small trainings: drawn sites take their steps side by side in one batched network
(``simulate``), with the draws, the clip and the aggregation of the package; a test holds that against an ordinary run.
Noise has a seed, so that all of this is a simulation without privacy.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tcga_brca
import torch

from confrere.config import override, validate
from confrere.errors import MissingExtraError
from confrere.federation.sampling import sample
from confrere.job import Prepared, initial
from confrere.job import prepare as prepare_job
from confrere.method import Method, Reply, make
from confrere.methods.dpfed import DPFed
from confrere.methods.noise import clipped
from confrere.metrics.bootstrap import reach
from confrere.opening import open_data
from confrere.optimiser import AdamW
from confrere.privacy import epsilon
from confrere.record.files import write_json
from confrere.seeds import numpy_generator
from confrere.tasks.task import Answers
from confrere.tensors import State, Tensors

SEEDS = tuple(range(5))
SCORES = ("harrell", "auc", "ibs")
CLIP, POST, DELTA = 0.3, 3.0, 1e-3  # the paper's example; delta is weak, and the paper's
BINARY = (0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A data set of lifelines: column of the time (in days) and of the event, and (mean, sd) by feature."""

    load: str
    time: str
    event: str
    horizon: float
    features: Mapping[str, tuple[float, float]]


STUDIES = {
    "gbsg2": Study(
        load="load_gbsg2",
        time="time",
        event="cens",
        horizon=5.0,
        features={
            "horTh": BINARY,
            "age": (50.0, 10.0),
            "menostat": BINARY,
            "tsize": (30.0, 15.0),
            "tgrade": (2.0, 1.0),
            "pnodes": (5.0, 5.0),
            "progrec": (100.0, 200.0),
            "estrec": (100.0, 200.0),
        },
    ),
    "actg175": Study(
        load="ACTG175.csv",
        time="days",
        event="cens",
        horizon=3.0,
        features={
            "age": (35.0, 10.0),
            "wtkg": (75.0, 15.0),
            "karnof": (90.0, 10.0),
            "preanti": (500.0, 500.0),
            "cd40": (350.0, 150.0),
            "cd80": (1000.0, 500.0),
            **dict.fromkeys(("hemo", "homo", "drugs", "oprior", "z30", "race", "gender", "symptom", "treat"), BINARY),
        },
    ),
}
CELLS = {"no": 0, "yes": 1, "Pre": 0, "Post": 1, "I": 1, "II": 2, "III": 3}

SETTINGS: dict[str, Any] = {
    "threads": 1,
    "workers": 1,
    "controls": [],
    "hold_out": "test",
    "backbone": {"name": "mlp"},
    "adapter": {"rank": 2, "blocks": 2, "dropout": 0.0},
    "train": {"lr": 4e-3, "steps": 4, "balance": "none"},  # full batches
    "federation": {"sampling": "poisson", "fraction": 0.5, "weights": "equal"},
    "gate": {"norm": 0.0, "factor": 0.0},
    "rounds": 50,
}


def arms(numbers: int, sites: int) -> dict[str, dict[str, Any]]:
    """Return options of the method by arm: ``numbers`` are sent by each of ``sites`` sites."""
    expected = sites / 2
    plain: dict[str, Any] = {"name": "dpfed", "clip": CLIP, "sigma": 0.0, "post": 0.0}
    found: dict[str, dict[str, Any]] = {"FedAvg": {"name": "fedit"}}
    for sigma in (2.0, 3.0):
        equal = DPFed(sigma=sigma, clip=CLIP, post=POST).equal_lr(numbers, expected)
        found |= {
            f"DPFed, sigma {sigma:g}": {**plain, "sigma": sigma},
            f"DPFed-post, sigma {sigma:g}": {**plain, "sigma": sigma, "post": POST},
            f"equal step, sigma {sigma:g}": {**plain, "sigma": sigma, "server_lr": equal},
            f"equal step of {sigma:g}, no noise": {**plain, "server_lr": equal},
        }
    return found


def prepare(name: str, sites: int, seed: int, out: Path) -> Path:
    """Write the table of a study: a fifth of its patients at ``test``, the others dealt out; return the CSV."""
    table = out / f"{name}-{sites}-{seed}.csv"
    if table.exists():
        return table
    study = STUDIES[name]
    rows = patients(study)
    order = numpy_generator(seed, "private-survival", name).permutation(len(rows))
    tested = len(rows) // 5
    out.mkdir(parents=True, exist_ok=True)
    with table.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "split", "time", "event", *study.features])
        for place, index in enumerate(order):
            site, split = ("test", "test") if place < tested else (f"s{place % sites:03d}", "train")
            split = "train" if not place else split  # every site needs a training row; this one's never trains
            writer.writerow([site, split, *rows[index]])
    table.with_suffix(".tmp").replace(table)
    return table


def patients(study: Study) -> list[list[float]]:
    """Return time in years, event and features of every patient."""
    try:
        from lifelines import datasets
    except ImportError as error:
        raise MissingExtraError("lifelines", "dev", needed_for="the data") from error
    loader: Callable[[], Any] = getattr(datasets, study.load, lambda: datasets._load_dataset(study.load))
    frame = loader()
    columns = [study.time, study.event, *study.features]
    cells = [[CELLS.get(cell, cell) for cell in row] for row in frame[columns].values.tolist()]
    return [[row[0] / 365.25, int(row[1]), *map(float, row[2:])] for row in cells]


def open_tcga(data: Path, seed: int, tables: Path, more: Sequence[str] = ()) -> Prepared:
    """Return the six regions of ``tcga_brca.py``, each with its own test patients, ready to train."""
    table = tcga_brca.prepare(data, tables).resolve()
    chosen = {**SETTINGS, "hold_out": None, "path": str(table), "seed": seed, "task": tcga_brca.SETTINGS["task"]}
    experiment = validate(override({**chosen, "method": {"name": "fedit"}}, more))
    return prepare_job(experiment, open_data(experiment, tables / f"tcga-{seed}"), lambda event: None)


def open_study(name: str, sites: int, seed: int, tables: Path, more: Sequence[str] = ()) -> Prepared:
    """Return a study with its sites, their rows after the frozen part of the network, ready to train."""
    study = STUDIES[name]
    table = prepare(name, sites, seed, tables).resolve()
    chosen = {
        **SETTINGS,
        "path": str(table),
        "seed": seed,
        "task": {"name": "survival", "horizon": study.horizon, "bins": 10},
        "data": {"val": 0.0, "constants": {key.lower(): list(value) for key, value in study.features.items()}},
        "method": {"name": "fedit"},
    }
    experiment = validate(override(chosen, more))
    return prepare_job(experiment, open_data(experiment, table.with_suffix("")), lambda event: None)


def simulate(task: Prepared, methods: Mapping[str, Method]) -> dict[str, State]:
    """Return the server's state after all rounds, by arm: as ordinary runs, but all train side by side."""
    experiment, names = task.experiment, task.training_sites
    servers = {arm: method.init_server(initial(task, "")) for arm, method in methods.items()}
    for arm, method in methods.items():
        if isinstance(method, DPFed):
            servers[arm] = method.expecting(servers[arm], len(names) * experiment.federation.fraction)
    for round_ in range(1, experiment.rounds + 1):
        drawn = sample(names, experiment.federation.fraction, experiment.seed, round_, "poisson")
        trained = iter(trained_together(task, [s["shared"] for s in servers.values() for _ in drawn], drawn))
        for arm, method in methods.items():
            replies, start = [], servers[arm]["shared"]
            for site, found in zip(drawn, islice(trained, len(drawn)), strict=True):
                sent = clipped(found, start, method.clip) if isinstance(method, DPFed) else found
                replies.append(Reply(site=site, run="", round=round_, state={"shared": sent}, weight=1.0))
            if replies or isinstance(method, DPFed):
                servers[arm] = method.aggregate(servers[arm], replies)
    return servers


def trained_together(task: Prepared, starts: Sequence[Tensors], drawn: Sequence[str]) -> list[Tensors]:
    """Return each start, one of each drawn site again and again, after that site's local steps.

    Full batches and AdamW, as ``Learner.fit`` without dropout.
    """
    if not starts:
        return []
    backbone, choice, times = task.backbone, task.experiment.train, len(starts) // len(drawn)
    batches = [task.data[site].batch(task.data[site].rows("train")) for site in drawn]
    most = max(len(batch.tokens) for batch in batches)
    tokens = torch.stack([padded(batch.tokens, most) for batch in batches] * times)
    targets = torch.stack(
        [padded(batch.labels, most) for batch in batches] * times
    )  # of nobody: censored at 0, no loss
    share = torch.tensor([most / len(batch.tokens) for batch in batches] * times)
    stack = {n: torch.stack([start[n] for start in starts]).requires_grad_() for n in sorted(starts[0])}
    loss = backbone.task.objective(backbone.task.losses[0])
    each = torch.func.vmap(lambda params, rows, truth: loss(backbone.logits(params, rows), truth))
    optimiser = AdamW(list(stack.values()), lr=choice.lr, weight_decay=choice.weight_decay)
    for _ in range(choice.steps):
        optimiser.zero_grad()
        torch.autograd.backward((each(stack, tokens, targets) * share).sum())
        grads = [value.grad for value in stack.values() if value.grad is not None]
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        scale = (choice.clip / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= scale.view(-1, *[1] * (grad.ndim - 1))
        optimiser.step()
    return [{name: value[k].detach() for name, value in stack.items()} for k in range(len(starts))]


def padded(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return rows followed by zeros, ``most`` in all."""
    return torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])


@torch.no_grad()
def examined(task: Prepared, shared: Tensors) -> dict[str, float]:
    """Return the scores of a general model on the site that was held out, or their mean over the sites."""
    found = []
    for site in [task.experiment.hold_out] if task.experiment.hold_out else task.training_sites:
        data, rng = task.data[site], numpy_generator(task.experiment.seed, "bootstrap", site)
        rows = data.rows("test")
        outputs = task.backbone.logits(shared, data.batch(rows).tokens)
        asked = Answers(outputs=outputs, targets=data.targets(rows), groups=data.groups[rows])
        none = Answers(outputs=outputs[:0], targets=asked.targets[:0], groups=asked.groups[:0])
        found.append(task.backbone.task.examine(none, asked, classes=data.classes, generator=rng)[0]["metrics"])
    values = {key: [one[key]["value"] for one in found if one[key]["value"] is not None] for key in SCORES}
    return {key: float(np.mean(known)) for key, known in values.items()}


def study_arms(open_: Callable[[int], Prepared], seeds: Sequence[int], out: Path, only: Sequence[str]) -> Any:
    """Return, by arm, the scores of each seed; what was found before is not done again."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        task = open_(seed)
        numbers = sum(value.numel() for value in initial(task, "").values())
        every = arms(numbers, len(task.training_sites))
        chosen = {arm: options for arm, options in every.items() if not only or arm in only}
        kept = {arm: out.with_name(f"{out.name}-{seed}") / f"{slug(arm)}.json" for arm in chosen}
        new = {arm: options for arm, options in chosen.items() if not kept[arm].exists()}
        for arm, server in simulate(task, {arm: built(options, seed) for arm, options in new.items()}).items():
            write_json(kept[arm], {**examined(task, server["shared"]), "numbers": numbers})
        for arm, path in kept.items():
            found.setdefault(arm, []).append(json.loads(path.read_text()))
            print(seed, arm, found[arm][-1], flush=True)
    return found


def built(options: Mapping[str, Any], seed: int) -> Method:
    """Return a method by its name and options, with seeded noise where it makes some."""
    noise = {"noise_seed": seed + 1} if options["name"] == "dpfed" else {}
    return make(options["name"], {**{key: value for key, value in options.items() if key != "name"}, **noise})


def slug(arm: str) -> str:
    """Return the folder of an arm."""
    return arm.lower().replace(",", "").replace(" ", "-")


def interval(values: Sequence[float]) -> str:
    """Return mean and 95 % Student t interval: ``0.612 (0.590 to 0.634)``."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return f"{array.mean():.3f}"
    half = reach(values)
    return f"{array.mean():.3f} ({array.mean() - half:.3f} to {array.mean() + half:.3f})"


def spent(arm: str) -> tuple[str, str]:
    """Return epsilon of an arm without amplification, and with that of Poisson sampling of whole sites."""
    sigma = arm.partition("sigma ")[2]
    if not sigma:
        return "-", "-"
    options: dict[str, Any] = {"rounds": SETTINGS["rounds"], "delta": DELTA}
    drawn = epsilon(float(sigma), rate=SETTINGS["federation"]["fraction"], **options)
    return f"{epsilon(float(sigma), sampling='all', **options):.2f}", f"{drawn:.2f}"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a row an arm, in Markdown."""
    lines = ["| arm | concordance (Harrell) | AUC | integrated Brier score | epsilon | conditional |", "|---" * 6 + "|"]
    for arm, seeds in found.items():
        told = spent(arm)
        lines.append("| " + " | ".join([arm, *(interval([one[key] for one in seeds]) for key in SCORES), *told]) + " |")
    return "\n".join(lines)


def gains(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return differences in concordance of the same seeds, where both arms are there."""
    lines = ["| difference in concordance | seeds together |", "|---|---|"]
    for sigma in ("2", "3"):
        plain, post, equal = (f"{kind}, sigma {sigma}" for kind in ("DPFed", "DPFed-post", "equal step"))
        quiet = f"equal step of {sigma}, no noise"
        for more, less in ((post, plain), (equal, post), (quiet, equal), ("FedAvg", post)):
            if more in found and less in found:
                pairs = zip(found[more], found[less], strict=True)
                lines.append(f"| {more} less {less} | {interval([a['harrell'] - b['harrell'] for a, b in pairs])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/private-survival"))
    parser.add_argument("--studies", default="gbsg2:10,actg175:10,actg175:100", help="data set and number of sites")
    parser.add_argument("--tcga", type=Path, help="folder of Fed-TCGA-BRCA, for --studies tcga")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--arms", default="", help="only these, with semicolons between")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for one in args.studies.split(","):
        name, _, sites = one.partition(":")
        only, tables = [arm for arm in args.arms.split(";") if arm], args.out / "tables"
        if name == "tcga":
            open_ = partial(open_tcga, args.tcga, tables=tables, more=args.overrides)
        else:
            open_ = partial(open_study, name, int(sites), tables=tables, more=args.overrides)
        found = study_arms(open_, seeds, args.out / one.replace(":", "-"), only)
        print(f"\n{one}\n\n{table(found)}\n\n{gains(found)}\n", flush=True)


if __name__ == "__main__":
    main()
