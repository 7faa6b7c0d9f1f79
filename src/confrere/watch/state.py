"""One picture of a run, made from its journal, its experiment and, across hospitals, the coordinator's status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from confrere.federation.participation import Identifiability

PHASES = ("waiting", "describe", "train", "evaluate", "examine", "controls", "stopped", "done", "failed")
"""``waiting`` for sites or data, ``describe`` of the sites, rounds, the test at the end, controls, and three ends:
``stopped`` is a run that is not done and that no process holds."""
ENDED = ("stopped", "done", "failed")
STALLED = 900.0
"""Seconds without any sign of life after which an unfinished run counts as stalled."""
_LAST = 5  # rounds whose mean is the guess for the next ones
_SHOWN = 400  # points of a curve, and lines of a list, that a page gets


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """What is known of one site.

    ``online`` is None where nobody says so: in one process there is no line that could be down, and where the
    coordinator has ended none is up. ``waiting``: it was asked and has not answered. ``expected``: it may join later.
    ``refused``: the code with which the coordinator turns it away now. ``refusals``: how many of its answers failed or
    were refused, by code. ``score`` is on validation images, by the task of the run, in [0, 1]. Bytes as the site sees
    them, of tensors in training requests and replies.
    """

    name: str
    online: bool | None = None
    seen: float | None = None
    waiting: bool = False
    expected: bool = False
    refused: str = ""
    loss: float | None = None
    score: float | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An answer that did not come or was refused; an empty site means the server."""

    round: int
    site: str
    code: str
    reason: str


@dataclass(frozen=True)
class Score:
    """Validation scores after a round, in [0, 1]: their mean, and each site's."""

    round: int
    mean: float | None
    sites: Mapping[str, float]


@dataclass(frozen=True)
class Control:
    """How far a control, trained in the same process after the method, has come."""

    name: str
    round: int
    done: bool


@dataclass(frozen=True, kw_only=True)
class State:
    """A run at one moment.

    ``round`` is the last one that is committed. ``seconds``: per round, in order. ``updated``: Unix time of the last
    sign of life. ``eta``: seconds left of training, guessed from the last rounds; None before the first one.
    ``participation``: what sums of the rounds so far tell of single sites. ``error``: what the coordinator ended with.
    ``again``: the command that continues a stopped run, empty for others.
    """

    name: str
    method: str
    phase: str
    round: int
    rounds: int
    updated: float
    sites: tuple[SiteState, ...]
    failures: tuple[Failure, ...]
    scores: tuple[Score, ...]
    seconds: tuple[float, ...]
    controls: tuple[Control, ...]
    participation: Identifiability | None = None
    error: str = ""
    again: str = ""

    @property
    def bytes(self) -> int:
        """Return the bytes that all sites sent and received."""
        return sum(site.sent_bytes + site.received_bytes for site in self.sites)

    @property
    def eta(self) -> float | None:
        """Return the seconds that the remaining rounds take if they are like the last ones, and none is left out."""
        last = self.seconds[-_LAST:]
        if self.phase != "train" or not last:
            return None
        return sum(last) / len(last) * max(0, self.rounds - self.round)

    def stalled(self, now: float, after: float = STALLED) -> bool:
        """Return whether the run is unfinished and gave no sign of life for ``after`` seconds."""
        return self.phase not in ENDED and now - self.updated > after

    def as_json(self, now: float, after: float = STALLED) -> dict[str, Any]:
        """Return what programs and the page get: plain values, long curves thinned, the newest failures."""
        step = -(-len(self.scores) // _SHOWN) or 1
        thinned = self.scores[::-1][::step][::-1]
        short = replace(self, scores=thinned, failures=self.failures[-_SHOWN:], seconds=self.seconds[-_LAST:])
        return {
            **asdict(short),
            "failures_total": len(self.failures),
            "bytes": self.bytes,
            "eta": self.eta,
            "now": now,
            "stalled": self.stalled(now, after),
        }

    def verdict(self, now: float, after: float = STALLED) -> str:
        """Return one line: what the run is doing, how far it is, and what is wrong."""
        from confrere.report.render import duration

        if self.stalled(now, after):
            doing = f"STALLED in phase {self.phase}, no sign of life for {duration(now - self.updated)}"
        else:
            doing = {"failed": "FAILED", "train": "training", "controls": "training controls"}.get(
                self.phase, self.phase
            )
        parts = [f"{self.method or 'run'}: {doing}, {self.round} of {self.rounds} rounds"]
        if self.again:
            parts.append(f"continue with: {self.again}")
        if self.eta is not None:
            parts.append(f"about {duration(self.eta)} of training left")
        known = [site for site in self.sites if site.online is not None and not site.expected]
        if known and self.phase not in ENDED:
            parts.append(f"{sum(bool(site.online) for site in known)} of {len(known)} sites online")
        if self.failures:
            parts.append(f"{len(self.failures)} failed answers")
        return "; ".join(parts)
