"""A run directory: the only place results live. One process writes it at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from confrere.errors import RunError
from confrere.record.files import read_state, write_bytes, write_state
from confrere.record.store import DirectoryStore
from confrere.tensors import State

LOCKS = {".lock", ".lock-holder"}
BEFORE_TRAINING = ("experiment.toml", "splits.csv", "machine.json", "federation.json")
"""What stands in a run directory before its backbone is loaded."""


class Run:
    """Events, server states and site states of one training of one method.

    A round is committed by its line in ``events.jsonl``; files of a round without that line are redone.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def events_file(self) -> Path:
        """Return the journal, one JSON object a line."""
        return self.path / "events.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process and sweep torn writes; RunError names the process that holds it."""
        holder, lock = self.path / ".lock-holder", FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
            holder.write_text(f"process {os.getpid()}", encoding="utf-8")
            for torn in self.path.rglob(".tmp-*"):  # what a killed process was writing
                torn.unlink()
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            raise RunError(f"{who} is using this run", where=str(self.path), fix="wait for it, or stop it") from None
        except OSError as error:
            lock.release()
            what = f"the directory cannot be written: {error.strerror}"
            raise RunError(what, where=str(self.path), fix="mend it, or choose another --out") from error
        try:
            yield
        finally:
            lock.release()

    def make_new(self) -> None:
        """Make sure that a new run can begin here; what a start that failed before training left is removed.

        Raises:
            RunError: a run, or something else, is there.
        """
        if (self.path / "backbone.json").exists():
            fix = f"confrere resume {self.path}, or another --out"
            raise RunError("a run is already there", where=str(self.path), fix=fix)
        found = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        foreign = {name for name in found - {*LOCKS, *BEFORE_TRAINING} if not name.startswith(".tmp-")}
        if self.path.is_file() or foreign or (found and not found & LOCKS):
            raise RunError("the directory is not empty", where=str(self.path), fix="choose a new --out")
        if found:
            with self.lock():
                for name in BEFORE_TRAINING:
                    (self.path / name).unlink(missing_ok=True)

    def events(self) -> list[dict[str, Any]]:
        """Return the journal; a last line cut short by a crash is left out."""
        if not self.events_file.exists():
            return []
        lines = self.events_file.read_bytes().split(b"\n")
        events = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is a torn write
            try:
                events.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise RunError(
                    "a line of the journal is damaged",
                    where=f"{self.events_file}, line {number}",
                    fix="delete this line and all after it, then resume",
                ) from error
        return events

    def append(self, *events: dict[str, Any]) -> None:
        """Append events durably; they appear together or not at all."""
        kept = b"".join(json.dumps(e, allow_nan=False).encode() + b"\n" for e in events)
        whole = self.events_file.read_bytes() if self.events_file.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        write_bytes(self.events_file, whole + kept)

    def commit(self, round_: int, server: State, *events: dict[str, Any]) -> None:
        """Write the server's state of a round, then the events that make it count."""
        write_state(self.server_file(round_), server, {"round": round_})
        self.append(*events)

    def server_file(self, round_: int) -> Path:
        """Return the file of the server's state after ``round_`` (0 = before round 1)."""
        return self.path / "server" / f"{round_:05d}.safetensors"

    def server(self, round_: int) -> State:
        """Return the server's state after ``round_``."""
        state, meta = read_state(self.server_file(round_))
        if meta["round"] != round_:
            raise RunError(f"this is the state of round {meta['round']}", where=str(self.server_file(round_)))
        return {"shared": {}, **state}

    def store(self, site: str) -> DirectoryStore:
        """Return the store of one simulated site."""
        return DirectoryStore(self.path / "sites" / site, site)

    def last_round(self) -> int:
        """Return the last committed round, 0 when there is none."""
        return max((e["round"] for e in self.events() if e["event"] == "round"), default=0)
