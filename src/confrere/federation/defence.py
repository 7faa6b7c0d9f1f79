"""What stands between the gate and a method's own aggregation: one gauge for all factors, then a robust rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from confrere.adapters.gauge import canonical
from confrere.errors import UpdateRefusedError
from confrere.federation.gate import Gate
from confrere.federation.robust import robust
from confrere.federation.transport import Failure, Transport
from confrere.method import Method, Reply, Request
from confrere.tensors import State


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What came of a round's requests.

    Args:
        requests: all that each site was sent in this round.
        answers: as they came, at first.
        replies: those that count, sorted by site.
        failures: of sites, or of the server.
        total: where the server sees only a sum: the one reply the method shall see instead of ``replies``.
        record: what the journal's round says besides.
        lost: whether sound answers came, but too few to show anything of them.
    """

    requests: Mapping[str, Request]
    answers: Sequence[Reply | Failure]
    replies: list[Reply]
    failures: list[Failure]
    total: Reply | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Defence:
    """How the server guards its average; see :class:`confrere.choices.FederationChoice`. By default not at all."""

    rule: str = "mean"
    byzantine: int = 0
    canonical: bool = False

    def collect(self, transport: Transport, requests: Mapping[str, Request], gate: Gate) -> Collected:
        """Send each site its request and let what comes back pass the gate."""
        answers = transport.exchange(requests)
        replies, failures = gate.admit(requests, answers)
        return Collected(requests=requests, answers=answers, replies=replies, failures=failures)

    def __call__(
        self, received: Mapping[str, State], replies: Sequence[Reply]
    ) -> tuple[Sequence[Reply], list[Failure]]:
        """Return the replies as the method shall see them, and who was left out; ``received`` is what each site got."""
        failures: list[Failure] = []
        if self.canonical:
            replies, failures = _in_one_gauge(received, replies)
        if self.rule != "mean":
            left = robust(self.rule, self.byzantine, received, replies)
            gone = sorted({r.site for r in replies} - {r.site for r in left})
            failures += [Failure(site, f"left out by federation.rule={self.rule}", code="rule") for site in gone]
            replies = left
        return replies, failures


def _in_one_gauge(received: Mapping[str, State], replies: Sequence[Reply]) -> tuple[list[Reply], list[Failure]]:
    alike, failures = [], []
    for reply in replies:
        got = received[reply.site]
        try:
            state = {group: canonical(tensors, got.get(group, {})) for group, tensors in reply.state.items()}
        except UpdateRefusedError as error:
            failures.append(Failure(reply.site, error.reason, error.fix, error.code))
        else:
            alike.append(replace(reply, state=state))
    return alike, failures


def combine(
    method: Method,
    server: State,
    requests: Mapping[str, Request],
    replies: Sequence[Reply],
    defence: Defence,
    needed: int,
    total: Reply | None = None,
) -> tuple[State | None, list[Failure]]:
    """Return the server's new state from replies sorted by site, and whom the defence left out.

    None instead of a state: fewer than ``needed`` replies came or are left. None are needed where nobody was asked, and
    for a method whose aggregate hides how many there were. ``total`` stands for all replies where only their sum is
    known.
    """
    needed = max(1, needed) if requests and not method.release() else 0
    if len(replies) < needed:
        return None, []
    if total is not None:
        return method.aggregate(server, [total]), []
    if not replies:
        return (method.aggregate(server, []) if method.release() else server), []
    left, failures = defence({reply.site: requests[reply.site].state for reply in replies}, replies)
    return (method.aggregate(server, left) if len(left) >= needed else None), failures
