"""Hospitals that come after round 1 has begun: asked what they are before a round, and members from then on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.consortium.census import Header, Sites, describe, fits, gathered, remarks, unseen
from confrere.consortium.frame import SAME, Arrays
from confrere.consortium.status import Status
from confrere.data.federation import Federation
from confrere.errors import ConfigError, ConfrereError, RunError, UpdateRefusedError, nearest
from confrere.federation.transport import Failure
from confrere.method import make
from confrere.record.files import read_json, write_json
from confrere.record.run import Run

Check = Callable[[str, Header], None]


class Joined(Exception):  # noqa: N818  no error: the rounds go on from the journal, as after a kill, with one site more
    """A site has joined, and stands in the journal."""


def check_late(experiment: Experiment, roster: Collection[str], late: Collection[str]) -> None:
    """Refuse sites that cannot be late; no method is among the reasons, as each may ask a site for the first time late.

    Raises:
        ConfigError: a name is not in the roster, too few sites are left for round 1, or the experiment needs to know
            beforehand who takes part.
    """
    for name in late:
        if name not in roster:
            what, fix = f"the roster has no site {name!r}", nearest(name, roster)
            raise ConfigError(what, where="--late", fix=fix, code="unknown-site")
    first = set(roster) - {*late, experiment.hold_out}
    if late and len(first) < experiment.federation.min_replies:
        what = f"{len(first)} sites are left for round 1, and a round needs {experiment.federation.min_replies} replies"
        raise ConfigError(what, where="--late", fix="let fewer sites be late", code="late")
    hides = any(make(name).release() for name in experiment.other_controls) or experiment.build_method().release()
    reasons = {
        "secure.aggregation": (experiment.secure.aggregation, "masks are agreed among sites that are all known"),
        "federation.sampling": (experiment.federation.sampling == "groups", "groups are dealt once, among all sites"),
        "method.name": (bool(hides), "its epsilon is that of a known number of sites"),
        "hold_out": (experiment.hold_out in late, "an unseen site is only examined, at the end"),
    }
    for key, (holds, why) in reasons.items():
        if late and holds:
            fix = "let all sites be there before round 1, or change this"
            raise ConfigError(f"no site can be late here: {why}", where=key, fix=fix, code="late")


def late_of(out: Path, given: Collection[str]) -> tuple[str, ...]:
    """Return who may be late in the run in ``out``: as it began with, or ``given`` where none has begun.

    Raises:
        ConfigError: the run has begun, and others are given.
    """
    if not (out / "experiment.toml").exists() or not (out / "job.json").exists():
        return tuple(sorted(set(given)))
    kept = tuple(read_json(out / "job.json").get("late", ()))
    if set(given) - set(kept):
        what, fix = "this run has begun; who may be late is fixed", "leave --late out, or use a new --out"
        raise ConfigError(what, where=str(out), fix=fix, code="not-empty")
    return kept


def absent(status: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every site that was expected and took no part, of what status.json says."""
    said = []
    for name, site in sorted(status.get("sites", {}).items()):
        if site.get("expected"):
            why = f"was refused ({site['refused']})" if site.get("refused") else "was expected and never came"
            said.append(f"{name} {why}: the results are without it.")
    return said


