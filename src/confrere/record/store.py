"""A site's own state, keyed by round: read what stands strictly before a round, write under the round.

State and reply of a round are one atomic write. A request that arrives twice is answered with the stored reply,
so a redelivery changes nothing and draws nothing anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from confrere.errors import RunError
from confrere.method import Reply
from confrere.record.files import read_state, write_state
from confrere.tensors import State


class Store(Protocol):
    """Where a site keeps its state."""

    def before(self, round_: int) -> State | None:
        """Return the newest state written for a round strictly before ``round_``."""

    def reply(self, round_: int) -> Reply | None:
        """Return the reply given in ``round_``, if any."""

    def write(self, round_: int, state: State, reply: Reply) -> None:
        """Keep state and reply of ``round_``, both or neither."""


class MemoryStore:
    """A store for tests and throw-away simulations."""

    def __init__(self) -> None:
        self._rounds: dict[int, tuple[State, Reply]] = {}

    def before(self, round_: int) -> State | None:
        """Return the newest state written for a round strictly before ``round_``."""
        rounds = [r for r in self._rounds if r < round_]
        return self._rounds[max(rounds)][0] if rounds else None

    def reply(self, round_: int) -> Reply | None:
        """Return the reply given in ``round_``, if any."""
        return self._rounds[round_][1] if round_ in self._rounds else None

    def write(self, round_: int, state: State, reply: Reply) -> None:
        """Keep state and reply of ``round_``."""
        self._rounds[round_] = (state, reply)


def rounds_in(folder: Path) -> list[int]:
    """Return the rounds whose states lie in a folder, in any order; other files beside them do not count."""
    return [int(f.stem) for f in folder.glob("*.safetensors") if f.stem.isdecimal()]


def round_file(folder: Path, round_: int) -> Path:
    """Return the file of a round's state in a folder."""
    return folder / f"{round_:05d}.safetensors"


class DirectoryStore:
    """One safetensors file a round in a directory of the site's own: ``00007.safetensors``."""

    def __init__(self, folder: Path, site: str) -> None:
        self.folder, self.site = folder, site

    def before(self, round_: int) -> State | None:
        """Return the newest state written for a round strictly before ``round_``."""
        rounds = [r for r in rounds_in(self.folder) if r < round_]
        return self.read(max(rounds))[0] if rounds else None

    def reply(self, round_: int) -> Reply | None:
        """Return the reply given in ``round_``, if any."""
        return self.read(round_)[1] if self.file(round_).exists() else None

    def write(self, round_: int, state: State, reply: Reply) -> None:
        """Keep state and reply of ``round_`` in one atomic file."""
        groups = {f"state.{group}": tensors for group, tensors in state.items()}
        groups |= {f"reply.{group}": tensors for group, tensors in reply.state.items()}
        meta = {"site": self.site, "round": round_, "weight": reply.weight, "metrics": dict(reply.metrics)}
        write_state(self.file(round_), groups, meta)

    def file(self, round_: int) -> Path:
        """Return the file of ``round_``, whether it is there or not."""
        return round_file(self.folder, round_)

    def read(self, round_: int) -> tuple[State, Reply]:
        """Return state and reply of ``round_``; RunError when they cannot be read, or are of another site or round."""
        path = self.file(round_)
        groups, meta = read_state(path)
        if (meta["site"], meta["round"]) != (self.site, round_):
            raise RunError(
                f"this state belongs to site {meta['site']!r}, round {meta['round']}",
                where=str(path),
                fix="put the file back where it was",
                code="state-misplaced",
            )
        state = {g.removeprefix("state."): t for g, t in groups.items() if g.startswith("state.")}
        sent = {g.removeprefix("reply."): t for g, t in groups.items() if g.startswith("reply.")}
        return state, Reply(site=self.site, round=round_, state=sent, weight=meta["weight"], metrics=meta["metrics"])
