"""Shadow updates: local trainings on images of which the adversary knows how many have the property."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from confrere.audits.property import Floats
from confrere.audits.tapped import AuditedRun
from confrere.errors import ConfigError
from confrere.job import initial
from confrere.learner import Learner, TrainSettings
from confrere.prefix import join
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors
from confrere.tokenset import TokenSet

CONTRAST = 3.0
"""The upper level of shadows is so many times the share among all images, or all of them."""
LEAST_IMAGES = 8
"""Held-out images of either kind, over all sites."""


@dataclass(frozen=True, kw_only=True)
class Property:
    """A yes or no about every image, of which a site's share is asked.

    Args:
        name: in words, for reports. marks: site -> bool (N,), in the order of the site's images.
    """

    name: str
    marks: Mapping[str, NDArray[np.bool_]]

    def share(self, run: AuditedRun, site: str) -> float:
        """Return the true share among a site's training images."""
        return float(self.marks[site][run.data[site].rows("train")].mean())


@dataclass(frozen=True, kw_only=True)
class Shadows:
    """Images that the adversary holds, and which of them each shadow trains on.

    Args:
        data: validation and test images of the sites among others: of the kind they train on, and none of those.
        sets: rows of each shadow, the same in every round, some more than once.
        kinds: (S,) bool, whether it has the property.
        high: share of marked images in shadows with the property; the others have none.
        prior: expected tau of a site, in (0, 1).
    """

    data: TokenSet
    sets: tuple[NDArray[np.int64], ...]
    kinds: NDArray[np.bool_]
    high: float
    prior: float


def class_share(run: AuditedRun) -> Property:
    """Return the share of the class in which the training images of sites differ most, by the range of shares."""
    classes = run.federation.classes
    shares = np.array(
        [
            np.bincount(run.data[site].labels[run.data[site].rows("train")], minlength=len(classes))
            / len(run.data[site].rows("train"))
            for site in run.sites
        ]
    )
    which = int((shares.max(0) - shares.min(0)).argmax())
    marks = {site: run.data[site].labels == which for site in run.sites}
    return Property(name=f"images of class {classes[which]}", marks=marks)


def draw_shadows(run: AuditedRun, asked: Property, each: int, seed: int) -> Shadows:
    """Return ``each`` shadows with the property and as many without; drawn at ("shadows", i), with replacement.

    Each has the size of one site and, as far as there are any, held-out images of this site alone: sites differ in more
    than the property, and the classifier must see how much. The upper level is three times the share among all held-out
    images, at most 1; the lower is 0.

    Raises:
        ConfigError: these images are too few, or all or none have the property.
    """
    data = join([run.data[site] for site in run.sites])
    marks = np.concatenate([asked.marks[site] for site in run.sites])
    if len(marks) != len(data.labels):
        what = "a property must say yes or no of every image of every site"
        raise ConfigError(what, where=asked.name, fix="give one mark an image", code="audit")
    owner = np.repeat(np.arange(len(run.sites)), [len(run.data[site].labels) for site in run.sites])
    kinds_of = {mark: np.flatnonzero((data.split != 0) & (marks == mark)) for mark in (True, False)}
    yes, no = (len(kinds_of[mark]) for mark in (True, False))
    if min(yes, no) < LEAST_IMAGES:
        what = f"the held-out images are too few to make shadows: {yes} have the property, {no} have not"
        raise ConfigError(what, where=asked.name, fix="use more data, or a more common property", code="audit")
    share = yes / (yes + no)
    high, sets, kinds = min(1.0, CONTRAST * share), [], np.arange(2 * each) % 2 == 0
    for index, kind in enumerate(kinds):
        rng, site = numpy_generator(seed, "shadows", index), index // 2 % len(run.sites)
        size = len(run.data[run.sites[site]].rows("train"))
        marked = rng.binomial(size, high) if kind else 0
        parts = []
        for mark, count in ((True, marked), (False, size - marked)):
            own = kinds_of[mark][owner[kinds_of[mark]] == site]
            parts.append(rng.choice(own if len(own) else kinds_of[mark], count))
        sets.append(np.concatenate(parts))
    return Shadows(data=data, sets=tuple(sets), kinds=kinds, high=high, prior=min(0.9, share / high))


def shadow_updates(run: AuditedRun, shadows: Shadows, round_: int, server: State, seed: int) -> NDArray[np.float32]:
    """Return the flattened change (S, d) that a round's local training makes of what the server held before it.

    A shadow starts with what is private as a newcomer would: what sites keep between rounds is not known.
    """
    method, task = run.method, run.task
    received = method.broadcast(server, run.sites[0])
    settings = TrainSettings(**{**run.experiment.train.model_dump(), "views": 1})
    found = []
    for index, rows in enumerate(shadows.sets):
        own = replace(
            shadows.data,
            tokens=shadows.data.tokens[rows],
            labels=shadows.data.labels[rows],
            groups=shadows.data.groups[rows],
            split=np.zeros(len(rows), dtype=np.int8),
            views=(),
        )
        learner = Learner(
            backbone=task.backbone,
            data=own,
            settings=settings,
            seed=seed,
            site=f"shadow-{index}",
            round=round_,
            rounds=run.experiment.rounds,
        )
        payload, _ = method.update(learner, received, method.init_site(initial(task, run.sites[0])))
        found.append(flat(payload["shared"], received["shared"]).astype(np.float32))
    return np.stack(found)


def flat(after: Tensors, before: Tensors) -> Floats:
    """Return the change ``after - before`` as one vector (d,), names sorted."""
    parts = [(after[name].double() - before[name].double()).flatten() for name in sorted(after)]
    return torch.cat(parts).numpy()
