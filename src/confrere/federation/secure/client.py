"""A site's half of one session, as functions of plain values: each phase takes what the one before gave.

Nothing here remembers. That no phase is answered twice in two ways is the task of
:mod:`confrere.federation.secure.participant`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from confrere.errors import UpdateRefusedError
from confrere.federation.secure.keys import SIZE, Identity, agree, derive, public_of, seal, unseal
from confrere.federation.secure.masks import Words, pair_mask, self_mask
from confrere.federation.secure.messages import (
    Advert,
    Envelopes,
    Opening,
    Session,
    Signed,
    Upload,
    opened,
    refused,
    signed,
)
from confrere.federation.secure.quantise import LEAST, MOST, Vector, to_ring
from confrere.federation.secure.shamir import SHARE, split


@dataclass(frozen=True, kw_only=True)
class Member:
    """Who takes part in which session, and by which identities it knows the others."""

    site: str
    identity: Identity
    roster: Mapping[str, bytes]
    session: Session


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Drawn anew for each session: two X25519 private keys and the seed of the own mask, 32 bytes each."""

    channel: bytes = field(repr=False)
    mask: bytes = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """After ``shares``: what everybody said, and this site's shares of its own two secrets."""

    secrets: Secrets = field(repr=False)
    adverts: Mapping[str, Advert]
    own: tuple[bytes, bytes] = field(repr=False)
    limits: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Masked:
    """After ``masked``: every site's shares of (mask key, seed) that this site holds, its own among them."""

    shares: Mapping[str, tuple[bytes, bytes]] = field(repr=False)


