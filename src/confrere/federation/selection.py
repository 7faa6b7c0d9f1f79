"""Which round is kept, and when to stop: read from the journal's validation scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confrere.method import Method
from confrere.record.journal import last_round
from confrere.record.run import Run


def best_round(events: Sequence[Mapping[str, Any]]) -> int:
    """Return the round of the best validation criterion (the earliest of equals), else the last round.

    The criterion is the mean over sites of the balanced mean probability of the true class. Rounds before the last
    phase of a method do not count, unless there are no others; nor do those before the last site joined, whose means
    are over fewer sites. Where rounds were debited, the last one is kept: a
    choice by validation images would be one more release, which no budget covers.
    """
    if any(e["event"] == "debit" for e in events):
        return last_round(events)
    known = [e for e in events if e["event"] == "evaluation" and e["criterion"] is not None]
    judged = [e for e in known if e.get("counts", True)] or known
    complete = max((e["since"] for e in events if e["event"] == "joined"), default=0)
    judged = [e for e in judged if e["round"] >= complete] or judged
    if judged:
        return int(-max((e["criterion"], -e["round"]) for e in judged)[1])
    return last_round(events)


def should_stop(method: Method, events: Sequence[Mapping[str, Any]], round_: int, *, rounds: int, patience: int) -> str:
    """Return why to stop after this round, or an empty string; see :class:`confrere.federation.loop.Plan`."""
    if not patience or not method.may_stop(round_, rounds) or round_ == rounds:
        return ""
    best = best_round(events)
    since = sum(1 for e in events if e["event"] == "evaluation" and e["round"] > best and e.get("counts", True))
    return f"no better validation criterion since round {best}" if since >= patience else ""


def stopped(events: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the run ended early on purpose."""
    return any(e["event"] == "stop" for e in events)


def tidy(run: Run, events: Sequence[Mapping[str, Any]], round_: int, *, keep: int) -> None:
    """Delete the states but of the last ``keep`` rounds (0: none) and of the best; ``round_`` is committed."""
    if keep:
        run.retain({best_round(events), *range(max(0, round_ + 1 - keep), round_ + 1)})
