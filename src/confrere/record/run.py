"""A run directory: the only place results live. One process writes it at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from confrere.errors import RunError
from confrere.record import journal
from confrere.record.files import append_bytes, read_state, write_state
from confrere.record.signing import sign
from confrere.record.store import DirectoryStore, round_file, rounds_in
from confrere.tensors import State, digest

LOCKS = {".lock", ".lock-holder"}
BEFORE_TRAINING = ("experiment.toml", "splits.csv", "machine.json", "federation.json")
"""What stands in a run directory before its backbone is loaded."""


class Run:
    """Events, server states and site states of one training of one method.

    A round is committed by its line in ``events.jsonl``; files of a round without that line are redone.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._end = (-1, 0, journal.START)
        self._here: set[str] = set()  # sites whose states lie in this directory

    @property
    def events_file(self) -> Path:
        """Return the journal's file; see :mod:`confrere.record.journal`."""
        return self.path / "events.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process and sweep torn writes; RunError names the process that holds it."""
        holder, lock = self.path / ".lock-holder", FileLock(self.path / ".lock", timeout=0.2)  # :meth:`held` may look
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
            holder.write_text(f"process {os.getpid()}", encoding="utf-8")
            for torn in self.path.rglob(".tmp-*"):  # what a killed process was writing
                torn.unlink()
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            raise RunError(
                f"{who} is using this run", where=str(self.path), fix="wait for it, or stop it", code="run-in-use"
            ) from None
        except OSError as error:
            lock.release()
            what = f"the directory cannot be written: {error.strerror}"
            raise RunError(
                what, where=str(self.path), fix="mend it, or choose another --out", code="cannot-write"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def held(self) -> bool | None:
        """Return whether a process holds the directory; None where none ever did, or where it cannot be seen."""
        try:
            import fcntl

            with (self.path / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once: the file is closed
        except BlockingIOError:
            return True
        except (ImportError, OSError):
            return None
        return False

    def make_new(self) -> None:
        """Make sure that a new run can begin here; what a start that failed before training left is removed.

        Raises:
            RunError: as :meth:`check_new`.
        """
        if self.check_new():
            with self.lock():
                for name in BEFORE_TRAINING:
                    (self.path / name).unlink(missing_ok=True)

    def check_new(self) -> bool:
        """Return whether something is left of a start that failed before training; nothing is changed.

        Raises:
            RunError: a run, or something else, is there.
        """
        if (self.path / "backbone.json").exists():
            fix = f"confrere resume {self.path}, or another --out"
            raise RunError("a run is already there", where=str(self.path), fix=fix, code="not-empty")
        found = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        foreign = {name for name in found - {*LOCKS, *BEFORE_TRAINING} if not name.startswith(".tmp-")}
        if self.path.is_file() or foreign or (found and not found & LOCKS):
            raise RunError(
                "the directory is not empty", where=str(self.path), fix="choose a new --out", code="not-empty"
            )
        return bool(found)

    def events(self) -> list[dict[str, Any]]:
        """Return the journal's events that stand; a last line cut short by a crash is left out.

        Raises:
            RunError: naming the first line that was damaged or changed.
        """
        return journal.standing(journal.read(self.events_file)[0])

    def append(self, *events: dict[str, Any]) -> None:
        """Append events durably, sealed and, where a key is given, signed.

        Of several a kill may leave the first ones only: the last one must be what makes them count.
        """
        size, seq, head = self._tail()
        lines, head = journal.seal(events, seq + 1, head)
        seq += len(events)
        signature = sign(head)
        if signature is not None:
            signed, head = journal.seal([signature], seq + 1, head)
            lines, seq = lines + signed, seq + 1
        append_bytes(self.events_file, size, lines)
        self._end = size + len(lines), seq, head

    def _tail(self) -> tuple[int, int, str]:
        """Return bytes, lines and head of the journal's whole lines; it is read only if another one wrote last."""
        size = self.events_file.stat().st_size if self.events_file.exists() else 0
        if self._end[0] != size:
            whole = journal.content(self.events_file)
            events, head = journal.parse(whole, str(self.events_file))
            self._end = len(whole), len(events), head
        return self._end

    def commit(self, round_: int, server: State, *events: dict[str, Any]) -> None:
        """Write the server's state of a round, then the events, of which the last makes it count."""
        write_state(self.server_file(round_), server, {"round": round_})
        self.append(*events)

    def retain(self, rounds: Collection[int]) -> None:
        """Delete the states that no model of ``rounds`` needs: the server's, and of a site all but its newest each.

        Call it when the newest of ``rounds`` is committed; it deletes nothing newer than that.
        """
        last = max(rounds)
        _delete(self.path / "server", set(rounds), last)
        _delete(self.path / "sums", set(rounds), last)  # of secure aggregation
        for folder in (self.path / "sites").glob("*"):
            written = rounds_in(folder)
            _delete(folder, {max((r for r in written if r <= kept), default=0) for kept in rounds}, last)

    def intact(self, events: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
        """Return the newest round of ``events`` from which the run can go on, and the damaged files, put aside.

        A round will do if its server state and the newest state until then of every site that took part can be read and
        are those of the journal; what came after is done again, to the same bytes: site states of then that can be
        read are used as they are. -1: not even the start can be read.
        """
        last = journal.last_round(events)
        records = {e["round"]: {**e.get("refused", {}), **e["sites"]} for e in events if e["event"] == "round"}
        servers = {e["round"] - 1: e["server"] for e in events if e["event"] == "begin"}
        servers |= {e["round"]: e["server"] for e in events if e["event"] == "round"}
        harmed: list[str] = []
        for site in sorted(self._here):
            for round_ in [r for r in rounds_in(self.store(site).folder) if r > last]:  # of a process that was killed
                self._site_reads(site, round_, {}, harmed)
        for round_ in range(last, -1, -1):
            newest = {s: r for r, sites in sorted(records.items()) if r <= round_ for s in sites if s in self._here}
            good = self._server_reads(round_, servers.get(round_), harmed)
            sites = [self._site_reads(s, round_, records.get(least, {}), harmed, least) for s, least in newest.items()]
            if good and all(sites):
                return round_, harmed
        return -1, harmed

    def _site_reads(self, site: str, until: int, records: Mapping[str, Any], harmed: list[str], least: int = 0) -> bool:
        """Return whether a site's newest state is at least of round ``least``, can be read and is what was recorded."""
        store = self.store(site)
        found = max((r for r in rounds_in(store.folder) if r <= until), default=0)
        file = store.file(found)
        said = records.get(site, {}) if found == least else {}

        def read() -> None:
            state, reply = store.read(found)
            _as_said(file, state, said.get("kept"))
            _as_said(file, reply.state, said.get("stored"))

        return found >= least and self._reads(file, read, harmed)

    def _server_reads(self, round_: int, said: str | None, harmed: list[str]) -> bool:
        file = self.server_file(round_)
        return self._reads(file, lambda: _as_said(file, self.server(round_), said), harmed)

    def _reads(self, file: Path, read: Callable[[], object], harmed: list[str]) -> bool:
        """Return whether a state can be read; one that cannot is renamed, so that nobody takes it for good."""
        if not file.exists():
            return False
        try:
            read()
        except RunError:
            os.replace(file, file.with_suffix(".damaged"))
            harmed.append(str(file.relative_to(self.path)))
            return False
        return True

    def server_file(self, round_: int) -> Path:
        """Return the file of the server's state after ``round_`` (0 = before round 1)."""
        return round_file(self.path / "server", round_)

    def server(self, round_: int) -> State:
        """Return the server's state after ``round_``."""
        state, meta = read_state(self.server_file(round_))
        if meta["round"] != round_:
            what, fix = f"this is the state of round {meta['round']}", "put it back; or delete it, and resume the run"
            raise RunError(what, where=str(self.server_file(round_)), fix=fix, code="state-misplaced")
        return {"shared": {}, **state}

    def store(self, site: str) -> DirectoryStore:
        """Return the store of one simulated site."""
        self._here.add(site)
        return DirectoryStore(self.path / "sites" / site, site)

    def last_round(self) -> int:
        """Return the last committed round, 0 when there is none."""
        return journal.last_round(self.events())


def _as_said(file: Path, state: State, said: str | None) -> None:
    """Refuse a state whose digest is not the one that was ``said``; None says nothing."""
    if said not in (None, digest(state)):
        what, fix = "a state is not the one of the journal", "put it back; or delete it, and resume the run"
        raise RunError(what, where=str(file), fix=fix, code="state-misplaced")


def _delete(folder: Path, kept: Collection[int], last: int) -> None:
    for round_ in rounds_in(folder):
        file = round_file(folder, round_)
        try:
            if round_ <= last and round_ not in kept:
                file.unlink(missing_ok=True)
        except OSError as error:
            what = f"an old state cannot be deleted: {error.strerror}"
            raise RunError(
                what,
                where=str(file),
                fix="mend the permissions, or use record.keep=0; then resume",
                code="cannot-write",
            ) from error
