"""A fault injector outside the product: it wraps calls of the operating system, and public functions by their name.

    python tests/reliability/faults.py [--under DIR] [--log FILE] FAULTS -- run DATA --out RUN ...

runs the command line with faults. A fault is ``ACTION[=VALUE]:POINT:K`` and strikes when POINT is reached the K-th time
(``K+``: then and ever after); several are parted by commas; ``none`` only counts.

ACTION  ``kill`` (SIGKILL before the call), ``kill-after``, ``int`` and ``term`` (Ctrl-C, SIGTERM), ``stop`` and
        ``stop-after`` (:class:`Stopped`: nothing after it happens, for tests in one process), ``sleep=SECONDS``,
        ``raise`` (a site that fails, as TrainingError), ``crash`` (RuntimeError), ``ENOSPC``, ``EIO``, ... (OSError;
        a write leaves half of its bytes), ``cut=N`` and ``flip=N`` (a disk that lies: the last N bytes of a write are
        lost, or bit N of it turns).
POINT   one of FILES, counted only for paths under DIR (``open``: to write, or a directory; ``read``: to be read), or
        one of PHASES.

``--log`` appends a line of JSON for every phase that is reached, so that a parent knows what was done before a kill.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}
FILES = ("open", "read", "write", "fsync", "replace", "mkdir", "unlink")


class Stopped(BaseException):
    """What ``stop`` raises: no code but clean-up runs after it."""


@dataclass(frozen=True)
class Fault:
    action: str
    value: float
    point: str
    first: int
    lasting: bool

    @classmethod
    def parse(cls, text: str) -> Fault:
        what, point, k = text.split(":")
        action, _, value = what.partition("=")
        known = {*SIGNALS, "stop", "sleep", "raise", "crash", "cut", "flip"}
        if action.removesuffix("-after") not in known and not hasattr(errno, action):
            raise ValueError(f"no such action: {action}")
        if point not in FILES and point not in {phase.point for phase in PHASES}:
            raise ValueError(f"no such point: {point}")
        return cls(action, float(value or 0), point, int(k.removesuffix("+")), k.endswith("+"))

    def strike(self, path: str) -> None:
        """Do what the action says; ``cut`` and ``flip`` are left to the write."""
        name = self.action.removesuffix("-after")
        if name in SIGNALS:
            os.kill(os.getpid(), SIGNALS[name])
            if name == "kill":
                time.sleep(60)  # nothing after it happens, even if the signal takes its time
        elif name == "stop":
            raise Stopped
        elif name == "sleep":
            time.sleep(self.value)
        elif name == "raise":
            from confrere.errors import TrainingError

            raise TrainingError("injected", where=path, fix="none: a test")
        elif name == "crash":
            raise RuntimeError("injected")
        elif hasattr(errno, name):
            number = getattr(errno, name)
            raise OSError(number, os.strerror(number), path)


Note = Callable[..., dict[str, Any] | None]


def _asked(kind: str, split: str = "") -> Note:
    def note(site: Any, request: Any) -> dict[str, Any] | None:
        right = request.kind == kind and (kind == "train" or request.split == split)
        return {"site": site.name, "round": request.round} if right else None

    return note


def _learning(method: Any, learner: Any, *_: Any) -> dict[str, Any]:
    return {"site": learner.site, "round": learner.round}


def _round(run: Any, round_: int, *_: Any, **__: Any) -> dict[str, Any]:
    return {"round": round_}


@dataclass(frozen=True)
class Phase:
    """A point of the product, by name: ``function`` is ``module:attribute``; ``*`` stands for every method's class."""

    point: str
    function: str
    after: bool = False
    note: Note = lambda *_, **__: {}


PHASES = (
    Phase("data", "confrere.job:open_data"),
    Phase("loading", "confrere.job:prepare"),
    Phase("prefix", "confrere.job:tokens"),
    Phase("loaded", "confrere.job:prepare", after=True),
    Phase("task", "confrere.federation.site:Site.handle", note=_asked("train")),
    Phase("step", "confrere.optimiser:AdamW.step"),
    Phase("trained", "*:update", after=True, note=_learning),
    Phase("before_upload", "confrere.record.store:DirectoryStore.write"),
    Phase("kept", "confrere.record.store:DirectoryStore.write", after=True),
    Phase("after_upload", "confrere.federation.site:Site.handle", after=True, note=_asked("train")),
    Phase("aggregate", "*:aggregate"),
    Phase("aggregated", "*:aggregate", after=True),
    Phase("judge", "confrere.federation.site:Site.handle", note=_asked("evaluate", "val")),
    Phase("commit", "confrere.record.run:Run.commit"),
    Phase("journal", "confrere.record.run:Run.append"),
    Phase("committed", "confrere.record.run:Run.commit", after=True, note=_round),
    Phase("examine", "confrere.federation.site:Site.handle", note=_asked("evaluate", "test")),
    Phase("export", "confrere.job:export_adapters"),
    Phase("export_file", "confrere.export:write_files"),
    Phase("exported", "confrere.job:export_adapters", after=True),
    Phase("report", "confrere.report:write_report"),
    Phase("report_file", "confrere.report:_write"),
)
_LATE = {"report", "report_file"}
"""Their modules take seconds to import, which a run that writes no report does not pay."""


