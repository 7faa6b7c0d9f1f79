"""A journal with a chain that holds but other contents: ``verify`` names what is wrong and never fails otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from test_verify import finished

from confrere.errors import ConfigError, RunError
from confrere.record import journal
from confrere.record.files import write_bytes
from confrere.record.run import Run
from confrere.seeds import numpy_generator
from confrere.verify import verify

Change = tuple[str, int, tuple[str, ...], Any]
VALUES = (None, True, -1, 0, 2, 10**300, 0.5, "", "x", "../../x", "a\0b", "x" * 5000, [], [1], {}, {"x": {}}, {"": 1})
CLAIMS = {
    "inputs": {"experiment", "data"},
    "begin": {"round", "server", "requests"},
    "round": {"round", "server", "averaged", "kept", "stored", "reply"},
    "end": {"round", "files"},
    "verdicts": {"files"},
}
"""Keys of which ``verify`` says that they hold, at any depth."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("resealed")
        patch.setenv("CONFRERE_CACHE", str(folder / "cache"))
        out = finished(folder, rounds=2, method={"name": "fedit"})
        shutil.rmtree(out / "controls")  # its verdicts stay
        yield out


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where every value of an event stands."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def changes(events: list[dict[str, Any]]) -> list[Change]:
    """Return every way to take out, repeat or move one event, to take out a key, or to give it another value."""
    found: list[Change] = []
    for at, event in enumerate(events):
        found += [(kind, at, (), None) for kind in ("delete", "repeat", "last")]
        found += [("key", at, place, None) for place in places(event)]
        found += [("value", at, place, value) for place in places(event) for value in VALUES]
    return found


def changed(events: list[dict[str, Any]], change: Change) -> list[dict[str, Any]]:
    """Return a journal's events with one change."""
    kind, at, place, value = change
    events = deepcopy(events)
    if kind == "delete":
        del events[at]
    elif kind == "repeat":
        events.insert(at, events[at])
    elif kind == "last":
        events.append(events.pop(at))
    else:
        inner: Any = events[at]
        for key in place[:-1]:
            inner = inner[key]
        if kind == "key":
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
    return events


def claimed(events: list[dict[str, Any]], change: Change) -> bool:
    """Return whether a change is one of what ``verify`` says that it holds."""
    kind, at, place, value = change
    claims = CLAIMS.get(events[at]["event"], set())
    if kind in ("repeat", "last"):
        return False
    inner: Any = events[at]
    for key in place:
        inner = inner[key]
    same = kind == "value" and (inner == value or (place[-1:] == ("averaged",) and bool(inner) == bool(value)))
    return not same and (bool(claims) if kind == "delete" or place[0] == "event" else not claims.isdisjoint(place))


def plain(events: Any) -> Any:
    """Return events as plain dictionaries, which can be copied."""
    return {k: plain(v) for k, v in events.items()} if isinstance(events, dict) else events


def try_all(run: Path, which: list[int] | None) -> tuple[int, int]:
    """Make changes one at a time; return how many there were and how many were refused."""
    file = Run(run).events_file
    events = [plain(e) for e in journal.read(file)[0]]
    rounds = sum(e["event"] == "round" for e in events)
    every = changes(events)
    refused = 0
    for number in which if which is not None else range(len(every)):
        change = every[number % len(every)]
        now = changed(events, change)
        write_bytes(file, journal.seal(now, 1, journal.START)[0])
        try:
            (found,) = verify(run)
        except (RunError, ConfigError):
            refused += 1
        else:
            assert not claimed(events, change), change
            assert found.lines == len(now)
            assert found.recomputed == found.rounds == rounds, change
    return len(every) if which is None else len(which), refused


def test_one_change_of_a_resealed_journal_is_refused_or_touches_no_claim(run: Path) -> None:
    which = numpy_generator(0, "resealed").integers(0, 10**6, 150).tolist()
    tried, refused = try_all(run, which)
    assert refused > tried / 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_change_of_a_resealed_journal_ends_in_anything_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried, refused = try_all(run, None)
    with capsys.disabled():
        print(f"\nresealed journals: {refused} of {tried} changes refused, the others touch nothing that is claimed")


@pytest.mark.parametrize("event", ["inputs", "begin", "round", "end", "verdicts"])
def test_a_record_that_is_gone_is_named(run: Path, event: str) -> None:
    file = Run(run).events_file
    events = journal.read(file)[0]
    gone = next(n for n, e in enumerate(events) if e["event"] == event)
    write_bytes(file, journal.seal(events[:gone] + events[gone + 1 :], 1, journal.START)[0])
    with pytest.raises(RunError) as error:
        verify(run)
    assert error.value.code == "verification"
    if event in ("begin", "round"):  # the record that now stands there, or the next of its kind, does not follow
        named = int(error.value.where.rsplit(" ", 1)[1])
        assert events[named]["event"] in ("begin", "round")
        assert gone <= named <= gone + 4
