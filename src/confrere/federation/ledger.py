"""A site's own record of noisy steps: entered before they are made, kept at the site, never taken back.

A round that is trained again is entered again, with new noise. The same noise would be wrong: the server may ask anew
from another state, and two answers that differ in it but not in their noise tell what the noise hid. To leave an
attempt out because its answer was never sent would need proof that it was not; none survives a crash. So epsilon may
count too much, never too little. A request that comes twice gets the stored answer and costs nothing.

A run in one process has a file for each training of each site. A deployed site has one for all trainings of all jobs
in its state folder, so that what was ever spent on its data stays known when the folder of a job is deleted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from confrere.choices import PrivacyChoice
from confrere.errors import ConfigError, RunError, UpdateRefusedError
from confrere.learner import TrainSettings
from confrere.method import Method
from confrere.privacy import calibrate_sigma, check_delta, finite
from confrere.privacy.mechanism import Mechanism
from confrere.privacy.noise import Source
from confrere.privacy.spending import spent, within
from confrere.record import journal
from confrere.record.files import append_bytes
from confrere.record.store import rounds_in
from confrere.tensors import State
from confrere.tokenset import TokenSet

FILE = "privacy.jsonl"
TOLERANCE = 2e-3
"""Of the noise that a budget asks for, in units of the clip; on the side of more noise."""
RESTORE = "restore it from a copy; without it nobody knows epsilon"
ALL_ROUNDS = 0
"""In place of a round, where one debit stands for a whole training."""


class Record(NamedTuple):
    """What a file holds: the debits of all trainings, the hash that the next one follows, the bytes of whole lines."""

    debits: list[dict[str, Any]]
    head: str
    whole: bytes


NOTHING = Record([], journal.START, b"")


@dataclass(kw_only=True)
class Ledger:
    """The privacy of one site in one training.

    Args:
        mechanism: of every noisy step.
        delta: of the guarantee.
        limit: largest epsilon; 0 for none.
        file: where debits are kept, in the folder of the site's states; None for memory, in throw-away simulations.
        training: which one this is in a file of many, as the path of its folder below that of the file.
    """

    mechanism: Mechanism
    delta: float
    limit: float
    file: Path | None = None
    training: str = ""
    _record: Record = field(default=NOTHING, init=False, repr=False)

    def debits(self) -> list[dict[str, Any]]:
        """Return every debit of this training so far; RunError as :func:`entered`."""
        if self.file is not None:
            self._record = entered(self.file, self._record)
        return [debit for debit in self._record.debits if debit.get("training", "") == self.training]

    def debit(self, round_: int, steps: int) -> None:
        """Enter a round's noisy steps, on disk, before any of them is made.

        Raises:
            UpdateRefusedError: they would exceed the budget; nothing is entered.
            RunError: as :meth:`debits`, or the file cannot be written.
        """
        known, new = self.debits(), self._entry(round_, steps)
        if steps and self.limit and not within([*known, new], self.delta, self.limit):
            what = f"the budget of epsilon {self.limit:g} does not cover this round"
            raise UpdateRefusedError(what, fix="nothing: what was released stands", code="privacy-spent")
        if self.file is None:
            self._record = self._record._replace(debits=[*self._record.debits, new])
        else:
            _append(self.file, self._record, new)

    def exhausted(self, round_: int, steps: int) -> bool:
        """Return whether the budget does not cover so many more steps."""
        more = [*self.debits(), self._entry(round_, steps)]
        return bool(self.limit and steps) and not within(more, self.delta, self.limit)

    def said(self) -> dict[str, Any]:
        """Return what results say of this site; an epsilon of None means no privacy."""
        debits, own = self.debits(), self.mechanism
        return {
            "unit": own.unit,
            "epsilon": finite(spent(debits, self.delta)),
            "delta": self.delta,
            "sigma": own.sigma,
            "clip": own.clip,
            "rate": own.rate,
            "images": own.images,
            "steps": sum(debit["steps"] for debit in debits),
            "debits": len(debits),
            "seeded": any(debit["seeded"] for debit in debits),
        }

    def _entry(self, round_: int, steps: int) -> dict[str, Any]:
        own = self.mechanism
        what: dict[str, Any] = {"sigma": own.sigma, "rate": own.rate, "clip": own.clip, "unit": own.unit}
        what |= {"training": self.training, "delta": self.delta} if self.training else {}
        return {"event": "debit", "round": round_, "steps": steps, **what, "seeded": bool(own.noise_seed)}


def entered(file: Path, known: Record = NOTHING) -> Record:
    """Return what a file holds; nothing where there is neither a file nor a trained round.

    Args:
        file: of debits, beside the states of their trainings.
        known: what this process found before. As long as the file begins with that, only its new lines are parsed, and
            states are not looked at again: their debits were there, and this process enters what it trains.

    Raises:
        RunError: the file is damaged, or lacks a round whose answer is there: epsilon would be too small.
    """
    folders = {} if known.whole else _folders(file.parent)
    trained = {training: rounds_in(folder) for training, folder in folders.items()}  # before the file
    found, rounds = _read(file, known), defaultdict[str, set[int]](set)
    if not found.whole.startswith(known.whole):  # lost, or put back from a copy
        return entered(file)
    for event in found.debits:
        rounds[event.get("training", "")].add(event["round"])
    for training, there in trained.items():
        missing = set(there) - rounds[training]
        if missing and ALL_ROUNDS not in rounds[training]:
            what = f"the record of what was spent lacks round {min(missing)}, which was trained"
            what += f", of {training}" if training else ""
            raise RunError(what, where=str(file), fix=RESTORE, code="privacy-ledger")
    return found


def salted(state: State, noise_seed: int, site: str, round_: int) -> State:
    """Return a site's state with random bytes beside it: its digest travels, and would confirm a guess of it."""
    return {**state, "salt": {"salt": torch.from_numpy(Source(noise_seed, "salt", site, round_).uniform(8))}}


