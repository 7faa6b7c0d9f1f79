"""The data of a run with and without whom it shall forget, read so that nothing else changes.

What is left is what a run on the remaining files alone would read, with the split the run had: the same patients are
trained, judged and tested on, so that "never had" and "forgot" can be compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from confrere.backbones import default_size
from confrere.config import Experiment
from confrere.data.federation import Federation, SiteImages, build, examine
from confrere.data.register import Registration, SiteFiles, only
from confrere.data.sources import Listing
from confrere.data.splits import NAMES, write_splits
from confrere.data.table import read_rows
from confrere.data.view import View
from confrere.errors import ConfigError, DataError, RunError, nearest
from confrere.fingerprint import stored_experiment
from confrere.forgetting.learnt import changed_sites
from confrere.forgetting.who import Whom
from confrere.job import threads
from confrere.opening import check_sites
from confrere.prefix import cache_dir
from confrere.record.files import read_json


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run's data, before and after.

    Attributes:
        experiment: of what is left: without controls, and without what named the site.
        old: the experiment of the run.
        before: all data; None when those of the site are gone already.
        after: what is left.
        gone: site -> its forgotten images, in all three splits.
        affected: sites that trained, or judged rounds, with something that is forgotten, or that changes without it.
        notes: what was fixed so that models stay comparable, in words.
    """

    experiment: Experiment
    old: Experiment
    before: Federation | None
    after: Federation
    gone: Mapping[str, SiteImages]
    affected: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def noisy(self) -> bool:
        """Return whether training adds noise, to hide sites or within a site: then no two runs are alike."""
        return bool(self.old.build_method().release()) or self.old.privacy.at_sites

    @property
    def after_names(self) -> frozenset[str]:
        """Return the sites that are left."""
        return frozenset(site.name for site in self.after.sites)

    @property
    def pictures(self) -> int:
        """Return how many images are forgotten."""
        return sum(len(site.labels) for site in self.gone.values())


def open_both(run: Path, who: Whom, out: Path) -> Opened:
    """Read the data of ``run`` and take out whom it shall forget; write the split of what is left to ``out``.

    Raises:
        RunError, ConfigError, DataError: no finished run, nobody of this name, data that are not the run's, or nothing
            left to train on.
    """
    experiment = finished(run, who)
    listing, found = examine(
        Path(experiment.path),
        experiment.data,
        experiment.data.image_size or default_size(experiment.backbone.name, experiment.backbone.image_size),
        experiment.split_seed,
        cache_dir(),
    )
    info = read_json(run / "federation.json")
    groups, left = _without(listing, found, who)
    before = None
    if not who.site or any(site.name == who.site for site in found.sites):
        before = build(listing, found, experiment.data, experiment.split_seed, run / "splits.csv")
        if before.digest != info["digest"]:
            fix = "give the run the data it began with, then forget"
            raise RunError("the data changed since this run began", where=str(run), fix=fix, code="data-changed")
    changed, notes = _experiment(experiment, who, left, info)
    _keep_split(run / "splits.csv", out / "splits.csv", left, before, who)
    after = build(listing, left, changed.data, changed.split_seed, out / "splits.csv")
    count = threads(experiment, before) if before else experiment.threads or threads(experiment, _counted(after))
    if threads(changed, after) != count:  # the number of threads can change the last bit
        changed = changed.model_copy(update={"threads": count})
        notes = (*notes, f"threads={count}, as the run had")
    check_sites(changed, after)
    gone = {site.name: _rows(site, groups, who) for site in before.sites} if before else {}
    gone = {name: site for name, site in gone.items() if len(site.labels)}
    affected = changed_sites(before, after) | ({who.site} if who.site else set())
    return Opened(
        experiment=changed,
        old=experiment,
        before=before,
        after=after,
        gone=gone,
        affected=frozenset(affected),
        notes=notes,
    )


def _counted(after: Federation) -> Federation:
    """Return the federation with one site more, whose data are gone: only their number counts."""
    return replace(after, sites=(*after.sites, after.sites[0]))


