"""What stands between the gate and a method's own aggregation: one gauge for all factors, then a robust rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from confrere.adapters.gauge import canonical
from confrere.errors import UpdateRefusedError
from confrere.federation.robust import robust
from confrere.federation.transport import Failure
from confrere.method import Method, Reply, Request
from confrere.tensors import State


@dataclass(frozen=True, kw_only=True)
class Defence:
    """How the server guards its average; see :class:`confrere.choices.FederationChoice`. By default not at all."""

    rule: str = "mean"
    byzantine: int = 0
    canonical: bool = False

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
) -> tuple[State | None, list[Failure]]:
    """Return the server's new state from replies sorted by site, and whom the defence left out.

    None instead of a state: fewer than ``needed`` replies came or are left.
    """
    if len(replies) < max(1, needed):
        return None, []
    left, failures = defence({reply.site: requests[reply.site].state for reply in replies}, replies)
    return (method.aggregate(server, left) if len(left) >= max(1, needed) else None), failures