class Faults:
    """Wraps calls while it is entered; ``counts`` says how often each point was reached."""

    def __init__(self, text: str = "none", *, under: Path | None = None, log: Path | None = None) -> None:
        self.faults = [Fault.parse(part) for part in text.split(",") if part != "none"]
        self.under = os.path.realpath(under) if under else None
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[str, str]] = []
        self._undo: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._within = threading.local()
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if log else -1
        self._write = os.write

    def note(self, point: str, **more: Any) -> None:
        """Append a line to the log, whole even if the process is killed right after it."""
        if self._log >= 0:
            self._write(self._log, (json.dumps({"point": point, "t": time.monotonic(), **more}) + "\n").encode())

    def reach(self, point: str, path: str = "", *, after: bool = False) -> Fault | None:
        """Count ``point`` (not ``after``) and strike; return the fault a write itself must carry out."""
        with self._lock:
            if not after:
                self.counts[point] += 1
                if point in FILES:
                    self.calls.append((point, path))
            n = self.counts[point]
        struck = None
        for fault in self.faults:
            due = n == fault.first or (fault.lasting and n > fault.first)
            if fault.point == point and due and fault.action.endswith("-after") == after:
                fault.strike(path)
                struck = fault
        return struck

    def path_of(self, file: Any) -> str | None:
        """Return the path of a file or descriptor if it counts, else None."""
        try:
            name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
        except (OSError, TypeError):
            return None
        inside = self.under is None or name == self.under or name.startswith(self.under + os.sep)
        return name if inside else None

    def __enter__(self) -> Faults:
        for name, target in (("fsync", 0), ("replace", 1), ("mkdir", 0), ("unlink", 0), ("open", 0)):
            self._wrap(os, name, self._file_call(name, getattr(os, name), target))
        opened = self._opener(io.open)
        self._wrap(io, "open", opened)
        self._wrap(builtins, "open", opened)
        asked = {fault.point for fault in self.faults}
        for phase in PHASES:
            if phase.point not in _LATE or phase.point in asked:
                self._patch(phase)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self._log >= 0:
            os.close(self._log)

    def _wrap(self, owner: Any, name: str, new: Any) -> None:
        old = vars(owner)[name]
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, new)

    def _file_call(self, point: str, real: Callable[..., Any], target: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = self.path_of(args[target])
            if path is None:
                return real(*args, **kwargs)
            reads = point == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(path)
            self.reach("read" if reads else point, path)
            found = real(*args, **kwargs)
            self.reach("read" if reads else point, path, after=True)
            return found

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            path = self.path_of(file)
            if path is None:
                return real(file, mode, buffering, *args, **kwargs)
            if not isinstance(file, int):  # a descriptor was counted when it was opened
                self.reach("open" if set(mode) & set("wax+") else "read", path)
            if "+" in mode or not set(mode) & set("wax"):
                return real(file, mode, buffering, *args, **kwargs)
            names = dict(zip(("encoding", "errors", "newline", "closefd", "opener"), args, strict=False)) | kwargs
            raw = _Disk(file, mode.strip("bt"), names.pop("closefd", True), names.pop("opener", None))
            raw.faults, raw.path = self, path
            if buffering == 0:
                return raw
            text = {"encoding": names.get("encoding") or "utf-8", **{k: names.get(k) for k in ("errors", "newline")}}
            return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), **text)

        return opened

    def _patch(self, phase: Phase) -> None:
        module, _, attribute = phase.function.partition(":")
        if module == "*":
            importlib.import_module("confrere.methods")  # fills the registry
            from confrere.method import METHODS

            classes = dict.fromkeys(base for method in METHODS.values() for base in method.__mro__)
            owners = [base for base in classes if attribute in vars(base)]
        else:
            *outer, attribute = attribute.split(".")
            owner: Any = importlib.import_module(module)
            owners = [getattr(owner, outer[0]) if outer else owner]
        for owner in owners:
            self._wrap(owner, attribute, self._phase_call(phase, vars(owner)[attribute]))

    def _phase_call(self, phase: Phase, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = phase.note(*args, **kwargs)
            if found is None or getattr(self._within, phase.point, False):  # another's turn, or super()'s call
                return real(*args, **kwargs)
            setattr(self._within, phase.point, True)
            try:
                if not phase.after:
                    self.note(phase.point, **found)
                    self.reach(phase.point, phase.function)
                result = real(*args, **kwargs)
                if phase.after:
                    self.note(phase.point, **found)
                    self.reach(phase.point, phase.function)
                return result
            finally:
                setattr(self._within, phase.point, False)

        return call


class _Disk(io.FileIO):
    """A file whose writes may fail half-way, or lie."""

    faults: Faults
    path: str

    def write(self, data: Any) -> int:
        whole = bytes(data)
        try:
            fault = self.faults.reach("write", self.path)
        except OSError:
            super().write(whole[: len(whole) // 2])
            raise
        done: int = super().write(_lie(fault, whole)) if fault else super().write(whole)
        self.faults.reach("write", self.path, after=True)
        return len(whole) if fault else done


def _lie(fault: Fault, whole: bytes) -> bytes:
    if fault.action == "cut":
        return whole[: max(0, len(whole) - int(fault.value))]
    if fault.action == "flip":
        changed = bytearray(whole)
        changed[int(fault.value) // 8 % len(whole)] ^= 1 << int(fault.value) % 8
        return bytes(changed)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--under", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("faults")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
    sys.argv = ["confrere", *args.command[args.command[:1] == ["--"] :]]
    with Faults(args.faults, under=args.under, log=args.log) as faults:
        faults.note("ready")
        from confrere.cli import main as confrere

        try:
            confrere()
        finally:
            faults.note("end", counts=dict(faults.counts))


if __name__ == "__main__":
    main()