def threshold_of(cohort: int, wanted: int = 0) -> int:
    """Return how many of ``cohort`` sites have to stay: ``wanted``, or with 0 two thirds, rounded up; at least 2.

    Raises:
        UpdateRefusedError: not more than half, so that two groups of survivors could both be opened; or more than all.
    """
    threshold = wanted or max(2, -(-2 * cohort // 3))
    if not cohort / 2 < threshold <= cohort or threshold < 2:
        what = f"a threshold of {threshold} cannot be kept with {cohort} sites"
        raise UpdateRefusedError(what, fix="see secure.threshold", code="secure-threshold")
    return threshold


def announce(me: Member, weight: float, model: str, form: str) -> tuple[Secrets, Signed]:
    """Phase ``keys``: draw secrets; return them, and what the others may know."""
    secrets = Secrets(channel=os.urandom(SIZE), mask=os.urandom(SIZE), seed=os.urandom(SIZE))
    advert = Advert(
        session=me.session,
        channel=public_of(secrets.channel).hex(),
        mask=public_of(secrets.mask).hex(),
        commitment=commitment(secrets.seed, me.session.token),
        weight=weight,
        model=model,
        form=form,
    )
    return secrets, signed(me.site, me.identity, advert)


def share(me: Member, secrets: Secrets, limits: tuple[int, ...], adverts: Sequence[Signed]) -> tuple[Shared, Signed]:
    """Phase ``shares``: check what the others said; seal for each a share of both secrets, and the own exponents."""
    known = read_adverts(me, adverts)
    own = known.get(me.site)
    if own is None or (own.channel, own.mask) != (public_of(secrets.channel).hex(), public_of(secrets.mask).hex()):
        raise refused("this site's own keys are not among those of the session", f"site {me.site}")
    for site, advert in known.items():
        if advert.model != own.model:
            what, fix = "the server sent this site and another one different models", "ask who runs the server why"
            raise UpdateRefusedError(what, where=f"site {site}", fix=fix, code="secure-models")
        if advert.form != own.form:
            raise refused("another site adds up tensors of another form", f"site {site}")
    holders = {site: number for number, site in enumerate(me.session.cohort, 1) if site in known}
    of_key, of_seed = (split(s, [*holders.values()], me.session.threshold) for s in (secrets.mask, secrets.seed))
    sealed = {}
    for site, number in holders.items():
        if site != me.site:
            key = _channel(me, secrets, known, sender=me.site, receiver=site)
            sealed[site] = seal(key, of_key[number] + of_seed[number] + np.array(limits, dtype=np.int8).tobytes()).hex()
    mine = holders[me.site]
    shared = Shared(secrets=secrets, adverts=known, own=(of_key[mine], of_seed[mine]), limits=limits)
    return shared, signed(me.site, me.identity, Envelopes(session=me.session.token, sealed=sealed))


def mask(
    me: Member, shared: Shared, sealed: Mapping[str, str], change: Vector, sizes: Sequence[int]
) -> tuple[Masked, Signed, Words]:
    """Phase ``masked``: open what the others sealed; return the change in the ring, hidden by all masks.

    Args:
        me: who.
        shared: what :func:`share` gave.
        sealed: in hexadecimal digits, of every other site whose shares the server has.
        change: sent minus received (d,), no larger than ``shared.limits``.
        sizes: numbers of values of its tensors.
    """
    present = sorted({*sealed, me.site})
    _enough(present, shared.adverts, me.session.threshold)
    shares, limits = {me.site: shared.own}, [shared.limits]
    for site in sorted(sealed):
        key = _channel(me, shared.secrets, shared.adverts, sender=site, receiver=me.site)
        plain = unseal(key, bytes.fromhex(sealed[site]), where=f"site {site}")
        if len(plain) != 2 * SHARE + len(sizes):
            raise refused("a site sealed something else than two shares and exponents", f"site {site}")
        shares[site] = plain[:SHARE], plain[SHARE : 2 * SHARE]
        limits.append(tuple(np.frombuffer(plain[2 * SHARE :], dtype=np.int8).tolist()))
        if not all(LEAST <= limit <= MOST for limit in limits[-1]):
            raise refused("a site sealed an exponent that cannot be", f"site {site}")
    largest = tuple(map(max, zip(*limits, strict=True)))
    total = sum(shared.adverts[site].weight for site in present)
    vector = to_ring(change, sizes, largest, shared.adverts[me.site].weight, total)
    token, count = me.session.token, len(vector)
    vector = vector + self_mask(shared.secrets.seed, token, count)
    for site in sealed:
        public = bytes.fromhex(shared.adverts[site].mask)
        vector = vector + pair_mask(shared.secrets.mask, public, token, me.site, site, count)
    upload = Upload(session=token, exponents=largest, vector=digest_of(vector))
    return Masked(shares=shares), signed(me.site, me.identity, upload), vector


def unmask(me: Member, masked: Masked, survivors: Sequence[str]) -> Signed:
    """Phase ``unmask``: give shares of the seeds of survivors and of the mask keys of the others, never both of one."""
    _enough(survivors, masked.shares, me.session.threshold)
    if me.site not in survivors:
        raise refused("a site that is said to have dropped out is asked for shares", f"site {me.site}")
    opening = Opening(
        session=me.session.token,
        survivors=tuple(sorted(survivors)),
        seeds={site: seed.hex() for site, (_, seed) in masked.shares.items() if site in survivors},
        keys={site: key.hex() for site, (key, _) in masked.shares.items() if site not in survivors},
    )
    return signed(me.site, me.identity, opening)


def read_adverts(me: Member, adverts: Sequence[Signed]) -> dict[str, Advert]:
    """Return what every site said, sorted by site; refuse what is not of this session, and fewer than are needed."""
    known: dict[str, Advert] = {}
    for envelope in sorted(adverts, key=lambda one: one.site):
        where = f"site {envelope.site}"
        advert = opened(Advert, envelope, envelope.site, me.roster, where=where)
        if advert.session != me.session or envelope.site in known:
            raise refused("the keys of another session came, or two of one site", where)
        known[envelope.site] = advert
    _enough(known, me.session.cohort, me.session.threshold)
    return known


def commitment(seed: bytes, token: str) -> str:
    """Return what a site says of its seed beforehand: by it the server knows whether it put it together rightly."""
    return derive(seed, "commitment", token).hex()


def digest_of(vector: Words) -> str:
    """Return the SHA-256 of a vector's words, little end first."""
    return sha256(vector.astype("<u4", copy=False).tobytes()).hexdigest()


def _channel(me: Member, secrets: Secrets, adverts: Mapping[str, Advert], *, sender: str, receiver: str) -> bytes:
    """Return the key of the one envelope that ``sender`` seals for ``receiver``; this site is either."""
    other = receiver if sender == me.site else sender
    secret = agree(secrets.channel, bytes.fromhex(adverts[other].channel), where=f"site {other}")
    return derive(secret, "envelope", me.session.token, sender, receiver)


def _enough(
    sites: Sequence[str] | Mapping[str, object], known: Sequence[str] | Mapping[str, object], least: int
) -> None:
    if set(sites) - set(known) or len(set(sites)) != len(sites):
        raise refused("a site is named that takes no part in the session, or twice")
    if len(sites) < least:
        what = f"{len(sites)} sites are left where {least} are needed: nothing is shown of them"
        raise UpdateRefusedError(what, fix="see secure.threshold", code="secure-threshold")
