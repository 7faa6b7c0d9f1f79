"""status.json: what a coordinator is doing now, for whoever watches; the journal says what is done."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from confrere.record.files import write_json

EVERY = 5.0
"""Seconds after which the file is written again although nothing changed: a sign of life."""


class Status:
    """Written atomically on every change; ``consortium`` is the name in the roster."""

    def __init__(self, path: Path, consortium: str, sites: Collection[str]) -> None:
        now, self._path, self._written = time.time(), path, 0.0
        self.consortium = consortium
        new: dict[str, Any] = {"online": False, "seen": None, "waiting": False, "refused": "", "expected": False}
        self.values: dict[str, Any] = {
            "format": 1,
            "consortium": consortium,
            "phase": "waiting",
            "method": "",
            "round": 0,
            "rounds": 0,
            "since": now,
            "updated": now,
            "sites": {site: dict(new) for site in sorted(sites)},
            "error": "",
        }

    def phase(self, phase: str, **values: Any) -> None:
        """Begin a phase; ``values`` are other fields."""
        if phase != self.values["phase"]:
            self.values["since"] = time.time()
        self.values |= {"phase": phase, **values}
        self._write()

    def online(self, sites: Collection[str]) -> None:
        """Say which sites can be asked now."""
        for site in sites:
            self.values["sites"][site]["seen"] = time.time()
        self._mark("online", sites)

    def waiting(self, sites: Collection[str]) -> None:
        """Say which sites were asked and have not answered."""
        self._mark("waiting", sites)

    def expected(self, sites: Collection[str]) -> None:
        """Say which sites may come later and have not joined; one that is refused stays expected."""
        self._mark("expected", sites)

    def joined(self, site: str) -> None:
        """Say that a site that was expected takes part now."""
        self.values["sites"][site] |= {"expected": False, "refused": ""}
        self._write()

    def _mark(self, key: str, sites: Collection[str]) -> None:
        """Set ``key`` for ``sites`` and no others; write that if it is news, or if it is time for a sign of life."""
        entries, now = self.values["sites"], {site for site in self.values["sites"] if site in sites}
        news = now != {site for site, entry in entries.items() if entry[key]}
        for site, entry in entries.items():
            entry[key] = site in now
        if news or time.time() - self._written > EVERY:
            self._write()

    def refused(self, site: str, code: str) -> None:
        """Say that a site refused, or was refused, with the code of an error."""
        self.values["sites"][site]["refused"] = code
        self._write()

    def _write(self) -> None:
        self._written = self.values["updated"] = time.time()
        write_json(self._path, self.values)
