"""Where a run goes on: after the last round whose states can all be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from confrere.record.journal import last_round
from confrere.record.run import Run
from confrere.tensors import State


def begin(
    run: Run, written: list[dict[str, Any]], server: State, notify: Callable[[dict[str, Any]], None]
) -> tuple[int, State]:
    """Return the last round that is done and the server's state after it; what cannot be read is done again.

    A fallback is added to ``written``, the journal's events.
    """
    last = last_round(written)
    done, harmed = run.intact(written)
    if harmed or (last and done < last):
        event = {"event": "fallback", "to": max(done, 0), "from": last, "damaged": harmed}
        run.append(event)
        written.append(event)
        notify(event)
    if done >= 0:
        return done, run.server(done)
    run.commit(0, server)
    return 0, server
