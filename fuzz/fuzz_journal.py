"""Any bytes as a journal, or as events under seals that hold."""

from __future__ import annotations

import json

from confrere.errors import ConfrereError
from confrere.record import journal

_EVENTS = (
    {"event": "round", "round": 1, "sites": {"a": {"loss": 0.5}}},
    {"event": "evaluation", "round": 1, "criterion": 0.5, "sites": {}},
    {"event": "fallback", "round": 1, "to": 0},
    {"event": "stop", "round": 1, "reason": "x"},
)
SEEDS = (
    b"r" + journal.seal(_EVENTS, 1, journal.START)[0],
    b"e" + b"\n".join(json.dumps(event).encode() for event in _EVENTS),
)


def target(data: bytes) -> None:
    """Read ``data[1:]`` as a journal; or seal its lines first, as one could who edits the file with care."""
    kind, content = data[:1], data[1:]
    if kind == b"e":
        content, head = b"", journal.START
        for number, line in enumerate(data[1:].split(b"\n"), 1):
            try:
                event = json.loads(line)
                sealed, head = journal.seal([event], number, head)
            except (ValueError, RecursionError, AttributeError):  # no event at all: left to the other kind
                return
            content += sealed
    try:
        events, _ = journal.parse(content, "events.jsonl")
        standing = journal.standing(events)
        max((event["round"] for event in standing if event["event"] == "round"), default=0)
    except ConfrereError as error:
        str(error)
