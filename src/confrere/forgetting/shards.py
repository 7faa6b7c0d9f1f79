"""Adapter shards: what was trained without the forgotten is taken over model by model, the others are trained again.

What a site makes of a shard in a round depends on the shard's training images there and on the shard's model before, on
nothing else. Where both are what they were, so is the answer: the rebuilt run holds the bytes that training everything
again would give, for a part of its steps.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from confrere.adapters.vectors import split_models
from confrere.data.images import SiteImages
from confrere.data.splits import TRAIN
from confrere.errors import RunError
from confrere.forgetting.data import Opened
from confrere.forgetting.learnt import learnt
from confrere.learner import Learner
from confrere.method import Method
from confrere.methods.shards import Part, Shards, steps_of
from confrere.record.run import Run
from confrere.tensors import Tensors, digest
from confrere.tokenset import keys_of, shard_of


def of_round(old: Path, round_: int) -> tuple[Tensors, dict[str, Any]]:
    """Return what the server had before a round, and each site's answer that is there and what the journal says."""
    run, answers = Run(old), dict[str, Any]()
    told = [event["sites"] for event in run.events() if event["event"] == "round" and event["round"] == round_]
    for site, record in told[-1].items() if told else ():
        try:
            _, reply = run.store(site).read(round_)
        except (RunError, OSError):
            continue
        if digest(reply.state) == record["stored"]:
            answers[site] = reply.state
    there = run.server_file(round_ - 1).exists()
    return (run.server(round_ - 1)["shared"] if there else {}), answers


def _trained(site: SiteImages, shard: int, shards: int) -> Any:
    """Return all that training reads of a shard at a site."""
    chosen = np.flatnonzero(site.split == TRAIN)
    return learnt(site, chosen[shard_of(keys_of(site.groups, site.digests)[chosen], shards) == shard])


def retrained(method: Shards, old: Path, opened: Opened, steps: list[tuple[int, int]]) -> Method:
    """Return :class:`Shards` that take over from the run ``old`` what did not depend on the forgotten.

    Args:
        method: of the run.
        old: the run; states of it that are gone or damaged are trained again.
        opened: its data with and without the forgotten.
        steps: receives round and number of those that are taken, for each training of a shard.
    """
    count = method.shards
    before = {site.name: site for site in opened.before.sites} if opened.before else {}
    again = {
        (site.name, shard)
        for site in opened.after.sites
        for shard in range(count)
        if site.name not in before or _trained(site, shard, count) != _trained(before[site.name], shard, count)
    }
    stored = lru_cache(maxsize=2)(of_round)

    class Retrained(Shards):
        def part(self, learner: Learner, model: Tensors, shard: int) -> Part:
            if (learner.site, shard) not in again:
                begun, answers = stored(old, learner.round)
                answer = answers.get(learner.site)
                if answer and begun and digest({"": model}) == digest({"": split_models(begun, self.shards)[shard]}):
                    images, losses = (float(answer["parts"][key][shard]) for key in ("images", "losses"))
                    return split_models(answer["shared"], self.shards)[shard], images, losses
            steps.append((learner.round, steps_of(learner.settings.steps, self.shards, shard)))
            return super().part(learner, model, shard)

    return Retrained(shards=count)
