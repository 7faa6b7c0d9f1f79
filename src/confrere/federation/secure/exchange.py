"""A round at the server: four phases over any transport; what is left in the end is one sum."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from confrere.errors import UpdateRefusedError
from confrere.federation.checks import SAME, check_metrics, check_weight
from confrere.federation.defence import Collected, Defence
from confrere.federation.gate import Gate, stamped
from confrere.federation.robust import Layout, layout
from confrere.federation.secure import client, forms, server
from confrere.federation.secure.masks import Words
from confrere.federation.secure.messages import (
    Advert,
    Adverts,
    Delivery,
    Envelopes,
    Message,
    Opening,
    Phase,
    Session,
    Signed,
    Survivors,
    Upload,
    opened,
    pack,
    refused,
    unpack,
)
from confrere.federation.secure.total import Total
from confrere.federation.transport import Failure, Transport
from confrere.method import Reply, Request
from confrere.tensors import State, digest

M = TypeVar("M", Advert, Envelopes, Upload, Opening)


@dataclass(frozen=True, kw_only=True)
class Secure(Defence):
    """Stands in front of a method's aggregation: it sees the sites' weighted mean, and nobody sees one update.

    Args:
        roster: public identities of all sites.
        threshold: so many sites have to stay to the end of a round; 0 for two thirds of those that are asked.
        folder: where the sums are kept, by which ``confrere verify`` computes rounds again; None keeps none.
    """

    roster: Mapping[str, bytes]
    threshold: int = 0
    folder: Path | None = None

    def collect(self, transport: Transport, requests: Mapping[str, Request], gate: Gate) -> Collected:
        """Lead all sites through one session. Below the threshold nothing is shown; that costs the round, no more."""
        attempt = _Attempt(transport, requests, gate, self.roster)
        round_ = next(iter(requests.values())).round
        try:
            threshold = client.threshold_of(len(requests), self.threshold)
            total = attempt.lead(
                Session(
                    run=gate.run,
                    round=round_,
                    token=os.urandom(16).hex(),
                    cohort=tuple(sorted(requests)),
                    threshold=threshold,
                )
            )
            reply = total.reply(requests[total.sites[0]].state, round_, gate.run)
        except UpdateRefusedError as error:
            attempt.failures.append(Failure("", error.reason, error.fix, error.code))
            return attempt.collected(())
        if self.folder is not None:
            total.write(self.folder, round_)
        said = {"sum": digest(total.state()), "asked": len(requests), "threshold": threshold}
        return attempt.collected(total.sites, reply, {"secure": said})


@dataclass
class _Attempt:
    """What the server holds while it leads one session: every site's messages, by phase."""

    transport: Transport
    requests: Mapping[str, Request]
    gate: Gate
    roster: Mapping[str, bytes]
    failures: list[Failure] = field(default_factory=list)
    first: list[Reply | Failure] = field(default_factory=list)
    replies: dict[str, Reply] = field(default_factory=dict)
    sent: dict[str, dict[str, State]] = field(default_factory=dict)
    came: dict[str, dict[str, State]] = field(default_factory=dict)

    def lead(self, session: Session) -> Total:
        """Return the sum; UpdateRefusedError where it may not, or cannot, be opened."""
        token = session.token
        envelopes, adverts, form = self._keys(session)
        everybody = Adverts(session=token, adverts=tuple(envelopes[site] for site in sorted(envelopes)))
        boxes = self._phase("shares", session, dict.fromkeys(adverts, everybody), Envelopes)
        boxes = self._only(boxes, lambda site, box: server.check_envelopes(box, site, adverts))
        present = sorted(self._enough(boxes, session))
        deliveries = {
            site: Delivery(session=token, sealed={o: boxes[o].sealed[site] for o in present if o != site})
            for site in present
        }
        uploads = self._phase("masked", session, deliveries, Upload)
        used, count = server.common(uploads, len(form)), sum(forms.sizes(form))
        vectors: dict[str, Words] = {}

        def keep(site: str, upload: Upload) -> None:
            vectors[site] = server.check_vector(upload, used, count, _words(self.came[site]["masked"]))

        survivors = tuple(sorted(self._enough(self._only(uploads, keep), session)))
        asked = dict.fromkeys(survivors, Survivors(session=token, survivors=survivors))
        openings = self._phase("unmask", session, asked, Opening)
        openings = self._only(openings, lambda _, one: server.check_opening(one, survivors, present))
        words = server.open_sum(session, adverts, present, vectors, openings)
        weights = {site: adverts[site].weight for site in present}
        return Total(form=form, words=words, exponents=used, weights=weights, sites=survivors)

    def collected(
        self, sites: Sequence[str], total: Reply | None = None, record: Mapping[str, Any] | None = None
    ) -> Collected:
        """Return what the loop goes on with; of the ``sites`` that count, all their messages as they came."""
        return Collected(
            requests={
                s: replace(r, state={**r.state, **_flat(self.sent.get(s, {}))}) for s, r in self.requests.items()
            },
            answers=self.first,
            replies=[replace(self.replies[site], state=_flat(self.came[site])) for site in sites],
            failures=sorted(self.failures, key=lambda failed: (failed.site, failed.reason)),
            total=total,
            record=record or {},
            lost=bool(self.replies) and not sites,
        )

    def _keys(self, session: Session) -> tuple[dict[str, Signed], dict[str, Advert], Layout]:
        """Let the sites train; return what they say of the keys they drew, and the form of what they will add up."""
        start = pack(session)
        asked = {s: replace(r, kind="keys", state={**r.state, **start}) for s, r in self.requests.items()}
        self.first = self.transport.exchange(asked)
        envelopes, adverts, formed = dict[str, Signed](), dict[str, Advert](), list[Layout]()
        for site, reply in self._sound("keys", asked, self.first).items():
            try:
                check_weight(reply.weight, self.gate.weights, site)
                check_metrics(reply.metrics, self.requests[site])
                envelope = unpack(Signed, reply.state, where=f"site {site}")
                advert = opened(Advert, envelope, site, self.roster, where=f"site {site}")
                form = self._form(site, reply.state)
                if (advert.session, advert.weight, advert.form) != (session, reply.weight, forms.digest_of(form)):
                    raise refused("session, weight or form are not those that were signed", f"site {site}")
                if form not in (formed or [form]):
                    raise refused("other tensors would be added up than at the other sites", f"site {site}")
            except UpdateRefusedError as error:
                self._fail(site, error)
            else:
                envelopes[site], adverts[site], self.replies[site], formed = envelope, advert, reply, [form]
        self._enough(adverts, session)
        return envelopes, adverts, formed[0]

    def _form(self, site: str, state: State) -> Layout:
        """Return the form of what a site will add up; refuse another one than the method says."""
        said = state["secure"].get("form")
        if not isinstance(said, Tensor) or said.dtype != torch.uint8:
            raise refused("there is no form of the tensors", f"site {site}")
        form = forms.from_json(said.numpy().tobytes(), where=f"site {site}")
        due = None if self.gate.expected is None else layout(self.gate.expected(site, self.requests[site]))
        if due not in (None, form):
            what = "other tensors would be added up than the method says"
            raise UpdateRefusedError(what, where=f"site {site}", fix=SAME, code="update-form")
        return form

    def _phase(self, phase: Phase, session: Session, messages: Mapping[str, Message], kind: type[M]) -> dict[str, M]:
        """Send each site its message; return the signed answers to it."""
        round_ = session.round
        asked = {s: Request(kind=phase, run=session.run, round=round_, state=pack(m)) for s, m in messages.items()}
        found: dict[str, M] = {}
        for site, reply in self._sound(phase, asked, self.transport.exchange(asked)).items():
            where = f"site {site}, phase {phase}"
            try:
                message = opened(kind, unpack(Signed, reply.state, where=where), site, self.roster, where=where)
                if message.session != session.token:
                    raise refused("an answer is of another session", where)
            except UpdateRefusedError as error:
                self._fail(site, error)
            else:
                found[site] = message
        return found

    def _sound(
        self, phase: Phase, asked: Mapping[str, Request], answers: Sequence[Reply | Failure]
    ) -> dict[str, Reply]:
        """Return the replies to this phase, sorted by site; of equal ones one, of different ones none."""
        came: dict[str, list[Reply]] = {}
        for answer in answers:
            failed = stamped(answer, asked, self.gate.run)
            if failed is None and isinstance(answer, Reply):
                came.setdefault(answer.site, []).append(answer)
            elif failed is not None:
                self.failures.append(failed)
        sound = {}
        for site, same in sorted(came.items()):
            try:
                different = len({digest(reply.state) for reply in same}) > 1
            except (AttributeError, TypeError, ValueError):  # no state at all, or not of tensors
                self._fail(site, refused("an answer cannot be read"))
                continue
            if different:
                what, fix = "different answers came to one request", "let one process answer for a site"
                self._fail(site, UpdateRefusedError(what, fix=fix, code="update-twice"))
                continue
            sound[site] = same[0]
            self.sent.setdefault(site, {})[phase] = asked[site].state
            self.came.setdefault(site, {})[phase] = same[0].state
        return sound

    def _only(self, messages: Mapping[str, M], check: Callable[[str, M], None]) -> dict[str, M]:
        """Return the messages that pass a check."""
        good: dict[str, M] = {}
        for site, message in messages.items():
            try:
                check(site, message)
            except UpdateRefusedError as error:
                self._fail(site, error)
            else:
                good[site] = message
        return good

    def _enough(self, found: Mapping[str, object], session: Session) -> Mapping[str, object]:
        if len(found) < session.threshold:
            what = f"{len(found)} of {len(session.cohort)} sites are left where {session.threshold} are needed"
            raise UpdateRefusedError(what, fix="see secure.threshold", code="secure-threshold")
        return found

    def _fail(self, site: str, error: UpdateRefusedError) -> None:
        self.failures.append(Failure(site, error.reason, error.fix, error.code))


def _words(state: State) -> Words | None:
    """Return the vector beside a message, None where there is none."""
    found = state.get("secure", {}).get("vector")
    if not isinstance(found, Tensor) or found.dtype != torch.int32 or found.ndim != 1:
        return None
    return found.numpy().view(np.uint32)


def _flat(phases: Mapping[str, State]) -> dict[str, Any]:
    """Return the messages of all phases as one payload, a group a phase."""
    return {phase: state["secure"] for phase, state in phases.items() if "secure" in state}
