"""Before round 1: every site says what it is, and the coordinator sees whether they fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from packaging.version import Version

from confrere.config import Experiment
from confrere.consortium.frame import Arrays
from confrere.consortium.status import Status
from confrere.data.federation import Federation, SiteImages
from confrere.errors import PolicyError, RunError
from confrere.federation.transport import Failure
from confrere.record.machine import machine

Header = dict[str, Any]
Answers = dict[str, tuple[Header, Arrays] | Failure]


class Sites(Protocol):
    """What carries requests to sites."""

    def online(self) -> tuple[str, ...]:
        """Return the names of the sites that can be asked at this moment, sorted."""

    def ask(self, kind: str, frames: Mapping[str, tuple[Header, Arrays]]) -> Answers:
        """Send each site its frame; return what came back before the deadline, a Failure where that is no answer."""

    def wait(self, names: Collection[str]) -> list[str]:
        """Wait until all of ``names`` are online, for a bounded time; return those that are not."""


def simulated(experiment: Experiment) -> list[str]:
    """Return the keys by which an experiment simulates something; between hospitals nobody does."""
    asked = {
        "attack.sites": experiment.attack.sites,
        "data.shift": experiment.data.shift,
        "data.partition": experiment.data.partition,
        "privacy.noise_seed": experiment.privacy.noise_seed,
    }
    return [key for key, value in asked.items() if value]


def describe(sites: Sites, names: Collection[str], job: Header, status: Status) -> dict[str, Header]:
    """Return what every site says of itself; nothing is trained before all have answered.

    Raises:
        RunError: a site is not online in time, gives no answer, or has another version.
        PolicyError: a site's policy forbids the experiment.
    """
    missing = sites.wait(names)
    if missing:
        raise RunError(
            f"{', '.join(missing)} did not come online in time",
            fix="start them with `confrere site KIT --data PATH`; see what `confrere doctor --site KIT` says there",
            code="sites-missing",
        )
    status.phase("describe")
    answers = sites.ask("describe", {name: ({**job, "kind": "describe"}, {}) for name in names})
    found: dict[str, Header] = {}
    refused: list[Failure] = []
    for name, answer in sorted(answers.items()):
        if isinstance(answer, Failure):
            refused.append(answer)
        else:
            found[name] = answer[0]
    for failed in refused:
        status.refused(failed.site, failed.code)
    if refused:
        first = refused[0]
        kind = PolicyError if any(failed.code.startswith("policy") for failed in refused) else RunError
        what = "; ".join(f"{failed.site}: {failed.reason}" for failed in refused)
        raise kind(what, where="before round 1", fix=first.fix, code=first.code or "no-replies")
    return found


def gathered(experiment: Experiment, described: Mapping[str, Header], consortium: str) -> Federation:
    """Return the federation, named as its roster, as the coordinator sees it: names, numbers, digests, no image.

    Raises:
        RunError: a site has another version, classes, image size or kind of data than the coordinator expects.
    """
    first = next(iter(described.values()))
    for name, told in described.items():
        fits(experiment, name, told, first["image_size"])
    height, width = first["image_size"]
    told_digests = [[name, told["data"]] for name, told in sorted(described.items())]
    return Federation(
        name=consortium,
        classes=experiment.data.classes,
        strata=tuple(sorted({name for told in described.values() for name in told["strata"]})),
        sites=tuple(unseen(name) for name in sorted(described)),
        image_size=(int(height), int(width)),
        synthetic=any(told["synthetic"] for told in described.values()),
        sheet={
            "sites": {name: told["sheet"] for name, told in sorted(described.items())},
            "warnings": remarks(described),
            "shared_pictures": None,
            "shared_patients": None,
        },
        digest=hashlib.sha256(repr(told_digests).encode()).hexdigest(),
    )


def fits(experiment: Experiment, name: str, told: Header, image_size: Sequence[int]) -> None:
    """Refuse a site that does not fit the others, by what it says of itself.

    Raises:
        RunError: it has another version, classes or image size than the coordinator expects.
    """
    _same_version(name, told, machine()["confrere"])
    expected = {"classes": list(experiment.data.classes), "image_size": list(image_size)}
    for key, value in expected.items():
        if told.get(key) != value:
            what = f"its {key.replace('_', ' ')} are {told.get(key)}, others have {value}"
            raise RunError(what, where=f"site {name}", fix="agree on one", code="site-differs")


def remarks(described: Mapping[str, Header]) -> list[str]:
    """Return the sites' own warnings, and one for every package of which not all have the coordinator's version."""
    ours = machine()
    warnings = [f"{name}: {line}" for name, told in described.items() for line in told["warnings"]]
    for package in ("torch", "numpy", "python"):
        versions = {name: told["versions"].get(package) for name, told in described.items()}
        if {ours[package], *versions.values()} != {ours[package]}:
            said = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            warnings.append(
                f"{package} differs (coordinator {ours[package]}, {said}): not the same bytes as elsewhere."
            )
    return warnings


def _same_version(name: str, told: Header, ours: str) -> None:
    """Refuse another minor version: methods may differ between them."""
    theirs = str(told["versions"].get("confrere"))
    if Version(theirs).release[:2] != Version(ours).release[:2]:
        what, fix = f"it has confrere {theirs}, the coordinator {ours}", "install the same minor version everywhere"
        raise RunError(what, where=f"site {name}", fix=fix, code="version")


def unseen(name: str) -> SiteImages:
    """Return a site of which only the name is known here."""
    none = np.zeros(0, np.int64)
    images = np.zeros((0, 1, 1), np.float32)
    return SiteImages(name=name, images=images, labels=none, groups=none, digests=(), split=np.zeros(0, np.int8))
