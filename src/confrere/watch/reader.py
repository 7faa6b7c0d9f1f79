"""Read a run directory into a :class:`~confrere.watch.state.State`, again and again, at the cost of what is new."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from confrere import intake
from confrere.data.paths import SLUG
from confrere.errors import RunError
from confrere.federation.participation import Identifiability, cohorts_of, identifiability, matrix_of
from confrere.record.files import read_json
from confrere.record.journal import Event, last_round
from confrere.record.run import Run
from confrere.report.reading import as_dict, as_list, number
from confrere.watch.follow import Follower, text
from confrere.watch.state import ENDED, PHASES, Control, Failure, Score, SiteState, State


class Watcher:
    """A run directory under watch; threads may share one.

    Nothing is written there. A run that has not begun to train, a journal whose last line is half written
    and a missing ``status.json`` are normal.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._lock = Path(run), threading.Lock()
        self._journals: dict[str, Follower] = {}
        self._told: tuple[Sequence[Event], _Told] = ((), _Told.of(()))
        self.state()  # a place that holds no run is told now

    def state(self) -> State:
        """Return what the run is doing now.

        Raises:
            RunError: there is no run, or its journal or one of its files is damaged.
        """
        with self._lock:
            return self._state()

    def _state(self) -> State:
        held = Run(self._run).held()  # first: a run that ends meanwhile has all its events written
        experiment, status = _experiment(self._run), _status(self._run)
        events = self._events("")
        if experiment is None and status is None and not events:
            fix = "give the --out directory of a run"
            raise RunError("no run here", where=str(self._run), fix=fix, code="no-run")
        if self._told[0] is not events:
            self._told = events, _Told.of(events)
        told = self._told[1]
        experiment, said = experiment or {}, status or {}
        controls = tuple(map(self._control, _controls(experiment)))
        rounds = int(number(experiment.get("rounds")) or number(said.get("rounds")) or 0)
        phase = _phase(said.get("phase"), events, controls, rounds)
        if phase not in ENDED and held is False:
            phase = "stopped"
        statuses = None if status is None else as_dict(status.get("sites"))
        return State(
            name=text(said.get("consortium")),
            method=text(as_dict(experiment.get("method")).get("name") or said.get("method")),
            phase=phase,
            round=last_round(events),
            rounds=rounds,
            updated=max(number(said.get("updated")) or 0.0, *map(_touched, self._files(controls))),
            sites=_sites(told.sites, statuses, ended=phase in ENDED),
            failures=told.failures,
            scores=told.scores,
            seconds=told.seconds,
            participation=told.participation,
            controls=controls,
            error=text(said.get("error")),
            again=_again(self._run) if phase == "stopped" else "",
        )

    def _events(self, part: str) -> list[Event]:
        path = self._run / part / "events.jsonl"
        return self._journals.setdefault(part, Follower(path)).events()

    def _control(self, name: str) -> Control:
        events = self._events(f"controls/{name}")
        return Control(name, last_round(events), _ended(events))

    def _files(self, controls: Iterable[Control]) -> list[Path]:
        parts = [self._run, *(self._run / "controls" / control.name for control in controls)]
        return [self._run / "experiment.toml", *(part / "events.jsonl" for part in parts)]


def _experiment(run: Path) -> dict[str, Any] | None:
    """Return the experiment as its file has it, unchecked: a watcher may be older than what wrote it."""
    path = run / "experiment.toml"
    try:
        return intake.parse_toml(intake.read_bytes(path, intake.MOST_TOML))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        what, fix = "a file of the run cannot be read", "mend it, or restore it from a copy"
        raise RunError(what, where=str(path), fix=fix, code="run-file") from error


def _status(run: Path) -> dict[str, Any] | None:
    path = run / "status.json"
    if not path.exists():
        return None
    said: dict[str, Any] = read_json(path)
    if said.get("format") != 1 or said.get("phase") not in PHASES:
        what, fix = "the coordinator's status is of another version", "watch with the version that runs"
        raise RunError(what, where=str(path), fix=fix, code="run-file")
    return said