def finished(run: Path, who: Whom) -> Experiment:
    """Return the experiment of a run that can forget ``who``; nothing is written.

    Raises:
        RunError, ConfigError: no finished run in one process, no such site, or one that was held out.
    """
    if (run / "job.json").exists():
        fix = "begin a new job without the site, or without the patients at the site: confrere coordinator"
        what = "this run is across hospitals: their data are not here"
        raise RunError(what, where=str(run), fix=fix, code="across-hospitals")
    experiment = stored_experiment(run)
    if not (run / "results.json").exists():
        raise RunError("the run is not finished", where=str(run), fix=f"confrere resume {run}", code="no-run")
    names = sorted(read_json(run / "results.json")["sites"])
    if who.site and who.site not in names:
        fix = nearest(who.site, names)
        raise ConfigError(f"the run has no site {who.site!r}", where="--site", fix=fix, code="unknown-site")
    if who.site and who.site == experiment.hold_out:
        fix = "delete what its examination left: its test predictions and its part of the results"
        what = "this site was held out: nothing was trained on it"
        raise ConfigError(what, where="--site", fix=fix, code="forgetting")
    return experiment


def _without(listing: Listing, found: Registration, who: Whom) -> tuple[frozenset[int], Registration]:
    """Return the numbers of the patients to forget, and the registration of what is left.

    Raises:
        DataError: a patient is unknown, or a site would be left without an image.
    """
    rows = [(files, i, row) for files in found.sites for i, row in enumerate(files.rows)]
    if who.site:
        groups = frozenset[int]()
        sites = tuple(files for files in found.sites if files.name != who.site)
        if not sites:
            fix = "delete the run: nothing of it is left"
            raise ConfigError("the only site cannot be forgotten", where="--site", fix=fix, code="forgetting")
    else:
        known = {row.patient for _, _, row in rows}
        unknown = len(who.patients - known)
        if unknown:
            fix = "write them as the table's column patient (or lesion) has them; before __ in the names of files"
            what = f"{unknown} of {len(who.patients)} patients are not in the data"
            raise DataError(what, where="--patients", fix=fix, code="unknown-patient")
        # Whoever shares a picture with one of them counts as the same person.
        groups = frozenset(
            found.groups[files.entry.facts[i].digest] for files, i, row in rows if row.patient in who.patients
        )
        sites = tuple(
            _kept(files, [found.groups[f.digest] not in groups for f in files.entry.facts]) for files in found.sites
        )
    shared = [[f.digest for f in files.entry.facts] for files in sites]
    people = [[row.patient for row in files.rows if row.patient] for files in sites]
    return groups, replace(
        found,
        sites=sites,
        problems=tuple(p for p in found.problems if not _of(listing, p.site, p.name, who)),
        groups=_renumbered(found.groups, _hashes_left(found, sites, groups)),
        shared_pictures=_twice(shared) if found.shared_pictures else 0,
        shared_patients=_twice(people),
    )


def _hashes_left(found: Registration, sites: Sequence[SiteFiles], groups: frozenset[int]) -> set[str]:
    """Return the hashes of all listed files, also of those that are not used, but for the forgotten ones."""

    def of(files: Iterable[SiteFiles]) -> set[str]:
        return {d for each in files for d in (*(fact.digest for fact in each.entry.facts), *each.entry.bad)}

    gone = of(found.sites) - of(sites)
    return {digest for digest, group in found.groups.items() if digest not in gone and group not in groups}


def _of(listing: Listing, site: str, name: str, who: Whom) -> bool:
    """Return whether an unusable file is of whom to forget."""
    if who.site:
        return site == who.site
    return any((r.site or site, r.name) == (site, name) and r.patient in who.patients for r in listing.rows)


def _twice(by_site: Sequence[Sequence[str]]) -> int:
    seen = [item for items in by_site for item in set(items)]
    return sum(seen.count(item) > 1 for item in set(seen)) if len(seen) != len(set(seen)) else 0


