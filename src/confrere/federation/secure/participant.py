"""A site's entry: one session at a time, every phase answered once, and no round opened twice in two ways.

The secrets of a session live in memory only. A site that was killed has none left and counts as dropped out; when the
round is tried again, all sites draw new ones. So a mask covers one vector, ever. What a site trained in a round is
kept (:mod:`confrere.record.store`) and not trained again. Two attempts at one round with other survivors would give
two sums whose difference tells about single sites: which survivors were opened is therefore kept, too, on the site's
own disk, and a second attempt has to have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from confrere.errors import UpdateRefusedError
from confrere.federation.checks import check_groups, check_tensors, check_weight
from confrere.federation.robust import layout, update
from confrere.federation.secure import client
from confrere.federation.secure.forms import as_tensor, digest_of, sizes
from confrere.federation.secure.keys import Identity, require
from confrere.federation.secure.messages import (
    PHASES,
    Adverts,
    Delivery,
    Session,
    Survivors,
    pack,
    unpack,
)
from confrere.federation.secure.quantise import Vector, exponents, shortened
from confrere.method import Method, Reply, Request
from confrere.record.files import read_json, write_json
from confrere.tensors import State, digest

HIDDEN = ("kept", "stored")
"""Metrics that stay at the site: digests of what it trained, by which a guess could be confirmed."""


@dataclass
class _Attempt:
    """What a site holds of the session it is in; ``payload`` names what it trained, and from what."""

    member: client.Member
    change: Vector = field(repr=False)
    sizes: tuple[int, ...]
    payload: str
    held: client.Secrets | client.Shared | client.Masked = field(repr=False)
    answers: dict[str, tuple[str, Reply]] = field(default_factory=dict, repr=False)


class Participant:
    """The site's half of secure aggregation.

    Args:
        site: its name.
        identity: by which the others know it.
        roster: public identities of all sites.
        threshold: least threshold of a session, as a number of sites; 0 for two thirds of the cohort.
        clip: a longer change is shortened to this L2 norm before it is masked; 0 never.
        folder: where to keep which rounds were opened; None for memory, which is right for simulations only.
    """

    def __init__(
        self,
        site: str,
        identity: Identity,
        roster: Mapping[str, bytes],
        *,
        threshold: int = 0,
        clip: float = 0.0,
        folder: Path | None = None,
    ) -> None:
        require()
        self._site, self._identity, self._roster = site, identity, dict(roster)
        self._threshold, self._clip, self._folder = threshold, clip, folder
        self._opened: dict[int, object] = {}
        self._attempt: _Attempt | None = None

    def handle(self, request: Request, method: Method, train: Callable[[Request], Reply]) -> Reply:
        """Answer a request of one of the four phases; a repeated one gets the stored answer.

        Args:
            request: of the server.
            method: what is trained.
            train: trains and answers in the clear; what it gives stays here.

        Raises:
            UpdateRefusedError: the request is of no phase, out of turn, or would show what it may not.
        """
        if request.kind not in PHASES:
            what, fix = "this site sends its updates masked only", "set secure.aggregation=true at the server"
            raise UpdateRefusedError(what, where=f"site {self._site}", fix=fix, code="secure-off")
        attempt, asked = self._in_session(request), digest(request.state)
        if attempt is not None and request.kind in attempt.answers:
            before, answer = attempt.answers[request.kind]
            if before != asked:
                what, fix = "a phase was asked for twice, in two ways", "let one server lead a run"
                raise UpdateRefusedError(what, where=f"site {self._site}", fix=fix, code="secure-twice")
            return answer
        if request.kind == "keys":
            attempt, answer = self._keys(request, method, train)
            self._attempt = attempt  # the secrets of an earlier session are gone
        else:
            attempt, answer = self._later(request, attempt)
        attempt.answers[request.kind] = asked, answer
        return answer

    def _in_session(self, request: Request) -> _Attempt | None:
        """Return the attempt that a request belongs to; None if it is of another session, or opens one."""
        attempt = self._attempt
        token = _token(request, where=f"site {self._site}")
        if attempt is None or (request.run, request.round, token) != _stamp(attempt.member.session):
            return None
        return attempt

    def _keys(self, request: Request, method: Method, train: Callable[[Request], Reply]) -> tuple[_Attempt, Reply]:
        """Train, and say which keys this site has drawn for the session."""
        where = f"site {self._site}"
        session = unpack(Session, request.state, where=where)
        cohort, known = session.cohort, self._roster.keys()
        if (session.run, session.round) != (request.run, request.round) or list(cohort) != sorted({*cohort} & known):
            what, fix = "the session is of another round, or names sites that are not known", "compare the rosters"
            raise UpdateRefusedError(what, where=where, fix=fix, code="secure-session")
        if self._site not in cohort or session.threshold < client.threshold_of(len(cohort), self._threshold):
            what, fix = "the session has fewer sites than this one asks for", "see secure.threshold"
            raise UpdateRefusedError(what, where=where, fix=fix, code="secure-threshold")
        received = {group: tensors for group, tensors in request.state.items() if group != "secure"}
        reply = train(replace(request, kind="train", state=received))
        check_weight(reply.weight, None, self._site)
        check_sound(method, reply.state)
        change = shortened(update(reply.state, received).numpy(), self._clip)
        member = client.Member(site=self._site, identity=self._identity, roster=self._roster, session=session)
        form = layout(reply.state)
        model = digest(received)
        secrets, advert = client.announce(member, reply.weight, model, digest_of(form))
        attempt = _Attempt(member, change, sizes(form), f"{model} {digest(reply.state)}", held=secrets)
        metrics = {key: value for key, value in reply.metrics.items() if key not in HIDDEN}
        return attempt, replace(reply, state=pack(advert, form=as_tensor(form)), metrics=metrics)

    def _later(self, request: Request, attempt: _Attempt | None) -> tuple[_Attempt, Reply]:
        """Answer one of the phases after the first, in their order."""
        where, beside = f"site {self._site}", dict[str, Tensor]()
        if attempt is None:
            raise _out_of_turn(where)
        held = attempt.held
        if request.kind == "shares" and isinstance(held, client.Secrets):
            adverts = unpack(Adverts, request.state, where=where).adverts
            limits = exponents(attempt.change, attempt.sizes)
            attempt.held, answer = client.share(attempt.member, held, limits, adverts)
        elif request.kind == "masked" and isinstance(held, client.Shared):
            sealed = unpack(Delivery, request.state, where=where).sealed
            attempt.held, answer, vector = client.mask(attempt.member, held, sealed, attempt.change, attempt.sizes)
            beside = {"vector": torch.from_numpy(vector.view("int32"))}
        elif request.kind == "unmask" and isinstance(held, client.Masked):
            survivors = unpack(Survivors, request.state, where=where).survivors
            answer = client.unmask(attempt.member, held, survivors)
            self._once(attempt.member.session, sorted(survivors), attempt.payload)
        else:
            raise _out_of_turn(where)
        return attempt, Reply(site=self._site, run=request.run, round=request.round, state=pack(answer, **beside))

    def _once(self, session: Session, survivors: list[str], payload: str) -> None:
        """Keep what is about to be opened of a round; refuse it if something else of that round was."""
        said = {"run": session.run, "survivors": survivors, "payload": payload}
        file = None if self._folder is None else self._folder / f"opened-{session.round:05d}.json"
        before = read_json(file) if file is not None and file.exists() else self._opened.get(session.round)
        if before not in (None, said):
            what = "this round was opened before, with other survivors or another update"
            raise UpdateRefusedError(
                what, where=f"site {self._site}", fix="go on with the next round", code="secure-opened"
            )
        self._opened[session.round] = said
        if file is not None and before is None:
            write_json(file, said)


def check_sound(method: Method, payload: State) -> None:
    """Refuse before it is masked what the gate would refuse of one update alone: nobody can look at it afterwards.

    Names and shapes are not looked at here: the server compares their digest with what the method says is sent.
    """
    check_groups(payload, method, None)
    for group, tensors in payload.items():
        check_tensors(group, tensors, None, unequal=False)
    if not method.plausible(payload):
        what, fix = "a number that is no weight cannot be meant", "look at the training of this site"
        raise UpdateRefusedError(what, fix=fix, code="update-values")


def _out_of_turn(where: str) -> UpdateRefusedError:
    what, fix = "this site is in no such session, or in another phase of it", "nothing to do if it was started anew"
    return UpdateRefusedError(what, where=where, fix=fix, code="secure-session")


def _stamp(session: Session) -> tuple[str, int, str]:
    return session.run, session.round, session.token


def _token(request: Request, *, where: str) -> str:
    """Return the token of the session that a request says it belongs to."""
    if request.kind == "keys":
        return unpack(Session, request.state, where=where).token
    if request.kind == "shares":
        return unpack(Adverts, request.state, where=where).session
    if request.kind == "masked":
        return unpack(Delivery, request.state, where=where).session
    return unpack(Survivors, request.state, where=where).session
