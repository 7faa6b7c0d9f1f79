"""The round loop: sample, exchange, aggregate, judge on validation data, commit. There is no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from confrere.errors import RunError
from confrere.federation.budget import Budget
from confrere.federation.defence import Defence, combine
from confrere.federation.diagnostics import round_diagnostics
from confrere.federation.events import begun, brief, evaluation, failure, refused_records, site_record
from confrere.federation.gate import Gate
from confrere.federation.ledger import all_spent
from confrere.federation.recovery import begin
from confrere.federation.sampling import Sampling, sample
from confrere.federation.selection import should_stop, stopped, tidy
from confrere.federation.transport import Failure, Transport
from confrere.method import Method, Reply, Request
from confrere.record.run import Run
from confrere.tensors import State, digest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many rounds, who takes part, and who judges.

    Args:
        rounds: at most so many. seed: of the run. fraction: of sites sampled a round, in (0, 1].
        min_replies: fewer answers than this leave the server as it was.
        every: judge on validation data every so many rounds. patience: stop after so many judgements without a
            better one; 0 never stops early.
        run: stamp of all messages. keep: delete states but of so many last rounds and the best one; 0 keeps all.
        train: sites asked to train; None for all. judge: sites asked to evaluate; None for all.
        sampling: see :func:`confrere.federation.sampling.sample`. budget: ends the run before a round it does not
            cover.
    """

    rounds: int
    seed: int = 0
    fraction: float = 1.0
    min_replies: int = 1
    every: int = 1
    patience: int = 0
    run: str = ""
    keep: int = 0
    train: tuple[str, ...] | None = None
    judge: tuple[str, ...] | None = None
    sampling: Sampling = "fixed"
    budget: Budget | None = None


def federate(
    method: Method,
    server: State,
    transport: Transport,
    plan: Plan,
    run: Run,
    notify: Callable[[dict[str, Any]], None] = lambda event: None,
    *,
    gate: Gate | None = None,
    defence: Defence | None = None,
) -> State:
    """Run rounds until the plan ends; continue after the last committed round of ``run`` that can be read.

    Raises:
        RunError: in some round no site answered; the server's state of the round before stands. Or the budget was
            spent before any round was committed.
    """
    gate, defence = gate or Gate(method=method, run=plan.run), defence or Defence()
    written = run.events()
    done, server = begin(run, written, server, notify)
    journal = [brief(e) for e in written if e.get("round", 0) <= done]
    newest = written[-1:]
    tidy(run, journal, done, keep=plan.keep)
    for round_ in range(done + 1, plan.rounds + 1):
        if stopped(journal):
            break
        spent = plan.budget.stops(run, round_) if plan.budget else None
        if spent:
            run.append(spent)
            notify(spent)
            break
        cohort = sample(willing_sites(transport, plan), plan.fraction, plan.seed, round_, plan.sampling, plan.train)
        requests = ask("train", cohort, method, server, plan, round_)
        intent = begun(round_, server, requests)
        if newest != [intent]:  # else a process that was killed wrote it, and nothing more
            run.append(intent)
        newest = []
        server, events = one_round(method, server, requests, round_, transport, plan, gate, defence, run)
        journal += map(brief, events)
        reason = should_stop(method, journal, round_, rounds=plan.rounds, patience=plan.patience)
        reason = reason or all_spent(journal, willing_sites(transport, plan))
        if reason:
            events.insert(0, {"event": "stop", "round": round_, "reason": reason})
            journal.append(brief(events[0]))
        run.commit(round_, server, *events)
        tidy(run, journal, round_, keep=plan.keep)
        for event in events:
            notify(event)
    return server


def ask(
    kind: Literal["train", "evaluate"], sites: Sequence[str], method: Method, server: State, plan: Plan, round_: int
) -> dict[str, Request]:
    """Return what each of ``sites`` is asked."""
    return {s: Request(kind=kind, run=plan.run, round=round_, state=method.broadcast(server, s)) for s in sites}


def willing_sites(transport: Transport, plan: Plan) -> list[str]:
    """Return the sites that may be asked to train."""
    return [s for s in transport.sites() if plan.train is None or s in plan.train]


def one_round(
    method: Method,
    server: State,
    requests: Mapping[str, Request],
    round_: int,
    transport: Transport,
    plan: Plan,
    gate: Gate,
    defence: Defence,
    run: Run,
) -> tuple[State, list[dict[str, Any]]]:
    """Return the server's state after a round, and the round's events; what it releases is debited beforehand.

    Raises:
        RunError: every willing site was asked and none answered. Where only some were asked, the round is lost.
    """
    started = time.perf_counter()
    came = (defence if requests else Defence()).collect(transport, requests, gate)  # nobody may have been drawn
    replies, failures = came.replies, came.failures
    if not replies and not came.lost and len(requests) == len(willing_sites(transport, plan)):
        raise RunError(
            f"0 of {len(requests)} sites answered: " + "; ".join(f"{f.site}: {f.reason}" for f in failures),
            where=f"round {round_}",
            fix="; ".join(dict.fromkeys(f.fix for f in failures if f.fix)),
            code="no-replies",
        )
    if released := method.release():
        run.append({"event": "debit", "round": round_, **released})
    updated, left_out = combine(method, server, requests, replies, defence, plan.min_replies, came.total)
    failures = [*failures, *left_out]
    missing = ""
    if updated is None:
        left = len(replies) - len(left_out)
        updated, missing = server, f"{left} of {plan.min_replies} needed replies are left: nothing was averaged"
    judged, unjudged, asked = judge(method, updated, transport, plan, gate, round_)
    after = {r.site: r.metrics["overlap"] for r in judged}
    events = [failure(round_, f) for f in [*failures, *unjudged]]
    if missing:
        events.append(failure(round_, Failure("", missing, code="quorum")))
    if judged:
        events.append(evaluation(round_, judged, asked, counts=method.may_stop(round_, plan.rounds)))
    events.append(  # the last: it makes the others count
        {
            "event": "round",
            "round": round_,
            "seconds": round(time.perf_counter() - started, 3),
            "server": digest(updated),
            "averaged": not missing,
            "sites": {r.site: site_record(came.requests[r.site], r) for r in replies},
            "refused": refused_records(came.answers, requests, replies),
            "diagnostics": round_diagnostics(server["shared"], updated["shared"], replies, after, released),
            **came.record,
        }
    )
    return updated, events


def judge(
    method: Method, server: State, transport: Transport, plan: Plan, gate: Gate, round_: int
) -> tuple[list[Reply], list[Failure], dict[str, Request]]:
    """Return validation replies and who gave none, both sorted, and what each was asked; nothing in other rounds."""
    if round_ % plan.every and round_ != plan.rounds:
        return [], [], {}
    sites = [s for s in transport.sites() if plan.judge is None or s in plan.judge]
    requests = ask("evaluate", sites, method, server, plan, round_)
    return *gate.admit(requests, transport.exchange(requests)), requests