def _kept(files: SiteFiles, keep: Sequence[bool]) -> SiteFiles:
    """Return a site's files without some."""
    if all(keep):
        return files
    chosen = np.flatnonzero(np.array(keep))
    if not len(chosen):
        what, fix = "no image of the site would be left", f"forget the whole site: --site {files.name}"
        raise ConfigError(what, where=f"site {files.name}", fix=fix, code="forgetting")
    targets: Any = files.targets
    if targets is not None:
        targets = targets[chosen] if isinstance(targets, np.ndarray) else View(targets, chosen)
    digests = tuple(files.target_digests[i] for i in chosen) if files.target_digests else ()
    return replace(only(files, chosen), targets=targets, target_digests=digests)


def _renumbered(groups: Mapping[str, int], left: set[str]) -> dict[str, int]:
    """Return the patients' numbers counted anew by their smallest hash: a gap would tell that someone is missing."""
    first: dict[int, str] = {}
    for digest in sorted(left):
        first.setdefault(groups[digest], digest)
    numbers = {old: new for new, old in enumerate(sorted(first, key=lambda group: first[group]))}
    return {digest: numbers[groups[digest]] for digest in left}


def _experiment(
    experiment: Experiment, who: Whom, left: Registration, info: Mapping[str, Any]
) -> tuple[Experiment, tuple[str, ...]]:
    """Return the experiment of what is left: what named the site is gone, the classes stay."""
    notes: tuple[str, ...] = ()
    adapter, backbone, attack = experiment.adapter, experiment.backbone, experiment.attack
    changes: dict[str, Any] = {
        "controls": (),
        "adapter": adapter.model_copy(update={"ranks": {s: r for s, r in adapter.ranks.items() if s != who.site}}),
        "backbone": backbone.model_copy(update={"depths": {s: d for s, d in backbone.depths.items() if s != who.site}}),
        "attack": attack.model_copy(update={"sites": tuple(s for s in attack.sites if s != who.site)}),
    }
    labels = {row.label for files in left.sites for row in files.rows}
    if experiment.data.target == "label" and not experiment.data.classes and labels != set(info["classes"]):
        changes["data"] = experiment.data.model_copy(update={"classes": tuple(info["classes"])})
        notes = ("the list of classes stays as it was, although nobody left has images of all of them",)
    return experiment.model_copy(update=changes), notes


def _keep_split(old: Path, new: Path, left: Registration, before: Federation | None, who: Whom) -> None:
    """Write the split of what is left, as the run had it.

    Raises:
        DataError: without the forgotten, the data are not those of the run.
    """
    keys = {(files.name, fact.digest) for files in left.sites for fact in files.entry.facts}
    stored = {(c["site"], c["sha256"]): NAMES.index(c["split"]) for _, c in read_rows(old, ["site", "sha256", "split"])}
    other = {key for key in stored.keys() ^ keys if before is None and key[0] != who.site}
    if other:
        what, fix = f"{len(other)} images are new or gone since the run", "give the run the data it began with"
        raise DataError(what, where=old.name, fix=fix, code="data-changed")
    write_splits(new, [(*key, split) for key, split in stored.items() if key in keys])


def _rows(site: SiteImages, groups: frozenset[int], who: Whom) -> SiteImages:
    """Return the forgotten images of a site."""
    whole = np.full(len(site.labels), site.name == who.site)
    chosen = np.flatnonzero(whole if who.site else np.isin(site.groups, list(groups)))
    images, targets = site.images, site.targets
    return replace(
        site,
        images=images[chosen] if isinstance(images, np.ndarray) else View(images, chosen),
        labels=site.labels[chosen],
        groups=site.groups[chosen],
        digests=tuple(site.digests[i] for i in chosen),
        split=site.split[chosen],
        targets=None if targets is None else targets[chosen],
        target_digests=tuple(site.target_digests[i] for i in chosen) if site.target_digests else (),
    )
