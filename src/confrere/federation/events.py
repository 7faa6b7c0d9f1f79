"""What the journal says of a round: plain numbers and digests, never data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from confrere.federation.transport import Failure
from confrere.method import Reply, Request
from confrere.tensors import State, digest, n_bytes

_DIGEST = re.compile(r"[0-9a-f]{64}")


def begun(round_: int, server: State, requests: Mapping[str, Request]) -> dict[str, Any]:
    """Return the event written ahead of a round: digests of the server's state and of what each site is sent."""
    known: dict[tuple[tuple[str, int], ...], str] = {}  # most methods send all sites the very tensors of the server

    def once(state: State) -> str:
        same = tuple((group, id(tensors)) for group, tensors in state.items())
        if same not in known:
            known[same] = digest(state)
        return known[same]

    sent = {site: once(request.state) for site, request in requests.items()}
    return {"event": "begin", "round": round_, "server": once(server), "requests": sent}


def stored_by(reply: Reply) -> dict[str, str]:
    """Return the digests of state and reply that a site says it stored; nothing where it says anything else."""
    said = {key: reply.metrics.get(key) for key in ("kept", "stored")} if isinstance(reply.metrics, dict) else {}
    return {key: value for key, value in said.items() if isinstance(value, str) and _DIGEST.fullmatch(value)}


def refused_records(
    answers: Iterable[Reply | Failure], requests: Mapping[str, Request], admitted: Sequence[Reply]
) -> dict[str, Any]:
    """Return what the journal keeps of sites whose replies were refused: they have gone on all the same."""
    counted = {reply.site for reply in admitted}
    refused = [a for a in answers if isinstance(a, Reply) and a.site in requests and a.site not in counted]
    return {reply.site: stored_by(reply) for reply in refused}


def brief(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return of an event what the choice of a round and stopping read: a long run must not fill the memory."""
    kept = {key: event[key] for key in ("event", "round", "since", "criterion", "counts") if key in event}
    spent = [s for s, told in event["sites"].items() if told.get("spent")] if event.get("event") == "round" else []
    return {**kept, "spent": spent} if spent else kept


def failure(round_: int, failed: Failure) -> dict[str, Any]:
    """Return the event of a site that gave no answer; an empty site means the server."""
    reason = "; ".join(part for part in (failed.reason, failed.fix) if part)
    return {"event": "failure", "round": round_, "site": failed.site or None, "code": failed.code, "reason": reason}


def evaluation(
    round_: int, replies: Sequence[Reply], requests: Mapping[str, Request], *, counts: bool = True
) -> dict[str, Any]:
    """Return the event of a judged round: the task's score per site, its mean, the criterion of choice, bytes sent."""
    scores = {r.site: r.metrics["score"] for r in replies}
    return {
        "event": "evaluation",
        "round": round_,
        "split": "val",
        "sites": scores,
        "mean": _mean(scores.values()),
        "criterion": _mean(r.metrics["confidence"] for r in replies),
        "received_bytes": {r.site: n_bytes(requests[r.site].state) for r in replies},
        "counts": counts,
    }


def site_record(request: Request, reply: Reply) -> dict[str, Any]:
    """Return what the journal keeps of one site in one round."""
    m = reply.metrics
    return {
        "loss": m.get("loss"),
        "reply": digest(reply.state),
        **stored_by(reply),
        **({"spent": True} if m.get("spent") is True else {}),
        "examples": m["examples"],
        "sent_bytes": n_bytes(reply.state),
        "received_bytes": n_bytes(request.state),
        "seconds": round(m.get("seconds", 0.0), 3),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
