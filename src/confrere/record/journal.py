"""The journal: one JSON object a line, each sealed with a hash over itself and all before it.

``{"event": ..., "seq": 3, "hash": "..."}``: ``hash`` is the SHA-256 of the hash before and of every byte of the line
up to it. So no byte of a whole line can be changed, and no line taken out, added or moved, without the first such line
being named. It holds digests and numbers, never data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from confrere import intake
from confrere.errors import RunError
from confrere.record.files import Fields, fields

Event = dict[str, Any]
AnyEvent = TypeVar("AnyEvent", bound=Event)
START = hashlib.sha256(b"confrere journal 1").hexdigest()
"""What stands in for the hash before the first line."""
_SEAL = re.compile(rb', "hash": "([0-9a-f]{64})"\}')
MOST = 1_000_000_000
"""Most bytes of a journal: a run of 10,000 rounds of a hundred sites has a fifth of it."""
_SEAL_BYTES = len(', "hash": ""}') + 64


def seal(events: Iterable[Event], seq: int, head: str) -> tuple[bytes, str]:
    """Return the lines of ``events``, of which the first is number ``seq`` and follows hash ``head``; and the new head.

    Raises:
        ValueError: an event holds NaN, or a key of the seal.
    """
    lines: list[bytes] = []
    for event in events:
        if event.keys() & {"seq", "hash"}:
            raise ValueError("an event may not hold 'seq' or 'hash'")
        body = json.dumps({**event, "seq": seq}, allow_nan=False)[:-1].encode()
        head = _hash(head, body)
        lines.append(body + f', "hash": "{head}"}}\n'.encode())
        seq += 1
    return b"".join(lines), head


def parse(content: bytes, where: str, *, after: int = 0, head: str = START) -> tuple[list[Fields], str]:
    """Return the events of a journal and its head; a last line without its line end (a torn write) is left out.

    Each event's ``where`` names its line. ``content`` may be what follows line ``after``, whose hash is ``head``.

    Raises:
        RunError: naming the first line that is damaged, changed, missing or out of place.
    """
    events: list[Fields] = []
    for number, line in enumerate(content.split(b"\n")[:-1], after + 1):
        body, sealed = line[:-_SEAL_BYTES], _SEAL.fullmatch(line[-_SEAL_BYTES:])
        found = _event(body + b"}") if sealed else None
        if found is None or sealed is None:
            raise _broken("is damaged", where, number)
        if sealed[1].decode() != _hash(head, body):
            raise _broken("was changed, or a line before it was taken out or added", where, number)
        if found.pop("seq", None) != number:
            raise _broken("has another number", where, number)
        head = sealed[1].decode()
        events.append(fields(found, f"{where}, line {number}"))
    return events, head


def content(path: Path) -> bytes:
    """Return the whole lines of a journal file, nothing when there is no file; RunError when it cannot be read."""
    try:
        found = intake.read_bytes(path, MOST)
    except FileNotFoundError:
        return b""
    except OSError as error:
        what, fix = f"the journal cannot be read: {error.strerror}", "mend it, or restore it from a copy"
        raise RunError(what, where=str(path), fix=fix, code="journal") from error
    return found[: found.rfind(b"\n") + 1]


def read(path: Path) -> tuple[list[Fields], str]:
    """Return the events of a journal file and its head; RunError as :func:`parse`, or when it cannot be read."""
    return parse(content(path), str(path))


def standing(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """Return the events that count: not those of rounds that a ``fallback`` undid, or that a ``begin`` begins anew."""
    kept: list[AnyEvent] = []
    newest = 0
    for event in events:
        last = {"fallback": event.get("to"), "begin": event.get("round", 0) - 1}.get(event["event"])
        if last is not None and last < newest:
            kept, newest = [e for e in kept if e.get("round", 0) <= last], last
        newest = max(newest, event.get("round", 0))
        kept.append(event)
    return kept


def last_round(events: Iterable[Mapping[str, Any]]) -> int:
    """Return the last committed round, 0 when there is none."""
    return max((e["round"] for e in events if e["event"] == "round"), default=0)


def heads(content: bytes) -> list[str]:
    """Return for every whole line of a journal the hash before it; the lines were parsed already."""
    sealed = [line[-_SEAL_BYTES:] for line in content.split(b"\n")[:-1]]
    return [START, *(match[1].decode() for seal in sealed if (match := _SEAL.fullmatch(seal)))][: len(sealed)]


def _hash(head: str, body: bytes) -> str:
    return hashlib.sha256(head.encode() + body).hexdigest()


def _event(text: bytes) -> Event | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(key, 0), int) for key in ("round", "to")):
        return None
    if not all(isinstance(found.get(key, {}), dict) for key in ("sites", "requests", "refused", "files", "secure")):
        return None
    records = [*found.get("sites", {}).values(), *found.get("refused", {}).values()]
    if found.get("event") == "round" and not all(isinstance(record, dict) for record in records):
        return None
    return found if isinstance(found.get("event"), str) else None


def _broken(what: str, where: str, number: int) -> RunError:
    fix = "restore the file from a copy; to go on without it, delete this line and all after it, then resume"
    return RunError(f"a line of the journal {what}", where=f"{where}, line {number}", fix=fix, code="journal")
