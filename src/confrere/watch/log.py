"""The structured log: one JSON object a line, of a fixed set of keys that hold no sentence and no name of a file.

``{"ts": "2026-11-28T12:00:00.000Z", "level": "warning", "event": "failure", "site": "north", "round": 3, ...}``
"""

from __future__ import annotations

import contextlib
import ipaddress
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
    "method", "round", "update", "score", "failure", "fallback", "stop", "examine",
    "joined", "registered", "connecting", "waiting", "disconnected", "refused", "request", "log-lost",
]  # fmt: skip
"""All that a line can tell: of training; of sites and the line to them; of the log itself."""
_WARNINGS = ("failure", "fallback", "disconnected", "refused")
_CODE = re.compile(r"[a-z][a-z-]{0,39}")
_NUMBERS = ("round", "seconds", "sent_bytes", "received_bytes", "loss", "score")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line. Its type is the whitelist: listed words, slugs, codes, an IP address, finite numbers.

    ``kind`` is that of a request, ``address`` that of a machine that was turned away.

    Raises:
        ValueError: a field holds anything else.
        TypeError: there is no such field.
    """

    level: Literal["info", "warning", "error"] = "info"
    event: Kind
    site: str | None = None
    method: str | None = None
    code: str | None = None
    kind: str | None = None
    address: str | None = None
    round: int | None = None
    seconds: float | None = None
    sent_bytes: int | None = None
    received_bytes: int | None = None
    loss: float | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        listed = self.event in get_args(Kind) and self.level in ("info", "warning", "error")
        names = all(name is None or SLUG.fullmatch(name) for name in (self.site, self.method))
        codes = all(code is None or _CODE.fullmatch(code) for code in (self.code, self.kind))
        placed = self.address is None or _is_address(self.address)
        numbers = all(_number(getattr(self, key)) == getattr(self, key) for key in _NUMBERS)
        if not (listed and names and codes and placed and numbers):
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
    kind = event["event"]
    if kind == "round":
        for site, said in event["sites"].items():
            numbers = {key: _number(said.get(key)) for key in ("loss", "seconds", "sent_bytes", "received_bytes")}
            yield Entry(event="update", round=event["round"], site=_name(site), **numbers)
        yield Entry(event="round", round=event["round"], seconds=_number(event.get("seconds")))
    elif kind == "evaluation":
        for site, score in event["sites"].items():
            yield Entry(event="score", round=event["round"], site=_name(site), score=_number(score))
    elif kind == "method":
        yield Entry(event="method", method=_name(event.get("name")))
    elif kind == "fallback":
        yield Entry(level="warning", event="fallback", round=event.get("to"))
    elif kind in get_args(Kind):
        address = event.get("address")
        yield Entry(
            level="warning" if kind in _WARNINGS else "info",
            event=kind,
            site=_name(event["site"]) if event.get("site") else None,
            method=_name(event["method"]) if event.get("method") else None,
            code=_code(event["code"]) if event.get("code") else None,
            kind=_code(event["kind"]) if event.get("kind") else None,
            address=address if _is_address(address) else None,
            round=_number(event.get("round")),
        )


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


def _code(value: object) -> str:
    """Return a code, "unknown" for what cannot be one."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else "unknown"


def _is_address(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(ipaddress.ip_address(value))
    except ValueError:
        return False


def _number(value: Any) -> Any:
    """Return a finite number, None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None
