"""What an audit is: a function of a tapped run that returns attack strengths beside their controls and bounds."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from confrere.errors import ConfigError, nearest

if TYPE_CHECKING:
    from confrere.audits.tapped import AuditedRun

LEVEL = 0.95
"""Of every interval."""
FINDINGS = {
    "found": "stronger than chance and than its control",
    "unclear": "stronger than chance, not clearly stronger than its control",
    "not found": "no stronger than chance",
    "cannot be said": "too few patients, or the attack has no power here",
    "above bound": "stronger than the guarantee allows: the guarantee, or its implementation, is wrong",
}


def _quiet(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How thorough audits are.

    Args:
        seed: of every draw.
        references: reference models, an even number >= 4; each is trained like the run, on half of the patients.
        patients: at most so many members, and at most so many others, of each site; both are thinned alike.
        attribute: what the audit of this name asks; empty for all that it can.
        notify: called with a line of progress.
    """

    seed: int = 0
    references: int = 4
    patients: int = 1000
    attribute: str = ""
    notify: Callable[[str], None] = field(default=_quiet, repr=False)

    def __post_init__(self) -> None:
        if self.references < 4 or self.references % 2:
            what = f"{self.references} reference models do not do"
            raise ConfigError(what, where="--references", fix="use an even number, 4 or more", code="audit")
        if self.patients < 1 or self.seed < 0:
            what = "there must be a patient, and a seed that is not negative"
            raise ConfigError(what, where="--patients, --seed", fix="use --patients 1000 --seed 0", code="audit")


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; None where it is not defined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of an audit; a higher ``strength`` is a stronger attack.

    Args:
        subject: a site, ``class NAME``, or ``all``. model: attacked: ``general``, ``update``, ``personalised``.
        control: the same attack where there is nothing to find. chance: what guessing gives.
        bound: the most that the run's guarantee allows; None without one that covers ``model``.
        n: on how many patients it rests, in words. main: whether the page shows it unfolded.
    """

    subject: str
    model: str
    measure: str
    strength: Interval
    control: Interval = Interval()
    chance: float = 0.0
    bound: float | None = None
    n: str = ""
    main: bool = True

    @property
    def finding(self) -> str:
        """Return one of :data:`FINDINGS`, by the intervals alone."""
        low, other = self.strength.low, self.control.high
        if low is None:
            return "cannot be said"
        if self.bound is not None and low > self.bound:
            return "above bound"
        if low <= self.chance:
            return "not found"
        return "found" if other is None or low > other else "unclear"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What one audit found, with what a reader must know of it."""

    name: str
    rows: tuple[Row, ...]
    means: str
    control: str
    limits: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it as a dict for JSON, with title, question and the finding of every row."""
        known = AUDITS[self.name]
        rows = [{**asdict(row), "finding": row.finding} for row in self.rows]
        said = {"audit": self.name, "title": known.title, "question": known.question}
        return {**said, **asdict(self), "rows": rows, "level": LEVEL}


class Known(NamedTuple):
    """A registered audit."""

    title: str
    question: str
    function: Callable[[AuditedRun, Choice], Audit]


AUDITS: dict[str, Known] = {}


def register(name: str, *, title: str, question: str) -> Callable[[Any], Any]:
    """Register an audit, a function ``(run, choice) -> Audit``, under ``name``."""

    def add(function: Callable[[AuditedRun, Choice], Audit]) -> Callable[[AuditedRun, Choice], Audit]:
        AUDITS[name] = Known(title, question, function)
        return function

    return add


def known_audits() -> dict[str, Known]:
    """Return every audit of this package by name, sorted; its modules are imported now."""
    import confrere.audits as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "commands":
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(AUDITS.items()))


def find(name: str) -> Known:
    """Return the audit called ``name``; ConfigError names the nearest."""
    known = known_audits()
    if name not in known:
        raise ConfigError(f"unknown audit {name!r}", where="--only", fix=nearest(name, known), code="unknown-name")
    return known[name]
