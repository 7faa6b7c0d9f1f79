"""Reference models, trained like the run on random halves of its patients, and what all models say of each image.

Every pair of references splits the run's training and test patients in two, so that each patient is outside of half
of the references, whether it trained the run or not: for a run that remembers nothing, members and others are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confrere.audits.audit import Choice
from confrere.audits.tapped import MODELS, AuditedRun
from confrere.data.splits import TEST, TRAIN, VAL
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an attacker knows of one model at one site.

    Shapes: N audited images, Z images of other patients (the run's validation images), R references.

    Args:
        patients: int (N,). labels: int (N,), classes. inside: bool (N,), whether the run trained on it.
        most: images of the patient who has most of them.
        right: (N,) log-probability of the right class, by the run's model; ``rights`` (R, N) by each reference.
        other: (N,) log-probability of all other classes together; ``others`` (R, N).
        trained: bool (R, N), whether a reference trained on it.
        right_beside: (Z,), ``rights_beside`` (R, Z): the same of other patients, whom no model trained on.
    """

    model: str
    site: str
    patients: NDArray[np.int64]
    labels: NDArray[np.int64]
    inside: NDArray[np.bool_]
    most: int
    right: Floats
    other: Floats
    rights: Floats
    others: Floats
    trained: NDArray[np.bool_]
    right_beside: Floats
    rights_beside: Floats

    def against(self, reference: int) -> Evidence:
        """Return the attack on a reference instead of the run, by the other references but the one of its pair.

        Then ``trained`` of that reference says who is inside; ``inside`` still says who trained the run.
        """
        own = {"right": self.rights[reference], "other": self.others[reference]}
        return replace(self.without(reference // 2), **own, right_beside=self.rights_beside[reference])

    def without(self, pair: int) -> Evidence:
        """Return the attack by the other references than those of a pair."""
        rest = [r for r in range(len(self.trained)) if r // 2 != pair]
        return replace(
            self,
            rights=self.rights[rest],
            others=self.others[rest],
            trained=self.trained[rest],
            rights_beside=self.rights_beside[rest],
        )

    def of_class(self, label: int) -> Evidence:
        """Return the attack on the images of one class alone; their patients may have images of others."""
        own = self.labels == label
        flat = {key: getattr(self, key)[own] for key in ("patients", "labels", "inside", "right", "other")}
        return replace(self, **flat, **{key: getattr(self, key)[:, own] for key in ("rights", "others", "trained")})

    def mean_outside(self, values: Floats) -> Floats:
        """Return the mean (N,) over the references that were not trained on an image."""
        out = ~self.trained
        return np.asarray((values * out).sum(0) / out.sum(0), dtype=np.float64)


def halves(run: AuditedRun, choice: Choice) -> list[dict[str, NDArray[np.int8]]]:
    """Return the split of each reference: site -> 0 for the half that trains it, 2 for the other, 1 validation.

    Halves are by patient, drawn anew for each pair, and even within (site, class, split of the run).

    Raises:
        ConfigError: a site has fewer than two patients to train on.
    """
    made: list[dict[str, NDArray[np.int8]]] = []
    for pair in range(choice.references // 2):
        side: dict[int, int] = {}
        for site in run.sites:
            rows, strata = run.data[site], dict[tuple[int, int], list[int]]()
            for group, label, part in zip(rows.groups.tolist(), rows.labels.tolist(), rows.split.tolist(), strict=True):
                if part != VAL and group not in side:
                    side[group] = -1  # seen, not placed yet
                    strata.setdefault((label, part), []).append(group)
            rng = numpy_generator(choice.seed, "audit", "halves", pair, site)
            for _, groups in sorted(strata.items()):
                first = int(rng.integers(2))
                for place, at in enumerate(rng.permutation(len(groups))):
                    side[groups[at]] = (place + first) % 2
        for half in (0, 1):
            made.append({site: _split(run, site, side, half) for site in run.sites})
    return made


def _split(run: AuditedRun, site: str, side: Mapping[int, int], half: int) -> NDArray[np.int8]:
    rows = run.data[site]
    chosen = np.array([side.get(group, -1) for group in rows.groups.tolist()])
    split = np.where(rows.split == VAL, VAL, np.where(chosen == half, TRAIN, TEST)).astype(np.int8)
    if not (split == TRAIN).any():
        what, fix = "too few patients to train reference models on half of them", "audit a run with larger sites"
        raise ConfigError(what, where=f"site {site}", fix=fix, code="audit")
    return split


def references(run: AuditedRun, choice: Choice) -> list[AuditedRun]:
    """Return the reference models, trained now or found from an earlier audit."""
    trained = []
    for number, splits in enumerate(halves(run, choice)):
        choice.notify(f"reference model {number + 1} of {choice.references}")
        trained.append(run.train_again(f"{number:02d}", splits))
    return trained


def evidence(run: AuditedRun, choice: Choice) -> list[Evidence]:
    """Return what an attacker knows, for every model and site, where the method and the server have such a model."""
    key = "evidence", choice.seed, choice.references, choice.patients
    if key not in run.memo:
        run.memo[key] = _gather(run, choice)
    found: list[Evidence] = run.memo[key]
    return found


def _gather(run: AuditedRun, choice: Choice) -> list[Evidence]:
    trained, found = references(run, choice), []
    for model in MODELS:
        choice.notify(f"what every model says of the images: {model}")
        for site in run.sites:
            one = _evidence(run, trained, model, site, choice)
            found += [one] if one is not None else []
    return found


def _evidence(run: AuditedRun, trained: Sequence[AuditedRun], model: str, site: str, choice: Choice) -> Evidence | None:
    data = run.data[site]
    audited, rest = audited_rows(run, site, choice), rows_of(run, site, VAL, choice)
    if run.logits(site, model, audited) is None:
        return None

    def says(one: AuditedRun, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        logits = one.logits(site, model, rows)
        if logits is None:
            what, fix = "a reference has no such model", "audit another run"
            raise ConfigError(what, where=f"site {site}, {model}", fix=fix, code="audit")
        return confidence(logits, data.labels[rows])

    right, other = says(run, audited)
    each = [says(one, audited) for one in trained]
    return Evidence(
        model=model,
        site=site,
        patients=data.groups[audited],
        labels=data.labels[audited],
        inside=data.split[audited] == TRAIN,
        most=int(np.unique(data.groups[audited], return_counts=True)[1].max()),
        right=right,
        other=other,
        rights=np.stack([one[0] for one in each]),
        others=np.stack([one[1] for one in each]),
        trained=np.stack([one.data[site].split[audited] == TRAIN for one in trained]),
        right_beside=says(run, rest)[0],
        rights_beside=np.stack([says(one, rest)[0] for one in trained]),
    )


def audited_rows(run: AuditedRun, site: str, choice: Choice) -> NDArray[np.int64]:
    """Return the images of the audited members (training) and others (test) of a site, ascending."""
    return np.sort(np.concatenate([rows_of(run, site, split, choice) for split in (TRAIN, TEST)]))


def rows_of(run: AuditedRun, site: str, split: int, choice: Choice) -> NDArray[np.int64]:
    """Return the rows of at most ``choice.patients`` patients of a split, drawn at an address.

    Members and others are thinned alike: where one site had more members to an other than the next, a score that knows
    nothing but the site would tell them apart once sites are put together.
    """
    data = run.data[site]
    compared = (VAL,) if split == VAL else (TRAIN, TEST)
    most = max(len(np.unique(data.groups[data.split == part])) for part in compared)
    rows = np.flatnonzero(data.split == split)
    if most > choice.patients:
        own = np.unique(data.groups[rows])
        rng = numpy_generator(choice.seed, "audit", "patients", site, split)
        count = math.ceil(len(own) * choice.patients / most)
        rows = rows[np.isin(data.groups[rows], rng.permutation(own)[:count])]
    return rows


def confidence(logits: Tensor, labels: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return log-probabilities (N,) of the right class, and of all others together, without cancellation."""
    chances = logits.double().log_softmax(1)
    at = torch.from_numpy(labels)[:, None]
    right = chances.gather(1, at)[:, 0]
    return right.numpy(), chances.scatter(1, at, -torch.inf).logsumexp(1).numpy()


def by_patient(scores: Floats, patients: NDArray[np.int64], inside: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the mean score of every member and of every other: one a patient, as a patient's images are alike.

    Raises:
        ConfigError: a patient is on both sides.
    """
    known, at = np.unique(patients, return_inverse=True)
    count = np.bincount(at, minlength=len(known))
    share = np.bincount(at, weights=inside, minlength=len(known)) / count
    if not np.isin(share, (0.0, 1.0)).all():
        what, fix = "patients are among members and among others", "split the images by patient"
        raise ConfigError(what, where="audit", fix=fix, code="audit")
    mean = np.bincount(at, weights=scores, minlength=len(known)) / count
    return mean[share == 1], mean[share == 0]
