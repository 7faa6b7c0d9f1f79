"""The gate before every aggregation: who breaks a rule is left out by name, and the round goes on without it.

Each answer alone comes first (stamps, then :mod:`confrere.federation.checks`), then sizes compared between sites. What
passes may still be wrong: a flipped sign has a usual size. For that see :mod:`confrere.federation.robust`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from confrere.adapters.names import side_of
from confrere.data.paths import SLUG
from confrere.errors import UpdateRefusedError
from confrere.federation.checks import SAME, check_groups, check_metrics, check_tensors, check_weight, shown
from confrere.federation.transport import Failure
from confrere.method import Method, Reply, Request
from confrere.tensors import State, digest

COMPARED = 3
"""Sizes are compared when so many sites sent something: of two nobody can say which one is wrong."""
ROUNDING = 1e-6
"""A change below this share of what is sent may be rounding: the median counts as at least that."""
Part = tuple[str, str, bool]
FACTORS = {"A": "the factors A", "B": "the factors B"}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What an answer must be to be combined with others.

    Args:
        method: says which groups may come.
        run: stamp of the run, which every answer carries.
        expected: what a site should send, given its name and request: :meth:`confrere.method.Method.payload`. Without
            it names, shapes and dtypes are not checked.
        weights: the registered weight of every site; without it any positive number will do.
        norm: a site's change may be so many times the median of all sites' changes, all tensors together and those
            that are no adapter's; 0 does not compare. See :func:`sizes`.
        factor: the same for all factors A, and for all factors B: a pair ``(c A, B / c)`` has the same product.
    """

    method: Method
    run: str = ""
    expected: Callable[[str, Request], State] | None = None
    weights: Mapping[str, float] | None = None
    norm: float = 8.0
    factor: float = 8.0

    def admit(
        self, requests: Mapping[str, Request], answers: Iterable[Reply | Failure]
    ) -> tuple[list[Reply], list[Failure]]:
        """Return the replies that may be combined, and all failures, both sorted by site; nothing is raised.

        Of equal answers one counts. Different answers of one site to one request are refused, all of them.
        """
        came, failures = defaultdict[str, list[Reply]](list), set[Failure]()
        for answer in answers:
            failed = stamped(answer, requests, self.run)
            if failed is not None:
                failures.add(failed)
            else:
                came[answer.site].append(answer)  # type: ignore[arg-type]  # a Failure is one
        sound, wrong = [], dict[str, UpdateRefusedError]()
        for site, same in sorted(came.items()):
            reasons = self._reasons(requests[site], same)
            if reasons:
                wrong[site] = reasons[0]
            else:
                sound.append(same[0])
        wrong |= self._far(requests, sound)
        failures |= {Failure(site, error.reason, error.fix, error.code) for site, error in wrong.items()}
        replies = [reply for reply in sound if reply.site not in wrong]
        return replies, sorted(failures, key=lambda failed: (failed.site, failed.reason, failed.fix))

    def _reasons(self, request: Request, same: Sequence[Reply]) -> list[UpdateRefusedError]:
        """Return why the answers of one site to one request are refused."""
        form: State | None = {}  # judgements hold metrics alone
        if request.kind == "train":
            form = self.expected(same[0].site, request) if self.expected is not None else None
        wrong = [found for reply in same if (found := self._reason(request, reply, form))]
        if not wrong and len(same) > 1 and len(set(map(content, same))) > 1:
            fix = "let one process answer for a site"
            wrong = [UpdateRefusedError("different answers came to one request", fix=fix, code="update-twice")]
        return sorted(wrong, key=lambda error: error.reason)

    def _reason(self, request: Request, reply: Reply, form: State | None) -> UpdateRefusedError | None:
        """Return why one answer is refused, None if it is not; what cannot even be looked at is."""
        try:
            if request.kind == "train":
                check_weight(reply.weight, self.weights, reply.site)
            check_metrics(reply.metrics, request)
            check_groups(reply.state, self.method, form)
            for group, tensors in reply.state.items():
                check_tensors(group, tensors, None if form is None else form[group], unequal=self.method.unequal)
            if form and not self.method.plausible(reply.state):
                raise UpdateRefusedError("a number that is no weight cannot be meant", fix=SAME, code="update-values")
            if request.kind == "train" and not self.method.admissible(reply.state, request.state):
                raise UpdateRefusedError("the change is longer than the method allows", fix=SAME, code="update-size")
        except UpdateRefusedError as error:
            return error
        except Exception as error:  # of an object that only looks like plain data
            what = f"the answer cannot be read ({shown(type(error).__name__)})"
            return UpdateRefusedError(what, fix=SAME, code="update-form")
        return None

    def _far(self, requests: Mapping[str, Request], replies: Sequence[Reply]) -> dict[str, UpdateRefusedError]:
        """Return the sites whose change is far larger than the median, and where."""
        of: dict[Part, dict[str, tuple[float, float]]] = defaultdict(dict)
        trained = [reply for reply in replies if requests[reply.site].kind == "train"]
        for reply in trained if len(trained) >= COMPARED and max(self.norm, self.factor) > 0 else ():
            for key, both in sizes(reply.state, requests[reply.site].state, self.method.sends).items():
                of[key][reply.site] = both
        found: dict[str, UpdateRefusedError] = {}
        for (group, part, _), each in of.items():
            times = self.factor if part in FACTORS.values() else self.norm
            if len(each) < COMPARED or times <= 0:
                continue
            changes, sent = zip(*each.values(), strict=True)
            most = times * max(median(changes), ROUNDING * median(sent))
            what = f"the change of {part} is above {times:g} times the median of {len(each)} sites"
            fix = "look at the training of this site"
            error = UpdateRefusedError(what, where=f"group {group}", fix=fix, code="update-size")
            found |= {site: error for site, (change, _) in each.items() if change > most and site not in found}
        return found


