"""What hiding images or patients would cost each site: whether its noise leaves anything to learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from confrere.backbones import Backbone
from confrere.config import Experiment
from confrere.data.federation import Federation, SiteImages
from confrere.doctor.finding import Finding, attempt
from confrere.federation.ledger import check_named
from confrere.job import Prepared, initial
from confrere.privacy.planning import FINE, plan_units


def noise_findings(experiment: Experiment, federation: Federation, backbone: Backbone) -> Iterator[Finding]:
    """Yield one finding: the site at which noise weighs most, or what a run would refuse."""
    privacy, method, train = experiment.privacy, experiment.build_method(), experiment.train
    if not privacy.at_sites or not method.sends or method.pools:
        return
    task = Prepared(experiment=experiment, method=method, federation=federation, backbones={"": backbone}, data={})
    sent = sum(value.numel() for name, value in initial(task, "").items() if method.shared(name))
    steps = sum(method.noised(train.steps, r, experiment.rounds) or 0 for r in range(1, experiment.rounds + 1))

    def plan(site: SiteImages) -> dict[str, Any]:
        rows = site.indices("train")
        check_named(privacy.unit, site.groups[rows], site.named)
        return plan_units(
            unit=privacy.unit,
            sigma=privacy.sigma,
            target=0.0 if privacy.sigma else privacy.epsilon,
            records=len(rows) if privacy.unit == "record" else len(np.unique(site.groups[rows])),
            batch=train.batch_size,
            steps=max(1, steps),
            delta=privacy.delta,
            parameters=sent,
        )

    found: list[Finding] = []
    trained = [s for s in federation.sites if s.name != experiment.hold_out and len(s.indices("train"))]
    plans = attempt("noise", lambda: {site.name: plan(site) for site in trained}, found)
    yield from found
    if plans:
        name, worst = max(plans.items(), key=lambda item: item[1]["noise_to_signal"])
        ratio = worst["noise_to_signal"]
        what = f"sigma {worst['sigma']:.3g}; noise of all steps is {ratio:.2g} times as long as gradients could go"
        fine = ratio <= FINE
        fix = "" if fine else "a smaller rank, fewer blocks, A frozen, a larger epsilon; more steps do not help"
        yield Finding("ok" if fine else "warning", "noise", what, f"site {name}", fix)
