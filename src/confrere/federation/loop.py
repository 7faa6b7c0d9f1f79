"""The round loop: sample, exchange, aggregate, judge on validation data, commit. There is no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confrere.errors import RunError
from confrere.federation.diagnostics import round_diagnostics
from confrere.federation.transport import Failure, Transport
from confrere.method import Method, Reply, Request
from confrere.record.run import Run
from confrere.seeds import numpy_generator
from confrere.tensors import State, n_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many rounds, who takes part, and who judges.

    Args:
        rounds: at most so many. seed: of the run. fraction: of sites sampled a round, in (0, 1].
        min_replies: fewer answers than this leave the server as it was.
        every: judge on validation data every so many rounds. patience: stop after so many judgements without a
            better one; 0 never stops early.
        train: sites asked to train; None for all. judge: sites asked to evaluate; None for all.
    """

    rounds: int
    seed: int = 0
    fraction: float = 1.0
    min_replies: int = 1
    every: int = 1
    patience: int = 0
    train: tuple[str, ...] | None = None
    judge: tuple[str, ...] | None = None


def federate(
    method: Method,
    server: State,
    transport: Transport,
    plan: Plan,
    run: Run,
    notify: Callable[[dict[str, Any]], None] = lambda event: None,
) -> State:
    """Run rounds until the plan ends; continue after the last committed round of ``run``.

    Raises:
        RunError: in some round no site answered; the server's state of the round before stands.
    """
    done, journal = run.last_round(), run.events()
    if done:
        server = run.server(done)
    else:
        run.commit(0, server)
    for round_ in range(done + 1, plan.rounds + 1):
        if stopped(journal):
            break
        server, events = one_round(method, server, transport, plan, round_)
        reason = should_stop(method, [*journal, *events], plan, round_)
        if reason:
            events.append({"event": "stop", "round": round_, "reason": reason})
        run.commit(round_, server, *events)
        journal += events
        for event in events:
            notify(event)
    return server


def one_round(
    method: Method, server: State, transport: Transport, plan: Plan, round_: int
) -> tuple[State, list[dict[str, Any]]]:
    """Return the server's state after a round, and the round's events.

    Raises:
        RunError: every willing site was asked and none answered. Where only some were asked, the round is lost.
    """
    started = time.perf_counter()
    willing = [s for s in transport.sites() if plan.train is None or s in plan.train]
    cohort = sample(willing, plan.fraction, plan.seed, round_)
    requests = {s: Request(kind="train", round=round_, state=method.broadcast(server, s)) for s in cohort}
    replies, failures = sorted_answers(transport.exchange(requests))
    if not replies and len(cohort) == len(willing):
        raise RunError(
            f"0 of {len(cohort)} sites answered: " + "; ".join(f"{f.site}: {f.reason}" for f in failures),
            where=f"round {round_}",
            fix="; ".join(dict.fromkeys(f.fix for f in failures if f.fix)),
        )
    enough = len(replies) >= max(1, plan.min_replies)
    updated = method.aggregate(server, replies) if enough else server
    judged, unjudged, received = judge(method, updated, transport, plan, round_)
    after = {r.site: r.metrics["overlap"] for r in judged}
    events = [failure(round_, f) for f in [*failures, *unjudged]]
    if not enough:
        reason = f"{len(replies)} of {plan.min_replies} needed replies came: nothing was averaged"
        events.append(failure(round_, Failure("", reason)))
    events.append(
        {
            "event": "round",
            "round": round_,
            "seconds": round(time.perf_counter() - started, 3),
            "sites": {r.site: site_record(requests[r.site], r) for r in replies},
            "diagnostics": round_diagnostics(server["shared"], updated["shared"], replies, after),
        }
    )
    counts = method.may_stop(round_, plan.rounds)
    return updated, events + ([evaluation(round_, judged, received, counts=counts)] if judged else [])


def cohort_size(fraction: float, sites: int) -> int:
    """Return how many of ``sites`` are asked a round, at least one."""
    return max(1, round(fraction * sites))