def stamped(answer: object, requests: Mapping[str, Request], run: str) -> Failure | None:
    """Return the failure that an answer is, or is by its stamps; None for a reply to one of ``requests``."""
    site = getattr(answer, "site", None)
    if not isinstance(site, str) or (site not in requests and not SLUG.fullmatch(site)):
        return Failure("", "an answer came under no valid name of a site", "find out who sent it", code="update-stamp")
    if isinstance(answer, Failure):
        return Failure(site, shown(answer.reason, 500), shown(answer.fix, 500), shown(answer.code))
    if site not in requests:
        return Failure(
            site, "an answer came from a site that was not asked", "find out who sent it", code="update-stamp"
        )
    if not isinstance(answer, Reply):
        return Failure(site, "an answer is no reply", SAME, code="update-form")
    if not isinstance(answer.run, str) or answer.run != run:
        return Failure(site, "an answer belongs to another run", "start the site for this run", code="update-stamp")
    if type(answer.round) is not int or answer.round != requests[site].round:
        what = "an answer belongs to another round"
        return Failure(site, what, "nothing to do if it came late or twice", code="update-stamp")
    return None


def content(reply: Reply) -> tuple[str, float, str]:
    """Return what makes two sound answers the same: payload, weight, and metrics but for the time it took."""
    metrics = {key: value for key, value in reply.metrics.items() if key != "seconds"}
    return digest(reply.state), reply.weight, json.dumps(metrics, sort_keys=True, default=dict)


def sizes(state: State, received: State, sends: Collection[str]) -> dict[Part, tuple[float, float]]:
    """Return root mean squares of the change and of what was sent, by group, part, and whether it has a start.

    A change is the distance to the nearest start: the tensor of that name which was received, in the same group or in
    one that no site ``sends``, cut to the rank that came. Without a start it is all that was sent. Only weights count:
    factors of adapters, the head, and what has a start.
    """
    sums: dict[Part, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for group, tensors in state.items():
        starts = [t for other, t in received.items() if other == group or other not in sends]
        for name, value in tensors.items():
            side, gaps = side_of(name), [near for s in starts if (near := gap(value, s.get(name))) is not None]
            if side is None and not name.startswith("head.") and not gaps:
                continue
            size = float(value.double().square().sum())
            for part in ("all tensors", FACTORS[side] if side else "all but adapters"):
                kept = sums[group, part, bool(gaps)]
                kept[:] = [kept[0] + min(gaps, default=size), kept[1] + size, kept[2] + value.numel()]
    return {key: ((change / n) ** 0.5, (size / n) ** 0.5) for key, (change, size, n) in sums.items() if n}


def gap(value: Tensor, start: Tensor | None) -> float | None:
    """Return the squared distance to ``start``, cut to the shape of ``value``; None where it has no such part."""
    if start is None or start.ndim != value.ndim:
        return None
    start = start[tuple(map(slice, value.shape))]
    return float((value.double() - start.double()).square().sum()) if start.shape == value.shape else None