@dataclass(kw_only=True)
class Membership:
    """Who takes part in a run across hospitals, and since which round.

    The journal's events ``joined`` say who joined it before which round (``since``), with which data. They belong to
    no round: what a fallback does again, it does with those who were there then.

    Args:
        run: its directory. experiment: of the run. job: header of its requests.
        sites, status, notify: as of the coordinator's run.
        late: names of the sites that may come later; those that have joined are taken out.
    """

    run: Run
    experiment: Experiment
    job: Header
    sites: Sites
    status: Status
    notify: Callable[[dict[str, Any]], None]
    late: set[str]
    described: dict[str, Header] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.joined = {event["site"]: event for event in self.run.events() if event["event"] == "joined"}
        self.late -= self.joined.keys()

    def gather(self, roster: Collection[str]) -> Federation:
        """Return the federation of the sites that are there from round 1; those that have joined must be there, too.

        Raises:
            RunError: as :func:`describe` and :func:`gathered`; or the data of a site that joined are others now.
            PolicyError: a site's policy forbids the experiment.
        """
        self.roster = sorted(roster)
        self.status.expected(self.late)
        self.described = describe(self.sites, sorted({*roster, *self.joined} - self.late), self.job, self.status)
        first = {name: told for name, told in self.described.items() if name not in self.joined}
        self._first = gathered(self.experiment, first, self.status.consortium)
        for name, event in self.joined.items():
            fits(self.experiment, name, self.described[name], self._first.image_size)
            if self.described[name]["data"] != event["data"]:
                what, fix = "its data changed since it joined", "give it the data of then, or start a new run"
                raise RunError(what, where=f"site {name}", fix=fix, code="data-changed")
        return self._first

    @property
    def federation(self) -> Federation:
        """Return the federation of all members by now."""
        return replace(self._first, sites=tuple(map(unseen, sorted(self.described))))

    @property
    def everybody(self) -> Federation:
        """Return the same with those who may still come: the depth of the server's model must not change later."""
        return replace(self._first, sites=tuple(map(unseen, self.roster)))

    @property
    def weights(self) -> dict[str, float]:
        """Return the registered weight of every member."""
        return {name: float(told["weight"]) for name, told in self.described.items()}

    def of_round(self, round_: int) -> list[str]:
        """Return who may be asked in a round of the method's training, sorted."""
        return sorted(n for n in self.described if n not in self.joined or self.joined[n]["since"] <= round_)

    def keep_sheets(self) -> None:
        """Add the data sheets of those who joined to federation.json, whose digest stays that of round 1."""
        if not self.joined:
            return
        path = self.run.path / "federation.json"
        kept = read_json(path)
        sheet = kept["sheet"]
        for name in sorted(self.joined):
            sheet["sites"] = dict(sorted({**sheet["sites"], name: self.described[name]["sheet"]}.items()))
            sheet["warnings"] += [r for r in remarks({name: self.described[name]}) if r not in sheet["warnings"]]
        write_json(path, kept)

    def ask_in(self, round_: int, check: Check) -> bool:
        """Ask those who were late and are there now what they are; return whether one joins before ``round_``.

        Who is refused stays out until the coordinator starts again; who gave no answer is asked before the next round.
        """
        here = sorted(self.late & set(self.sites.online()))
        asked: dict[str, tuple[Header, Arrays]] = {name: ({**self.job, "kind": "describe"}, {}) for name in here}
        before = len(self.joined)
        for name, answer in sorted(self.sites.ask("describe", asked).items()) if asked else ():
            try:
                self._join(name, answer, round_, check)
            except ConfrereError as error:
                refused = {"site": name, "code": error.code, "reason": error.reason, "fix": error.fix}
                self.notify({"event": "failure", "round": round_, **refused})
                if error.code != "no-answer":
                    self.late.discard(name)
                    self.status.refused(name, error.code)
        return len(self.joined) > before

    def _join(self, name: str, answer: tuple[Header, Any] | Failure, round_: int, check: Check) -> None:
        if isinstance(answer, Failure):
            raise RunError(answer.reason, fix=answer.fix, code=answer.code or "no-replies")
        told = answer[0]
        try:
            fits(self.experiment, name, told, self._first.image_size)
            check(name, told)
            sound = math.isfinite(told["weight"]) and told["weight"] > 0 and isinstance(told["data"], str)
            sound = sound and isinstance(told["sheet"], dict) and all(isinstance(w, str) for w in told["warnings"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # not of our making
            sound = False
        if not sound:
            raise UpdateRefusedError("what it says of itself is not understood", fix=SAME, code="message-form")
        event = {"event": "joined", "site": name, "since": round_, "data": told["data"], "weight": told["weight"]}
        self.run.append(event)  # it counts from here
        self.joined[name], self.described[name] = event, told
        self.late.discard(name)
        self.keep_sheets()
        self.status.joined(name)
        self.notify({"event": "joined", "site": name, "round": round_})


@dataclass(kw_only=True)
class Door:
    """Who may be asked in the round at hand of the method's training; called with no arguments, and told all events.

    Before a round begins it looks who has come; see :class:`Joined`.
    """

    members: Membership
    check: Check
    round: int
    _looked: int = field(default=0, init=False)

    def __call__(self) -> list[str]:
        """Return the names of the round's members, sorted; raise Joined when there are new ones."""
        if self._looked != self.round:
            self._looked = self.round
            if self.members.ask_in(self.round, self.check):
                raise Joined
        return self.members.of_round(self.round)

    def follow(self, event: Mapping[str, Any]) -> None:
        """Take note of an event of the round loop."""
        last = {"round": event.get("round"), "fallback": event.get("to")}.get(event["event"])
        if last is not None:
            self.round = last + 1