def sample(sites: Sequence[str], fraction: float, seed: int, round_: int) -> list[str]:
    """Return the sites of a round, sorted; all of them when ``fraction`` is 1."""
    count = cohort_size(fraction, len(sites))
    chosen = numpy_generator(seed, "cohort", round_).permutation(len(sites))[:count]
    return sorted(sites[i] for i in chosen)


def judge(
    method: Method, server: State, transport: Transport, plan: Plan, round_: int
) -> tuple[list[Reply], list[Failure], dict[str, int]]:
    """Return validation replies and who gave none, both sorted, and bytes sent to each; nothing in other rounds."""
    if round_ % plan.every and round_ != plan.rounds:
        return [], [], {}
    sites = [s for s in transport.sites() if plan.judge is None or s in plan.judge]
    requests = {s: Request(kind="evaluate", round=round_, state=method.broadcast(server, s)) for s in sites}
    sizes = {site: n_bytes(request.state) for site, request in requests.items()}
    return *sorted_answers(transport.exchange(requests)), sizes


def sorted_answers(answers: Iterable[Reply | Failure]) -> tuple[list[Reply], list[Failure]]:
    """Return replies and failures apart, each sorted by site: the order of a sum decides its last bit."""
    found = sorted(answers, key=lambda a: a.site)
    return [a for a in found if isinstance(a, Reply)], [a for a in found if isinstance(a, Failure)]


def failure(round_: int, failed: Failure) -> dict[str, Any]:
    """Return the event of a site that gave no answer; an empty site means the server."""
    reason = "; ".join(part for part in (failed.reason, failed.fix) if part)
    return {"event": "failure", "round": round_, "site": failed.site or None, "reason": reason}


def evaluation(
    round_: int, replies: Sequence[Reply], received: Mapping[str, int], *, counts: bool = True
) -> dict[str, Any]:
    """Return the event of a judged round: balanced accuracy per site, its mean, the criterion of choice, bytes sent."""
    scores = {r.site: r.metrics["score"] for r in replies}
    return {
        "event": "evaluation",
        "round": round_,
        "split": "val",
        "sites": scores,
        "mean": _mean(scores.values()),
        "criterion": _mean(r.metrics["confidence"] for r in replies),
        "received_bytes": {r.site: received[r.site] for r in replies},
        "counts": counts,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def best_round(events: Sequence[Mapping[str, Any]]) -> int:
    """Return the round of the best validation criterion (the earliest of equals), else the last round.

    The criterion is the mean over sites of the balanced mean probability of the true class. Rounds before the last
    phase of a method do not count, unless there are no others.
    """
    known = [e for e in events if e["event"] == "evaluation" and e["criterion"] is not None]
    judged = [e for e in known if e.get("counts", True)] or known
    if judged:
        return int(-max((e["criterion"], -e["round"]) for e in judged)[1])
    return max((e["round"] for e in events if e["event"] == "round"), default=0)


def should_stop(method: Method, events: Sequence[Mapping[str, Any]], plan: Plan, round_: int) -> str:
    """Return why to stop after this round, or an empty string."""
    if not plan.patience or not method.may_stop(round_, plan.rounds) or round_ == plan.rounds:
        return ""
    best = best_round(events)
    since = sum(1 for e in events if e["event"] == "evaluation" and e["round"] > best and e.get("counts", True))
    return f"no better validation criterion since round {best}" if since >= plan.patience else ""


def stopped(events: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the run ended early on purpose."""
    return any(e["event"] == "stop" for e in events)


def site_record(request: Request, reply: Reply) -> dict[str, Any]:
    """Return what the journal keeps of one site in one round."""
    m = reply.metrics
    return {
        "loss": m.get("loss"),
        "examples": m["examples"],
        "sent_bytes": n_bytes(reply.state),
        "received_bytes": n_bytes(request.state),
        "seconds": round(m.get("seconds", 0.0), 3),
    }