def _controls(experiment: dict[str, Any]) -> list[str]:
    own = as_dict(experiment.get("method")).get("name")
    names = (str(name) for name in as_list(experiment.get("controls")) if name != own)
    return [name for name in names if SLUG.fullmatch(name)]  # it names a folder


def _ended(events: Sequence[Event]) -> bool:
    return any(e["event"] == "end" for e in events)


def _again(run: Path) -> str:
    across = (run / "job.json").exists()
    return f"confrere coordinator KIT --out {run}" if across else f"confrere resume {run}"


def _phase(said: str | None, events: Sequence[Event], controls: Sequence[Control], rounds: int) -> str:
    """Return the phase that the coordinator said, or that the journals of a run in one process tell.

    Training, to the coordinator, is that of the controls, too.
    """
    if _ended(events) and said not in ENDED and not all(control.done for control in controls):
        return "controls"
    if said is not None:
        return said
    if _ended(events):
        return "done"
    if any(e["event"] == "stop" for e in events) or (rounds and last_round(events) >= rounds):
        return "examine"
    return "train" if any(e["event"] in ("begin", "round") for e in events) else "waiting"


@dataclass
class _Known:
    """What the journal says of one site."""

    loss: float | None = None
    score: float | None = None
    sent: int = 0
    received: int = 0
    asked: bool = False
    refusals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Told:
    """What a journal says, all of it."""

    sites: Mapping[str, _Known]
    failures: tuple[Failure, ...]
    scores: tuple[Score, ...]
    seconds: tuple[float, ...]
    participation: Identifiability

    @classmethod
    def of(cls, events: Sequence[Event]) -> _Told:
        """Return what the events that stand amount to."""
        sites: defaultdict[str, _Known] = defaultdict(_Known)
        asked: list[str] = []
        for event in events:
            kind = event["event"]
            if kind == "begin":
                asked = event["sites"]
            elif kind == "round":
                asked = []
                for name, (loss, sent, received) in event["sites"].items():
                    known = sites[name]
                    known.loss = loss
                    known.sent += sent
                    known.received += received
            elif kind == "evaluation":
                for name, score in event["sites"].items():
                    sites[name].score = score
            elif kind == "failure" and event["site"]:
                sites[event["site"]].refusals[event["code"] or "unknown"] += 1
        for name in asked:
            sites[name].asked = True
        return cls(
            sites=sites,
            failures=tuple(
                Failure(e["round"], e["site"], e["code"], e["reason"]) for e in events if e["event"] == "failure"
            ),
            scores=tuple(Score(e["round"], e["mean"], e["sites"]) for e in events if e["event"] == "evaluation"),
            seconds=tuple(e["seconds"] for e in events if e["event"] == "round"),
            participation=_participation(events, sorted(sites)),
        )


def _participation(events: Sequence[Event], sites: Sequence[str]) -> Identifiability:
    """Return what the sums of the rounds so far tell of single sites, where sums are all that is seen."""
    return identifiability(matrix_of([cohort for _, cohort in cohorts_of(events)], sites), sites)


def _sites(told: Mapping[str, _Known], said: Mapping[str, Any] | None, *, ended: bool) -> tuple[SiteState, ...]:
    """Return the sites that the journal or the coordinator's status knows, sorted; in an ended run none is online."""
    statuses = {text(name): as_dict(one) for name, one in (said or {}).items()}
    names = sorted({*told, *statuses})
    found = (_site(name, told.get(name, _Known()), statuses.get(name), alone=said is None) for name in names)
    if not ended:
        return tuple(found)
    return tuple(replace(site, online=None if site.online else site.online, waiting=False) for site in found)


def _site(name: str, known: _Known, status: Mapping[str, Any] | None, *, alone: bool) -> SiteState:
    said = status or {}
    return SiteState(
        name=name,
        online=None if status is None else bool(said.get("online")),
        seen=number(said.get("seen")),
        waiting=known.asked if alone else bool(said.get("waiting")),
        expected=bool(said.get("expected")),
        refused=text(said.get("refused")),
        loss=known.loss,
        score=known.score,
        sent_bytes=known.sent,
        received_bytes=known.received,
        refusals=dict(sorted(known.refusals.items())),
    )


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