def enter_unhidden(file: Path, training: str, *, sends: bool) -> None:
    """Enter a training without noise, once, in the file of many: no epsilon is left if anything of it is sent."""
    record = _read(file)
    if any(debit.get("training") == training for debit in record.debits):
        return
    what = {"sigma": 0.0, "rate": 1.0, "unit": "", "delta": 0.0, "seeded": False}
    _append(file, record, {"event": "debit", "round": ALL_ROUNDS, "steps": int(sends), "training": training, **what})


def _append(file: Path, record: Record, debit: dict[str, Any]) -> None:
    """Enter a debit, on disk, behind what the file holds, in place of one that was torn."""
    append_bytes(file, len(record.whole), journal.seal([debit], len(record.debits) + 1, record.head)[0])


def _read(file: Path, known: Record = NOTHING) -> Record:
    """Return what a file holds; only what follows ``known`` is parsed where it begins with that."""
    try:
        whole = journal.content(file)
        known = known if whole.startswith(known.whole) else NOTHING
        new = whole[len(known.whole) :]
        events, head = journal.parse(new, str(file), after=len(known.debits), head=known.head)
    except RunError as error:  # of other journals a part may be deleted
        raise RunError(error.what, where=error.where, fix=RESTORE, code=error.code) from error
    return Record([*known.debits, *map(dict, events)], head, whole)


def _folders(root: Path) -> dict[str, Path]:
    """Return the folders of a site's states whose debits are in a file in ``root``, by training."""
    below = (folder for pattern in ("*/sites/*", "*/controls/*/sites/*") for folder in root.glob(pattern))
    return {"": root, **{folder.parents[1].relative_to(root).as_posix(): folder for folder in below}}


def ledger_of(
    method: Method, privacy: PrivacyChoice, settings: TrainSettings, data: TokenSet, rounds: int, folder: Path | None
) -> Ledger | None:
    """Return the ledger of a site that hides its images or patients, None where it does not, or sends nothing.

    Args:
        method: that is trained.
        privacy: of the experiment.
        settings: of local training: batch size and steps.
        data: of the site.
        rounds: of the run, for all of which the noise is made where the budget sets it.
        folder: of the site's states; None for memory.

    Raises:
        ConfigError: delta is too large for so many, nobody knows whose an image is, or no noise meets the budget.
        MissingExtraError: dp-accounting is not installed.
    """
    rows = data.rows("train")
    if not privacy.at_sites or not method.sends or method.pools or not len(rows):
        return None
    units = len(rows) if privacy.unit == "record" else len(np.unique(data.groups[rows]))
    check_named(privacy.unit, data.groups[rows], data.named)
    check_delta(privacy.delta, units, "patients" if privacy.unit == "patient" else "images")
    rate = min(1.0, settings.batch_size / units)
    steps = sum(method.noised(settings.steps, r, rounds) or 0 for r in range(1, rounds + 1))
    options = {"rounds": max(1, steps), "delta": privacy.delta, "rate": rate}
    sigma = privacy.sigma or calibrate_sigma(privacy.epsilon, tolerance=TOLERANCE, **options)
    mechanism = Mechanism(
        unit="record" if privacy.unit == "record" else "patient",
        units=units,
        rate=rate,
        sigma=sigma,
        clip=privacy.clip,
        images=privacy.images if privacy.unit == "patient" else 1,
        noise_seed=privacy.noise_seed,
        centred=privacy.centred,
    )
    file = folder / FILE if folder else None
    return Ledger(mechanism=mechanism, delta=privacy.delta, limit=privacy.epsilon, file=file)


def check_named(unit: str, groups: np.ndarray, named: frozenset[int]) -> None:
    """Raise ConfigError where patients shall be hidden and it is not known whose some training images are.

    Args:
        unit: that is hidden.
        groups: patient numbers of the training images, (N,).
        named: the numbers that are one patient, named.
    """
    unknown = int(np.isin(groups, list(named), invert=True).sum())
    if unit == "patient" and unknown:
        what = (
            f"it is not known whose {unknown} of {len(groups)} training images are: nobody is named, or one file lies "
        )
        what += "there under several patients"
        fix = "name the one patient of each, or leave them out; or use privacy.unit=record, which hides single images"
        raise ConfigError(what, where="privacy.unit", fix=fix, code="privacy")


def all_spent(journal: Iterable[Mapping[str, Any]], sites: Iterable[str]) -> str:
    """Return why no further round can follow these events: every one of ``sites`` has said that its budget is spent."""
    spent, all_ = {site for event in journal for site in event.get("spent", ())}, set(sites)
    return "every site has spent its privacy budget" if all_ and all_ <= spent else ""
