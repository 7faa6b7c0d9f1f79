"""``attribute``: what a model adds about one thing of a patient of whom everything else is known, the label too.

A column of a table: each value is tried, and the one taken under which the model is surest of the right class
(Fredrikson et al., USENIX Security 2014; Yeom et al., CSF 2018, without the prior). For images, and tables too, the
hospital: the one whose model is surest. What a model has learnt of everybody it tells of members and others alike:
only the difference is theirs (Yeom et al., definition 6), and a guess without any model is often as good (Jayaraman
and Evans, CCS 2022).

Shapes: N rows, V values, R references.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.audits import statistics
from confrere.audits.attribute_questions import SITE, Question, Whole, by_size, questions
from confrere.audits.audit import Audit, Choice, Interval, Row, register
from confrere.audits.membership import NO_POWER, averaged
from confrere.audits.references import by_patient, confidence, references
from confrere.audits.tapped import MODELS, AuditedRun, Guarantee
from confrere.data.splits import TRAIN
from confrere.learner import predict

Bools = NDArray[np.bool_]
MEANS = (
    "Advantage: how much more often the attribute is guessed right of training patients than of others; 0 is what a "
    "model tells of everybody. Accuracy: the share guessed right of training patients; chance is guessing the most "
    "common value, without any model."
)
CONTROL = (
    "The same attack on reference models, whose training does not depend on who trained the run (mean over them); "
    "accuracy: on training patients of the run that a reference did not train on."
)
LIMITS = (
    "Accuracy above chance without advantage is what the model says of everybody like this patient, trained on or not; "
    "so is what it has above references, which trained on fewer patients.",
    "A column that the others give away needs no model; the audit does not see this.",
    "Confidence in the right class alone is used; weights, or models to compare with, may give more.",
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Whether it was guessed right, (N,) by the run's model, (R, N) by references; who trained which; ``common``."""

    patients: Whole
    inside: Bools
    trained: Bools
    common: Bools
    right: Bools
    rights: Bools

    def outside(self, reference: int) -> tuple[Whole, Bools, Bools]:
        """Return patients, whether right and whether members, of those that a reference was not trained on."""
        out = ~self.trained[reference]
        return self.patients[out], self.rights[reference][out], self.inside[out]


def guess(run: AuditedRun, asked: Question, model: str) -> Whole | None:
    """Return the number of the value under which a model is surest of the right class (N,); None without a model."""
    sets = asked.guesses or [run.data[asked.site]] * len(run.sites)
    asks = [asked.site] * len(sets) if asked.guesses else by_size(run)
    rows = np.arange(len(asked.rows)) if asked.guesses else asked.rows
    sure = []
    for site, data in zip(asks, sets, strict=True):
        key = "params", site, model
        if key not in run.memo:
            run.memo[key] = run.params(site, model)
        if run.memo[key] is None:
            return None
        logits = predict(run.task.backbone_of(site), run.memo[key], data, rows, scores=run.method.scores)
        sure.append(confidence(logits, data.labels[rows])[0])
    return np.asarray(np.stack(sure).argmax(0))


def answers(run: AuditedRun, trained: Sequence[AuditedRun], asked: Question, model: str) -> Answers | None:
    """Return whether each guess was right; None where the run or a reference has no such model."""
    guessed = [guess(one, asked, model) for one in (run, *trained)]
    right = [one == asked.truth for one in guessed if one is not None]
    if len(right) < len(guessed):
        return None
    data = run.data[asked.site]
    return Answers(
        patients=data.groups[asked.rows],
        inside=data.split[asked.rows] == TRAIN,
        trained=np.stack([one.data[asked.site].split[asked.rows] == TRAIN for one in trained]),
        common=asked.truth == 0,
        right=right[0],
        rights=np.stack(right[1:]),
    )


def counted(parts: Sequence[tuple[Whole, Bools, Bools]]) -> tuple[int, int, int, int]:
    """Return of patients, rights and marks: members guessed right, members, others guessed right, others.

    A patient counts as guessed right where most of the rows are.
    """
    sides = [by_patient(right.astype(np.float64), patients, inside) for patients, right, inside in parts]
    inside, outside = (np.concatenate([one[side] for one in sides]) > 0.5 for side in (0, 1))
    return int(inside.sum()), len(inside), int(outside.sum()), len(outside)


def gap(found: tuple[int, int, int, int]) -> Interval:
    """Return the accuracy on members less that on others; undefined where either are none."""
    return statistics.difference(*found) if found[1] and found[3] else Interval()


def rows(
    subject: str, model: str, name: str, seen: Sequence[Answers], guarantee: Guarantee | None
) -> tuple[list[Row], Interval]:
    """Return advantage and accuracy of one attack beside placebo and bound, and its advantage on known references."""
    own = counted([(one.patients, one.right, one.inside) for one in seen])
    each = range(len(seen[0].rights))
    placebo = [counted([(one.patients, one.rights[r], one.inside) for one in seen]) for r in each]
    power = averaged([gap(counted([(one.patients, one.rights[r], one.trained[r]) for one in seen])) for r in each])
    strangers = [counted([one.outside(r) for one in seen]) for r in each]
    common, members, *_ = counted([(one.patients, one.common, one.inside) for one in seen])
    bound = None
    if guarantee is not None and guarantee.covers(model):
        most = max(int(np.unique(one.patients, return_counts=True)[1].max()) for one in seen)
        bound = statistics.advantage_bound(*guarantee.of_patient(most))
    size = f"{members} members, {own[3]} others"
    row = partial(Row, subject=subject, model=model, n=size, main=subject == "all")
    advantage = row(
        measure=f"advantage, {name}", strength=gap(own), control=averaged(list(map(gap, placebo))), bound=bound
    )
    accuracy = row(
        measure=f"accuracy, {name}",
        strength=statistics.proportion(*own[:2]),
        control=averaged([statistics.proportion(*one[:2]) for one in strangers]),
        chance=common / members if members else 0.0,
    )
    return [advantage, accuracy], power


@register(
    "attribute",
    title="Attribute inference",
    question="Does a model tell one more thing of a training patient of whom all else is known?",
)
def attribute(run: AuditedRun, choice: Choice) -> Audit:
    """Return how much better each attribute is guessed of members than of others, by every model."""
    started, asked = time.perf_counter(), questions(run, choice)
    trained, found, powerless = references(run, choice), list[Row](), list[str]()
    guarantee = run.guarantee
    settings: dict[str, Any] = {"references": choice.references, "most patients": choice.patients, "seed": choice.seed}
    for name, each in asked.items():
        choice.notify(f"attribute: {name}")
        for model in MODELS:
            if name == SITE and model == "general":
                continue  # it is the same at all of them
            seen = {one.site: answer for one in each if (answer := answers(run, trained, one, model)) is not None}
            if not seen:
                continue
            whole, power = rows("all", model, name, list(seen.values()), guarantee)
            found += whole
            for site, one in seen.items():
                found += rows(site, model, name, [one], guarantee)[0]
            settings[f"advantage on a reference of known members, {name}, {model}"] = [
                power.value,
                power.low,
                power.high,
            ]
            powerless += [f"{name}, {model}"] if power.low is None or power.low <= 0 else []
    return Audit(
        name="attribute",
        rows=tuple(found),
        means=MEANS,
        control=CONTROL,
        limits=LIMITS,
        warnings=(NO_POWER.format(models="; ".join(powerless)),) if powerless else (),
        settings=settings,
        costs={"models trained": choice.references, "seconds": round(time.perf_counter() - started, 1)},
    )
