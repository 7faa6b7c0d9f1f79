"""The structured log: one JSON object a line, of a fixed set of keys that hold no sentence and no name of a file.

``{"ts": "2026-11-28T12:00:00.000Z", "level": "warning", "event": "failure", "site": "north", "round": 3, ...}``
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal, get_args

from confrere.data.paths import SLUG
from confrere.errors import RunError

Kind = Literal[
    "start", "end", "method", "round", "update", "score", "failure", "fallback", "stop", "examine",
    "site-online", "site-offline", "site-refused", "policy", "log-lost",
]  # fmt: skip
"""All that a line can tell."""
_CODE = re.compile(r"[a-z][a-z-]{0,39}")
_NUMBERS = ("round", "seconds", "sent_bytes", "received_bytes", "loss", "score")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line. Its type is the whitelist: words are those of a list, names are slugs, all else are finite numbers.

    Raises:
        ValueError: a field holds anything else.
        TypeError: there is no such field.
    """

    level: Literal["info", "warning", "error"] = "info"
    event: Kind
    site: str | None = None
    method: str | None = None
    code: str | None = None
    round: int | None = None
    seconds: float | None = None
    sent_bytes: int | None = None
    received_bytes: int | None = None
    loss: float | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        listed = self.event in get_args(Kind) and self.level in ("info", "warning", "error")
        names = all(name is None or SLUG.fullmatch(name) for name in (self.site, self.method))
        coded = self.code is None or _CODE.fullmatch(self.code)
        if not (listed and names and coded and all(_is_number(getattr(self, key)) for key in _NUMBERS)):
            raise ValueError("a log entry holds listed words, names of sites and methods, codes and numbers only")

    def line(self, moment: datetime) -> str:
        """Return the entry as JSON, without line end; keys without a value are left out."""
        at = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {key.name: getattr(self, key.name) for key in fields(self)}
        return json.dumps({"ts": at, **{key: value for key, value in told.items() if value is not None}})


class Log:
    """Where entries go: a file that is rotated, or standard error; call it with an event of the round loop.

    Args:
        path: the file, made with mode 0600; None for standard error.
        most_bytes: at this size the file becomes ``path.1``, of which ``keep`` are kept.

    Raises:
        RunError: the file cannot be opened.
    """

    def __init__(self, path: Path | None = None, *, most_bytes: int = 10_000_000, keep: int = 5) -> None:
        try:
            self._handler = _Rotating(path, most_bytes, keep) if path else logging.StreamHandler(sys.stderr)
        except OSError as error:
            what, fix = f"the log cannot be written: {error.strerror}", "mend the permissions, or log elsewhere"
            raise RunError(what, where=str(path), fix=fix, code="cannot-write") from error

    def write(self, entry: Entry) -> None:
        """Write one line."""
        line = entry.line(datetime.now(UTC))
        self._handler.handle(logging.LogRecord("confrere", logging.INFO, "", 0, line, None, None))

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write the lines of an event that the loop or the job tells, as their ``notify``; others say nothing here."""
        for entry in entries(event):
            self.write(entry)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # lines that a full disk did not take were told when they were written
            self._handler.close()


def entries(event: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield what the log keeps of an event: numbers and codes; a reason's free text, which a site may send, never."""
    kind, round_ = event.get("event"), event.get("round")
    if kind == "method":
        yield Entry(event="method", method=_name(event.get("name")))
    elif kind == "round":
        for site, said in event["sites"].items():
            numbers = {key: said.get(key) for key in ("loss", "seconds", "sent_bytes", "received_bytes")}
            yield Entry(event="update", round=round_, site=_name(site), **numbers)
        yield Entry(event="round", round=round_, seconds=event.get("seconds"))
    elif kind == "evaluation":
        for site, score in event["sites"].items():
            yield Entry(event="score", round=round_, site=_name(site), score=score)
    elif kind == "failure":
        code, site = str(event.get("code") or "unknown"), event.get("site")
        coded = code if _CODE.fullmatch(code) else "unknown"
        yield Entry(level="warning", event="failure", round=round_, site=_name(site) if site else None, code=coded)
    elif kind == "fallback":
        yield Entry(level="warning", event="fallback", round=event.get("to"))
    elif kind == "stop":
        yield Entry(event="stop", round=round_)
    elif kind == "examine":
        yield Entry(event="examine", round=round_)


class _Rotating(RotatingFileHandler):
    """The standard handler; its files are for their owner only, and a full disk ends the log, not the run."""

    def __init__(self, path: Path, most_bytes: int, keep: int) -> None:
        super().__init__(path, maxBytes=most_bytes, backupCount=keep, encoding="utf-8")

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the standard library's name
        """Say on standard error that a line was lost, and the line."""
        lost = Entry(level="error", event="log-lost", code="cannot-write").line(datetime.now(UTC))
        sys.stderr.write(f"{lost}\n{record.getMessage()}\n")


def _name(value: object) -> str:
    """Return a name of a site or method, "unnamed" for what cannot be one."""
    return value if isinstance(value, str) and SLUG.fullmatch(value) else "unnamed"


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
