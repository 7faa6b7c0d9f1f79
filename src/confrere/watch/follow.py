"""A journal that grows, read again and again: each time only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from confrere import intake
from confrere.errors import RunError, printable
from confrere.record import journal
from confrere.record.journal import Event
from confrere.report.reading import as_dict, number

LONGEST = 400
"""Characters of a reason, which a site may have sent."""


class Follower:
    """The events that stand in one journal, of each only what a watcher shows: a long run must not fill the memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start()

    def _start(self) -> None:
        self._bytes, self._lines, self._head = 0, 0, journal.START
        self._events: list[Event] = []
        self._seen: tuple[int, ...] = ()

    def events(self) -> list[Event]:
        """Return the events that stand; a last line that is half written counts when it is whole.

        Raises:
            RunError: the journal cannot be read, or a line was damaged or changed.
        """
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._start()
            return self._events
        except OSError as error:
            raise _unreadable(self._path, error) from error
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen != self._seen:
            if stat.st_size < self._bytes:
                self._start()
            self._grow()
            self._seen = seen
        return self._events

    def _grow(self) -> None:
        where = str(self._path)
        new = self._new() if self._lines else journal.content(self._path)
        try:
            events, self._head = journal.parse(new, where, after=self._lines, head=self._head)
        except RunError:
            if not self._lines:
                raise
            self._start()  # another journal, or a damaged one
            new = journal.content(self._path)
            events, self._head = journal.parse(new, where)
        self._bytes, self._lines = self._bytes + len(new), self._lines + len(events)
        self._events = journal.standing([*self._events, *map(_brief, events)])

    def _new(self) -> bytes:
        """Return the whole lines behind those that were read."""
        try:
            with intake.open_file(self._path) as file:
                file.seek(self._bytes)
                found = file.read(journal.MOST)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return found[: found.rfind(b"\n") + 1]


def text(value: object) -> str:
    """Return what may have come from a site as one short printable line."""
    return printable("" if value is None else str(value))[:LONGEST]


def _brief(event: Event) -> Event:
    """Return of an event what is shown, all of it checked: finite numbers, short texts."""
    kind, sites = event["event"], event.get("sites", {})
    kept: Event = {"event": kind, "round": event.get("round", 0)}
    if kind == "fallback":
        kept["to"] = event.get("to", 0)
    elif kind == "begin":
        kept["sites"] = [text(site) for site in event.get("requests", {})]
    elif kind == "evaluation":
        known = {text(site): number(score) for site, score in sites.items()}
        kept["mean"] = number(event.get("mean"))
        kept["sites"] = {site: score for site, score in known.items() if score is not None}
    elif kind == "round":
        kept["seconds"] = number(event.get("seconds")) or 0.0
        kept["averaged"] = event.get("averaged") is not False
        kept["sites"] = {text(site): _record(as_dict(said)) for site, said in sites.items()}
    elif kind == "failure":
        kept |= {key: text(event.get(key)) for key in ("site", "code", "reason")}
    return kept


def _record(said: dict[str, Any]) -> tuple[float | None, int, int]:
    """Return loss, bytes sent and bytes received of one site in one round."""
    sent, received = (int(number(said.get(key)) or 0) for key in ("sent_bytes", "received_bytes"))
    return number(said.get("loss")), sent, received


def _unreadable(path: Path, error: OSError) -> RunError:
    what, fix = f"the journal cannot be read: {error.strerror}", "mend its permissions, or read it as its owner"
    return RunError(what, where=str(path), fix=fix, code="journal")
